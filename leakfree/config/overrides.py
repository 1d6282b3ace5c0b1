"""``key.path=value`` from the command line, turned into pieces of a config."""

from __future__ import annotations

from typing import Any

from leakfree.config.check import field_kind
from leakfree.config.document import parse_yaml
from leakfree.errors import ConfigError

__all__ = ["COMMAND_LINE", "nest", "parse_override"]

COMMAND_LINE = "command line"
_DEEPEST = 20  # dots in a key
_YAML_STARTS = "\"'[{"


def parse_override(text: str, schema: type) -> tuple[str, Any]:
    """Return the dotted key and the value of one override.

    The value is YAML: ``0.1``, ``true``, ``[480, 640]``, ``{norm: BN}``. For a key that holds text it is taken as
    it was typed (``output_dir=007``), unless it is quoted, a list, a section or null; nothing after ``=`` is the
    empty text.

    Raises:
        ConfigError: no ``=``, no key, or a value that is not YAML.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"{COMMAND_LINE}: got {text!r}, expects key.path=value, like optimizer.lr=0.01")
    if key.count(".") > _DEEPEST:
        raise ConfigError(f"{COMMAND_LINE}: {key}: unknown key: none has more than {_DEEPEST} dots")
    takes_text = field_kind(schema, key) is str
    if not value or (takes_text and value[0] not in _YAML_STARTS and value not in ("null", "~")):
        return key, value
    return key, parse_yaml(value, f"{COMMAND_LINE}: {key}")[0]


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the key ``a.b``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)
