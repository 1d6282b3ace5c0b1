"""Is this tree of plain data a config of the schema? Keys, types and ranges, each key on its own.

What several keys must satisfy together is in :mod:`leakfree.config.rules`. Types are strict: text is never
read as a number, a number never as text. Names of a registry are checked where the registry lives.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any

from leakfree.errors import ConfigError, choices

__all__ = ["Origin", "check_tree", "field_kind", "flatten", "is_pending", "nearest_keys", "schema_kinds", "show"]

Origin = Callable[[str], str]  # dotted key -> where its value was given: "file:line" or "command line"

_KIND_NAMES: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_BOUNDS: list[tuple[str, str, Callable[[float, float], bool]]] = [
    ("low", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("high", "at most", operator.le),
]
LARGEST_INTEGER = 2**31 - 1  # of a key of the schema that names no other: libraries take 32 bits, or run out of memory
_LONGEST_KEY = 200  # characters that are compared
_OPTION_NAME = re.compile(r"[A-Za-z_]\w*\Z")


@functools.cache
def schema_kinds(schema: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return every dotted key of ``schema``, sections included, with its annotated type and valid range."""
    hints = typing.get_type_hints(schema)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {}
    for item in fields(schema):
        kind = hints[item.name]
        kinds[item.name] = (kind, dict(item.metadata.get("valid", {})))
        if is_dataclass(kind):
            nested = schema_kinds(typing.cast(type, kind))
            kinds.update({f"{item.name}.{key}": value for key, value in nested.items()})
    return kinds


def field_kind(schema: type, key: str) -> Any:
    """Return the annotated type of a dotted key, ``Any`` for an entry of an options section, None if unknown."""
    kinds = schema_kinds(schema)
    if key in kinds:
        return kinds[key][0]
    parent, _, name = key.rpartition(".")
    if parent in kinds and _is_options(kinds[parent][0]) and name:
        return Any
    return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict under dotted keys; an empty section has none."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def check_tree(tree: dict[str, Any], schema: type, origin: Origin, *, resolved: bool) -> None:
    """Raise on the first key, type or value of ``tree`` that ``schema`` does not allow.

    Args:
        tree: nested plain data; keys may be missing.
        schema: a dataclass of the schema.
        origin: where each key was given, for the message.
        resolved: False while ``${key}`` and ``???`` may still stand for a value.

    Raises:
        ConfigError: an unknown key, a value of another type, or one out of its range.
    """
    _check_section(tree, "", schema, origin, resolved)


def is_pending(value: Any) -> bool:
    """Whether a value stands for another one: a ``${key}``, or ``???`` that a later layer must replace."""
    return isinstance(value, str) and ("${" in value or value == "???")


