"""From a config file to a typed, checked config, and back to a file that loads to the same.

Layers, later wins: the schema's defaults, the files of ``_BASE_``, the file, the command line. Sections are
merged key by key; lists and ``norm_options`` are values and are replaced whole, because the options of one norm
mean nothing to another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from leakfree import __version__
from leakfree.config.check import check_tree, field_kind, flatten
from leakfree.config.document import dump_yaml, parse_yaml
from leakfree.config.overrides import COMMAND_LINE, nest, parse_override
from leakfree.config.references import resolve_references
from leakfree.config.rules import check_rules
from leakfree.config.schema import TASKS, RunConfig
from leakfree.errors import ConfigError, choices
from leakfree.records import write_atomic

__all__ = ["config_to_dict", "diff_configs", "load_config", "save_config"]

BASE = "_BASE_"


@dataclass
class _Layer:
    """The content of one file, and the line of each of its dotted keys."""

    source: str
    tree: dict[str, Any]
    lines: dict[str, int]


@dataclass
class _Merged:
    """All layers in one tree, and where each value came from."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    default_origin: str = ""

    def origin(self, key: str) -> str:
        """Return where ``key`` was given; for a default, the file that was loaded."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, self.default_origin)


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read a config file and what it is based on, apply overrides, and check everything.

    Args:
        path: a YAML file. ``_BASE_`` in it names a file, or a list of files, relative to its own folder.
        overrides: ``key.path=value`` texts, the last one wins; the value is YAML.

    Returns:
        An instance of the dataclass that ``task`` names in :data:`leakfree.config.schema.TASKS`,
        with every ``${key.path}`` replaced by the value of that key.

    Raises:
        ConfigError: one line that names the file and line (or the command line), the key, what came and what
            would be right.

    Example:
        >>> config = load_config("configs/smoke/run.yaml", ["seed=1"])  # doctest: +SKIP
    """
    layers = _read_layers(Path(path), ())
    overrides = list(overrides)
    schema = _schema(layers, overrides)
    merged = _Merged(default_origin=layers[-1].source)
    for layer in layers:
        _add_layer(merged, layer, schema)
    for text in overrides:
        _add_override(merged, text, schema)
    return _build(merged, schema)


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> Path:
    """Write every key of ``config`` to ``path``, atomically; :func:`load_config` of it gives an equal config.

    Raises:
        ConfigError: a value was changed in Python to one that would not load again.
    """
    path = Path(path)
    tree = config_to_dict(config)
    check_tree(tree, type(config), lambda key: f"{path}: not written", resolved=True)
    header = (
        f"# The resolved config of a run, written by leakfree {__version__}. To run it again:\n"
        "# leakfree train --config-file THIS_FILE output_dir=ANOTHER_FOLDER\n"
    )
    write_atomic(path, header + dump_yaml(tree))
    return path


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return ``config`` as nested plain data, ready for JSON."""
    return asdict(config)


def diff_configs(a: RunConfig | dict[str, Any], b: RunConfig | dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in ``a``, value in ``b``) where the two differ; None where one lacks the key.

    Args:
        a: a config, or the nested dict of one, as a run's record holds it.
        b: the same.
    """
    one, two = (flatten(item if isinstance(item, dict) else config_to_dict(item)) for item in (a, b))
    keys = [*one, *(key for key in two if key not in one)]
    return [(key, one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)]


# --------------------------------------------------------------------------------------- files


def _read_layers(path: Path, chain: tuple[Path, ...]) -> list[_Layer]:
    """Return the layers of ``path``, its bases first. ``chain``: the files that led here."""
    source, here = str(path), Path(os.path.realpath(path))
    chain = (*chain, here)
    tree, lines = parse_yaml(_read_text(path), source)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: a config is keys and values (key: value), got a {type(tree).__name__}")
    bases = tree.pop(BASE, [])
    place = f"{source}:{lines.get(BASE, 1)}: {BASE}"
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(item, str) and item for item in bases):
        raise ConfigError(f"{place}: expects a path, or a list of paths, relative to this file, got {bases!r}")
    layers: list[_Layer] = []
    for item in bases:
        base = path.parent / os.path.expanduser(item)
        if not os.path.isfile(base):
            raise ConfigError(f"{place}: {_missing(base)}")
        if Path(os.path.realpath(base)) in chain:
            circle = " -> ".join(file.name for file in (*chain[chain.index(Path(os.path.realpath(base))) :], base))
            raise ConfigError(f"{place}: goes in a circle: {circle}")
        layers += _read_layers(base, chain)
    return [*layers, _Layer(source, tree, lines)]


