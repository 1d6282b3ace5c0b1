"""Watching one rank: what it puts on the wire (``torch.distributed``, wrapped), and what it is told of mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "send", "isend", "batch_isend"))
    and callable(getattr(dist, name))
    and not isinstance(getattr(dist, name), type)
] + ["barrier"]


@dataclass(frozen=True)
class Call:
    """One collective: its name and, where one tensor goes in, the bytes for each receiving rank."""

    name: str
    bytes_to: tuple[int, ...] = ()


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The collectives that this rank calls inside the block, in their order."""
    calls: list[Call] = []
    real = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, function in real.items():
        setattr(dist, name, _noting(calls, name, function))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def _noting(calls: list[Call], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bytes_to: tuple[int, ...] = ()
        if name == "all_to_all_single":
            _, data, _, shares = args
            bytes_to = tuple(share * data.element_size() for share in shares)
        elif name == "all_gather_into_tensor":
            data = args[1]
            bytes_to = (data.numel() * data.element_size(),) * dist.get_world_size(kwargs.get("group"))
        calls.append(Call(name, bytes_to))
        return function(*args, **kwargs)

    return call


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor (N, *), uint8 (N, bytes of a row): equal only where it is equal bit by bit."""
    row = tensor.shape[1:].numel() * tensor.element_size()
    packed = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())  # `contiguous` leaves single rows
    return packed.view(-1).view(torch.uint8).view(len(tensor), row)


def told_by(mistakes: dict[str, Callable[[], object]], in_step: Callable[[], bool]) -> dict[str, str]:
    """What this rank is told of each mistake ("nothing" if it passes); after each, ``in_step()`` must hold."""
    told = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        assert in_step(), f"the ranks are out of step after: {name}"
    return told