def nearest_keys(key: str, valid: typing.Iterable[str], limit: int = 3) -> list[str]:
    """Return the keys most like ``key``, best first: another case, another section, or a near spelling."""

    def score(name: str) -> float:
        given, other = key.lower(), name.lower()
        if given == other:
            return 3.0
        leaf = SequenceMatcher(None, given.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return leaf + SequenceMatcher(None, given, other).ratio() + (leaf == 1.0) * 0.5

    key = key[-_LONGEST_KEY:]  # likeness takes time with the square of the length
    scores = {name: score(name) for name in valid}
    best = sorted(scores, key=lambda name: (-scores[name], name))[:limit]
    near = [name for name in best if scores[name] >= max(1.35, scores[best[0]] - 0.15)]
    section = key.rpartition(".")[0]
    if near and near[0].rpartition(".")[0] == section:  # the section was right: only the name is misspelt
        near = [name for name in near if name.rpartition(".")[0] == section]
    return near


def _check_section(tree: dict[str, Any], prefix: str, schema: type, origin: Origin, resolved: bool) -> None:
    kinds = schema_kinds(schema)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in kinds:
            given = ".".join([key, *_only_path(value)])
            raise ConfigError(f"{origin(key)}: {given}: {_unknown(given, schema)}")
        kind, valid = kinds[key]
        if is_dataclass(kind) and isinstance(value, dict):
            _check_section(value, f"{key}.", schema, origin, resolved)
            continue
        for suffix, problem in _problems(value, kind, valid, resolved):
            raise ConfigError(f"{origin(key)}: {key}{suffix}: {problem}")


def _only_path(value: Any) -> Iterator[str]:
    """Yield the names on the way down while there is only one: what the user typed as ``a.b.c``."""
    while isinstance(value, dict) and len(value) == 1:
        name, value = next(iter(value.items()))
        yield name


def _unknown(key: str, schema: type) -> str:
    kinds = schema_kinds(schema)
    section = key.rpartition(".")[0]
    while section and section not in kinds:
        section = section.rpartition(".")[0]
    depth = section.count(".") + 1 if section else 0
    inside = [name for name in kinds if name.startswith(f"{section}." if section else "")]
    siblings = [name.rpartition(".")[2] for name in inside if name.count(".") == depth]
    near = nearest_keys(key, kinds)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown key; {meant}keys of {section or 'a config'}: {choices(key.rpartition('.')[2], siblings)}"


def _problems(value: Any, kind: Any, valid: dict[str, Any], resolved: bool) -> Iterator[tuple[str, str]]:
    """Yield (suffix of the key, what is wrong) for a value and its elements."""
    if is_pending(value):
        if resolved:
            yield "", f"has no value: {show(value)} stands for one that must be given"
        return
    if isinstance(value, str) and not _can_be_written(value):
        yield "", f"{show(value)} has a character that no file can hold (NUL, or half of a surrogate pair)"
        return
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            hint = f" (write [{value}])" if isinstance(value, bool | int | float | str) else ""
            yield "", f"expects {_name(kind)}, got {show(value)}{hint}"
            return
        for index, item in enumerate(value):
            for suffix, problem in _problems(item, typing.get_args(kind)[0], valid, resolved):
                yield f"[{index}]{suffix}", problem
    elif _is_options(kind):
        yield from _option_problems(value, resolved)
    elif not _is_of_kind(value, kind):
        yield "", f"expects {_name(kind)}, got {show(value)}{_hint(value, kind)}"
    elif kind is int and "high" not in valid and value > LARGEST_INTEGER:
        yield "", f"must be at most {LARGEST_INTEGER}, got {show(value)}"
    else:
        yield from (("", problem) for problem in _range_problems(value, valid))


def _option_problems(value: Any, resolved: bool) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield "", f"expects a section of options, got {show(value)}"
        return
    for name, item in value.items():
        if not _OPTION_NAME.match(name):
            yield "", f"{show(name)} cannot be the name of an option"
        elif not (item is None or isinstance(item, bool | int | float | str)):
            yield f".{name}", f"expects a number, text, true, false or null, got {show(item)}"
        elif isinstance(item, float) and not math.isfinite(item):
            yield f".{name}", f"expects a finite number, got {item}"
        elif isinstance(item, str) and not _can_be_written(item):
            yield f".{name}", f"{show(item)} has a character that no file can hold (NUL, or half of a surrogate pair)"
        elif is_pending(item) and resolved:
            yield f".{name}", f"has no value: {show(item)} stands for one that must be given"


def _can_be_written(text: str) -> bool:
    """Whether a text can stand in a file and in a path, whose bytes may be no UTF-8: YAML's escapes can write more."""
    try:
        return b"\0" not in text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False


def _hint(value: Any, kind: Any) -> str:
    if kind is str and isinstance(value, int | float):
        return f" (quote it: '{str(value).lower()}')"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f" (write {int(value)})"
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return " (must be finite)"
    return ""


def _is_of_kind(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    return type(value) is kind


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _range_problems(value: Any, valid: dict[str, Any]) -> Iterator[str]:
    one_of = valid.get("one_of")
    if one_of is not None and value not in one_of:
        yield f"got {show(value)}; valid: {choices(str(value), map(str, one_of))}"
        return
    limits = [(words, valid[name], holds) for name, words, holds in _BOUNDS if name in valid]
    if not all(holds(value, limit) for _, limit, holds in limits):
        yield f"must be {' and '.join(f'{words} {limit}' for words, limit, _ in limits)}, got {show(value)}"


def _is_options(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _name(kind: Any) -> str:
    if is_dataclass(kind):
        return "a section (" + ", ".join(item.name for item in fields(typing.cast(type, kind))) + ")"
    if typing.get_origin(kind) is list:
        return "a list, each element " + _name(typing.get_args(kind)[0])
    return _KIND_NAMES[kind]


def show(value: Any) -> str:
    """Return a value as an error message shows it: its YAML kind and its first 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null (nothing)", True: "true", False: "false"}[value]
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    prefix = "text " if isinstance(value, str) else "list " if isinstance(value, list) else ""
    return f"{'section ' if isinstance(value, dict) else prefix}{text}"
