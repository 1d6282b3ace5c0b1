"""Rank facts and the few collectives leakfree needs, on any backend, one process included.

Every function works without a process group (world size 1, no communication), so that layers and
tests are the same code on a laptop and on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "all_gather_ints",
    "all_gather_objects",
    "all_to_all_rows",
    "barrier",
    "broadcast_object",
    "get_rank",
    "get_world_size",
    "is_distributed",
]

Group = dist.ProcessGroup | None


def is_distributed(group: Group = None) -> bool:
    """Whether more than one rank takes part."""
    return get_world_size(group) > 1


def get_rank(group: Group = None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def get_world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def barrier(group: Group = None) -> None:
    if is_distributed(group):
        dist.barrier(group)


def _wire_device(group: Group) -> torch.device:
    """Where small control tensors must live for this backend."""
    backend = str(dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")


def all_gather_ints(values: Sequence[int], group: Group = None) -> list[list[int]]:
    """Gather a few integers from every rank in one collective: ``result[rank][i]``.

    Every rank passes the same number of values.
    """
    if not is_distributed(group):
        return [list(values)]
    mine = torch.tensor(list(values), dtype=torch.int64, device=_wire_device(group))
    everyone = [torch.empty_like(mine) for _ in range(get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [item.tolist() for item in everyone]


def all_gather_objects(value: Any, group: Group = None) -> list[Any]:
    """Gather a picklable object from every rank, in rank order (for results, not for the hot path)."""
    if not is_distributed(group):
        return [value]
    everyone: list[Any] = [None] * get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def broadcast_object(value: Any, group: Group = None, src: int = 0) -> Any:
    """Give every rank the object of rank ``src``."""
    if not is_distributed(group):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def _exchange(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group)
    return out


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.sizes = (send, receive)
        ctx.group = group
        return _exchange(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.sizes
        return _exchange(gradient, receive, send, ctx.group), None, None, None


def all_to_all_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group = None) -> Tensor:
    """Send the first ``send[0]`` rows to rank 0, the next ``send[1]`` to rank 1, ... differentiably.

    Args:
        rows: (N, *), N = sum(send); any float or integer dtype.
        send: rows for each rank, zero included.
        receive: rows that come from each rank; must agree with the senders' ``send``.

    Returns:
        (sum(receive), *): the received rows in the order of the ranks they came from. The gradient
        takes the way back. Each row crosses the wire at most once per direction.
    """
    if not is_distributed(group):
        return rows
    return _AllToAllRows.apply(rows, list(send), list(receive), group)