def _read_text(path: Path) -> str:
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise ConfigError(f"{path}: no regular file: a pipe or a device cannot be read as a config")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(_missing(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _missing(path: Path) -> str:
    """Say that there is no such config, with the nearest names that exist."""
    if os.path.isdir(path):
        return f"{path}: is a folder, expects a config file; {_holds(path, '')}"
    wrong, folder = path, path.parent
    while not os.path.exists(folder) and folder != folder.parent:
        wrong, folder = folder, folder.parent
    if os.path.isfile(folder):
        return f"{path}: no such file: {folder} is a file, not a folder"
    if wrong is path:
        return f"{path}: no such file; {_holds(folder, path.name)}"
    return f"{path}: no such file: there is no folder {wrong.name}; {_holds(folder, f'{wrong.name}/')}"


def _holds(folder: Path, near: str, limit: int = 8) -> str:
    try:
        found = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir() if not item.name.startswith("."))
    except OSError:
        found = []
    names = [name for name in found if name.endswith((".yaml", ".yml", "/"))]
    place = "the current folder" if folder == Path() else str(folder)
    if not names:
        return f"{place} holds no configs"
    close = get_close_matches(near, names, n=limit, cutoff=0.3)
    shown = [*close, *(name for name in names if name not in close)][:limit]
    return f"{place} holds: {', '.join(shown)}{', ...' if len(names) > limit else ''}"


# -------------------------------------------------------------------------------------- layers


def _schema(layers: list[_Layer], overrides: list[str]) -> type[RunConfig]:
    """Return the dataclass of the task that the last layer names."""
    task, source = "detection", layers[-1].source
    for layer in layers:
        if "task" in layer.tree:
            task, source = layer.tree["task"], f"{layer.source}:{layer.lines['task']}"
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals and key.strip() == "task":
            task, source = value.strip(), COMMAND_LINE
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError(f"{source}: task: got {task!r}; valid: {choices(str(task), TASKS)}")
    return TASKS[task]


def _add_layer(merged: _Merged, layer: _Layer, schema: type[RunConfig]) -> None:
    def origin(key: str) -> str:
        return f"{layer.source}:{layer.lines[key]}" if key in layer.lines else layer.source

    check_tree(layer.tree, schema, origin, resolved=False)
    merged.origins.update({key: f"{layer.source}:{line}" for key, line in layer.lines.items()})
    _merge(merged.tree, layer.tree, "", schema)


def _add_override(merged: _Merged, text: str, schema: type[RunConfig]) -> None:
    key, value = parse_override(text, schema)
    tree = nest(key, value)
    check_tree(tree, schema, lambda _: COMMAND_LINE, resolved=False)
    merged.origins.update(dict.fromkeys(flatten(tree), COMMAND_LINE))
    _merge(merged.tree, tree, "", schema, into_options=field_kind(schema, key) is Any)


def _merge(
    tree: dict[str, Any], update: dict[str, Any], prefix: str, schema: type[RunConfig], into_options: bool = False
) -> None:
    """Put ``update`` over ``tree``. ``into_options``: set single norm options instead of replacing them all."""
    for name, value in update.items():
        key = f"{prefix}{name}"
        merges = is_dataclass(field_kind(schema, key)) or into_options
        if merges and isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value, f"{key}.", schema, into_options)
        else:
            tree[name] = value


def _build(merged: _Merged, schema: type[RunConfig]) -> RunConfig:
    tree = asdict(schema())
    _merge(tree, merged.tree, "", schema)
    tree = resolve_references(tree, merged.origin)
    check_tree(tree, schema, merged.origin, resolved=True)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    assert isinstance(config, schema)
    check_rules(config, merged.origin)
    return config
