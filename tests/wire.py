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
    if name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "send", "isend", "recv", "irecv", "batch_"))
    and callable(getattr(dist, name))
    and not isinstance(getattr(dist, name), type)
] + ["barrier"]
_INTO = ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor")  # the result is given first


@dataclass(frozen=True)
class Call:
    """One collective: its name, the numbers of the tensor that goes in and, by kind, its bytes for each receiver."""

    name: str
    bytes_to: tuple[int, ...] = ()
    numbers: int | None = None


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
        data = args[1] if name in _INTO else args[0] if args else None
        if name == "all_to_all_single":
            bytes_to = tuple(share * data.element_size() for share in args[3])
        elif name == "all_gather_into_tensor":
            bytes_to = (data.numel() * data.element_size(),) * dist.get_world_size(kwargs.get("group"))
        calls.append(Call(name, bytes_to, data.numel() if isinstance(data, torch.Tensor) else None))
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
