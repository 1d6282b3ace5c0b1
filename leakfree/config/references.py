"""``${key.path}`` in a config: the value of another key of the same config, put in once at loading.

Plain keys only. OmegaConf's resolvers (``${oc.env:HOME}``), relative and nested references are refused: what
a config says must not depend on where it is read.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leakfree.config.check import Origin, flatten, nearest_keys, show
from leakfree.errors import ConfigError

__all__ = ["resolve_references"]

_LONGEST = 100_000  # characters that the references of a key stand for
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def resolve_references(tree: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """Return ``tree`` with every reference replaced by the value it names.

    A value that is one reference keeps the type of what it names; inside longer text it becomes text.

    Args:
        tree: the whole config with its defaults, as nested plain data.
        origin: where each key was given, for the message.

    Raises:
        ConfigError: another kind of interpolation, an unknown or circular reference, or one to a section.
    """
    flat = flatten(tree)
    for key, value in flat.items():
        for text in _texts(value):
            _check_references(text, key, flat, origin)
    _check_lengths(flat, origin)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        raise ConfigError(f"{origin(key)}: {key}: {str(error).splitlines()[0]}") from None
    return dict(resolved)  # type: ignore[arg-type]


def _check_lengths(flat: dict[str, Any], origin: Origin) -> None:
    """Refuse texts that multiply: ten references to ten references to ... are gigabytes in a few lines."""
    lengths: dict[str, int] = {}
    waiting = [key for key, value in flat.items() if _texts(value)]
    for _ in range(len(waiting) + 1):
        later = []
        for key in waiting:
            names = [name for text in _texts(flat[key]) for name in _REFERENCE.findall(text)]
            if any(name in waiting and name not in lengths for name in names):
                later.append(key)
                continue
            lengths[key] = sum(map(len, _texts(flat[key]))) + sum(
                lengths.get(name, _length(flat[name])) for name in names
            )
            if lengths[key] > _LONGEST:
                raise ConfigError(
                    f"{origin(key)}: {key}: its references stand for {lengths[key]} characters; at most {_LONGEST}"
                )
        if len(later) == len(waiting):
            return  # a circle: told by who resolves it
        waiting = later


def _length(value: Any) -> int:
    return sum(map(_length, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 20


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) and "${" in value else []


def _check_references(text: str, key: str, flat: dict[str, Any], origin: Origin) -> None:
    place = f"{origin(key)}: {key}"
    if "${" in _REFERENCE.sub("", text) or "\\${" in text:
        raise ConfigError(f"{place}: {show(text)} is not allowed: only ${{key.path}} of this config can be referred to")
    for name in _REFERENCE.findall(text):
        if name not in flat and not any(other.startswith(f"{name}.") for other in flat):
            near = nearest_keys(name, flat)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{place}: ${{{name}}} is not a key of this config{meant}")
        if name not in flat:
            raise ConfigError(f"{place}: ${{{name}}} is a section: refer to one of its values")
