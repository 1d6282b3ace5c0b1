"""The options that a norm takes, and of what type: read from the signatures of its constructors."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn

__all__ = ["accepted_options", "option_problems"]

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def accepted_options(norm: Any) -> set[str] | None:
    """Names of the options that a registered norm takes, those of its base classes included; None = anything."""
    names: set[str] = set()
    for constructor in _constructors(norm):
        parameters = list(inspect.signature(constructor).parameters.values())
        named = [item for item in parameters if item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)]
        names |= {item.name for item in named} - {"self", "num_features", "dim"}
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            return names
    return names if inspect.isclass(norm) and issubclass(norm, nn.Module) else None


def option_problems(norm: Any, options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (option, what is wrong) for each value of another type than the norm's signature says.

    An option without an annotation, or with one that cannot be read, takes anything.
    """
    kinds: dict[str, Any] = {}
    for constructor in _constructors(norm):
        try:
            found = typing.get_type_hints(constructor)
        except (NameError, TypeError):  # a name that its module imports for type checkers only
            found = {}
        kinds = {**found, **kinds}
    for name, value in options.items():
        if name in kinds and not _is_of(value, kinds[name]):
            hint = ""
            if int in _members(kinds[name]) and isinstance(value, float) and value.is_integer():
                hint = f" (write {int(value)})"
            yield name, f"must be {_words(kinds[name])}, got {value!r}{hint}"


def _constructors(norm: Any) -> Iterator[Any]:
    for cls in norm.__mro__ if inspect.isclass(norm) else (norm,):
        if cls in (nn.modules.batchnorm._BatchNorm, nn.Module, object):
            return
        yield cls.__init__ if inspect.isclass(cls) else cls


def _members(kind: Any) -> tuple[Any, ...]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _is_of(value: Any, kind: Any) -> bool:
    return any(_is_one(value, member) for member in _members(kind))


def _is_one(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin in (tuple, list, Sequence):
        of = typing.get_args(kind)
        fits = isinstance(value, Sequence) and not isinstance(value, str)  # how many, the norm says with their meaning
        return fits and (not of or all(_is_of(item, of[0]) for item in value))
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind) if inspect.isclass(kind) else True


def _words(kind: Any) -> str:
    words = []
    for member in _members(kind):
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            words += [repr(value) for value in typing.get_args(member)]
        elif origin in (tuple, list, Sequence):
            of = typing.get_args(member)
            words.append(f"a list (each element {_words(of[0])})" if of else "a list")
        else:
            words.append(_WORDS.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(words)
