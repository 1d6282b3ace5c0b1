"""YAML text to plain data and back, with nothing that could run code.

Plain scalars follow YAML 1.2: ``1e-4`` is a number, only ``true`` and ``false`` are booleans, ``010`` and
``1:30`` are text, and a date is text. Duplicate keys, tags, anchors and several documents in one file are
errors. What the keys mean is not known here: see :mod:`leakfree.config.check`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from leakfree.errors import ConfigError

__all__ = ["dump_yaml", "parse_yaml"]

_CORE = "tag:yaml.org,2002:"  # what YAML writes as !!
_LONGEST_INTEGER = 400  # digits: more than the largest float has
_SCALARS = [
    (f"{_CORE}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    (f"{_CORE}int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    (
        f"{_CORE}float",
        re.compile(
            r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        list("-+.0123456789"),
    ),
    (f"{_CORE}null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars above, for trees: no tags, and no anchors (they make graphs)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        problem = None
        if getattr(event, "anchor", None) is not None:
            problem = "anchors (&) and aliases (*) are not allowed: use _BASE_ or ${key}"
        elif getattr(event, "tag", None) is not None:
            problem = f"tag {event.tag.replace(_CORE, '!!')} is not allowed: configs hold plain data only"
        if problem:
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        digits = node.value.lower().removeprefix("-").removeprefix("+").replace("_", "")
        if len(digits) > _LONGEST_INTEGER:  # Python refuses to show those of thousands
            problem = f"an integer of {len(digits)} digits is too large; write it like 1e30"
            raise ConstructorError(None, None, problem, node.start_mark)
        return int(digits, 16 if digits.startswith("0x") else 10) * (-1 if node.value.startswith("-") else 1)


_Loader.add_constructor(f"{_CORE}int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as PyYAML declares it)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence(f"{_CORE}seq", data, flow_style=True))
# Inside single quotes PyYAML folds some line separators into spaces; in double quotes it escapes them.
_Dumper.add_representer(
    str, lambda dumper, data: dumper.represent_scalar(f"{_CORE}str", data, style=None if data.isprintable() else '"')
)


def parse_yaml(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """Read one YAML document; return its plain data and the line of every dotted key.

    Args:
        text: the document.
        source: what error messages call it: a path, or "command line".

    Raises:
        ConfigError: not YAML, a tag, an anchor, a duplicate key or a key that is not text; names source, line
            and column.
    """
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _check_keys(node, "", source, lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = f"{error.problem}, {error.context}" if error.context else error.problem
        raise ConfigError(f"{place}: not valid YAML: {_one_line(problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: character #x{error.character:04x} is not allowed") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deep") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"{source}: not valid YAML: {_one_line(error).partition(';')[0]}"
        ) from None  # e.g. an integer of 5000 digits


def dump_yaml(data: dict[str, Any]) -> str:
    """Return block-style YAML that :func:`parse_yaml` reads back to equal data; lists stay on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**6)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _check_keys(node: Node, prefix: str, source: str, lines: dict[str, int]) -> None:
    """Refuse duplicate keys and keys that are not text; note the line of each key in ``lines``."""
    if isinstance(node, SequenceNode):
        for item in node.value:
            _check_keys(item, prefix, source, lines)
    if not isinstance(node, MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = key_node.value if isinstance(key_node, ScalarNode) else "a list or a section"
        if key_node.tag != f"{_CORE}str":
            raise ConfigError(f"{source}:{line}: a key must be text, got {name or 'null'}")
        key = f"{prefix}{name}"
        if name in seen:
            raise ConfigError(f"{source}:{line}: {key}: given twice in this section (first on line {seen[name]})")
        seen[name] = lines[key] = line
        _check_keys(value_node, f"{key}.", source, lines)
