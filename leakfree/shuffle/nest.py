"""Tensors nested in tuples, lists and dicts: taking them out in order, and putting others in their places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["replace_tensors", "tensors_of"]


def tensors_of(value: Any, path: str) -> list[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in ``value``, in a fixed order.

    Raises:
        TypeError: a value that is neither a tensor, a number, a text, None nor a nest of these.
    """
    found: list[tuple[str, Tensor]] = []

    def note(tensor: Tensor, here: str) -> Tensor:
        found.append((here, tensor))
        return tensor

    _map(value, note, path)
    return found


def replace_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """``value`` with its tensors, in the order of :func:`tensors_of`, replaced."""
    return _map(value, lambda old, here: next(tensors), "value")


def _map(value: Any, change: Callable[[Tensor, str], Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        return change(value, path)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(getattr(value, name), change, f"{path}.{name}") for name in value._fields))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict):
        changed = copy.copy(value)  # with what a subclass carries: a default factory, an order
        changed.update({key: _map(item, change, f"{path}[{key!r}]") for key, item in value.items()})
        return changed
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot shuffle {path} of type {type(value).__name__}; use tensors, tuples, lists, dicts")
