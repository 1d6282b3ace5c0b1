"""Rank facts and the few collectives leakfree needs, on any backend, one process included.

Every function works without a process group (world size 1, no communication), so that layers and
tests are the same code on a laptop and on a cluster. Where a group is asked for, None is all ranks and
"node" the ranks of this machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Group",
    "all_gather_ints",
    "all_gather_objects",
    "all_gather_rows",
    "all_gather_table",
    "all_reduce_sum_",
    "all_to_all_bytes",
    "barrier",
    "broadcast_object",
    "broadcast_rows",
    "get_rank",
    "get_world_size",
    "is_distributed",
]

Group = dist.ProcessGroup | Literal["node"] | None

_node_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _resolve(group: Group) -> dist.ProcessGroup | None:
    """The process group itself. The first use of "node" is a collective over all ranks."""
    if group != "node":
        if isinstance(group, str):
            raise ValueError(f"unknown process group {group!r}; use 'node', None for all ranks, or a ProcessGroup")
        return group
    world = dist.group.WORLD
    if world is None:
        return None
    if world not in _node_groups:
        # torchrun and Slurm number the nodes; a host name does it elsewhere.
        node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or socket.gethostname()
        nodes = all_gather_objects(node)
        members = [[rank for rank, other in enumerate(nodes) if other == name] for name in dict.fromkeys(nodes)]
        _node_groups.clear()  # of an earlier world
        device = torch.device("cuda") if "nccl" in str(dist.get_backend(world)) else torch.device("cpu")
        timeout = world._get_backend(device).options._timeout  # torch would give it its default
        mine, _ = dist.new_subgroups_by_enumeration(members, timeout)
        assert isinstance(mine, dist.ProcessGroup)  # this rank is in one
        _node_groups[world] = mine
    return _node_groups[world]


def is_distributed(group: Group = None) -> bool:
    """Whether more than one rank takes part."""
    return get_world_size(group) > 1


def get_rank(group: Group = None) -> int:
    return dist.get_rank(_resolve(group)) if dist.is_available() and dist.is_initialized() else 0


def get_world_size(group: Group = None) -> int:
    return dist.get_world_size(_resolve(group)) if dist.is_available() and dist.is_initialized() else 1


def barrier(group: Group = None) -> None:
    if is_distributed(group):
        dist.barrier(_resolve(group))


def _wire_device(group: Group) -> torch.device:
    """Where small control tensors must live for this backend."""
    backend = str(dist.get_backend(_resolve(group)))
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")


def all_gather_table(values: Sequence[int], group: Group = None) -> Tensor:
    """Gather a few integers from every rank in one collective: int64 (world size, len(values)), on the CPU.

    Every rank passes the same number of values.
    """
    mine = torch.tensor(list(values), dtype=torch.int64)
    if not is_distributed(group):
        return mine[None]
    mine = mine.to(_wire_device(group))
    everyone = mine.new_empty(get_world_size(group) * len(mine))
    dist.all_gather_into_tensor(everyone, mine, group=_resolve(group))
    return everyone.cpu().view(get_world_size(group), len(mine))


def all_gather_ints(values: Sequence[int], group: Group = None) -> list[list[int]]:
    """:func:`all_gather_table` as lists: ``result[rank][i]``."""
    return all_gather_table(values, group).tolist()


def all_reduce_sum_(values: Tensor, group: Group = None) -> Tensor:
    """Sum ``values`` over the ranks, in place and without gradient; return them."""
    if is_distributed(group):
        wire = values if values.is_cuda else values.to(_wire_device(group))
        dist.all_reduce(wire, group=_resolve(group))
        if wire is not values:
            values.copy_(wire)
    return values


def all_gather_objects(value: Any, group: Group = None) -> list[Any]:
    """Gather a picklable object from every rank, in rank order (for results, not for the hot path)."""
    if not is_distributed(group):
        return [value]
    everyone: list[Any] = [None] * get_world_size(group)
    dist.all_gather_object(everyone, value, group=_resolve(group))
    return everyone


def broadcast_object(value: Any, group: Group = None, src: int = 0) -> Any:
    """Give every rank the object of rank ``src``."""
    if not is_distributed(group):
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_resolve(group), group_src=src)
    return box[0]


def broadcast_rows(
    rows: Tensor, counts: Sequence[int], *, piece: int = 2**16, group: Group = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Show every rank the rows of all ranks, piece by piece: no rank ever holds them all.

    A collective: every rank must go through to the end.

    Args:
        rows: (counts[own rank], ...), of one dtype and shape of a row on all ranks.
        counts: rows of each rank; may be uneven and zero.
        piece: rows at a time.

    Yields:
        (rank, place of the first row among its rows, at most ``piece`` rows), in the order of ranks and rows; on the
        device of ``rows``. No gradient.
    """
    rows = rows.detach()
    for rank, count in enumerate(counts):
        for start in range(0, count, piece):
            if rank == get_rank(group):
                part = rows[start : start + piece].contiguous()
            else:
                part = rows.new_empty(min(piece, count - start), *rows.shape[1:])
            if is_distributed(group):
                wire = part.to(_wire_device(group))
                dist.broadcast(wire, group=_resolve(group), group_src=rank)
                part = wire.to(rows.device)
            yield rank, start, part


def all_to_all_bytes(data: Tensor, send: Sequence[int], receive: Sequence[int], group: Group = None) -> Tensor:
    """Send the first ``send[0]`` bytes to rank 0, the next ``send[1]`` to rank 1, ...; no gradient.

    Args:
        data: uint8 (sum(send),), contiguous.
        receive: bytes that come from each rank; must agree with the senders' ``send``.

    Returns:
        uint8 (sum(receive),): what came, in the order of the ranks. No byte crosses the wire twice.
    """
    if not is_distributed(group):
        return data
    out = data.new_empty(sum(receive))
    dist.all_to_all_single(out, data, list(receive), list(send), group=_resolve(group))
    return out


class _AllGatherRows(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what all ranks hand back for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather_padded(x, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = all_reduce_sum_(gradient.contiguous().clone(), ctx.group)
        first = sum(ctx.sizes[: get_rank(ctx.group)])
        return total[first : first + ctx.sizes[get_rank(ctx.group)]].clone(), None, None


def _gather_padded(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    largest = max(sizes)
    rows = x.detach().contiguous()
    if not rows.is_cuda:
        rows = rows.to(_wire_device(group))
    if len(rows) < largest:
        rows = torch.cat([rows, rows.new_zeros(largest - len(rows), *rows.shape[1:])])
    everyone = rows.new_empty(len(sizes) * largest, *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows, group=_resolve(group))
    everyone = everyone.to(x.device)
    if min(sizes) == largest:
        return everyone
    return torch.cat([everyone[rank * largest : rank * largest + size] for rank, size in enumerate(sizes)])


def all_gather_rows(x: Tensor, group: Group = None) -> tuple[Tensor, list[int]]:
    """Concatenate the rows of all ranks, in rank order; differentiable, for any numbers of rows, zero too.

    The gradient of a rank's rows is the sum over ranks of the gradients of their copies, so the gradient of a loss
    that is summed over ranks is exact. All ranks must take the backward if any does. For small rows (features):
    every rank holds all of them.

    Args:
        x: (N, *) with the same * and dtype on all ranks.

    Returns:
        (sum of N over ranks, *), and the N of each rank.
    """
    if not is_distributed(group):
        return x, [len(x)]
    sizes = [size for (size,) in all_gather_ints([len(x)], group)]
    return _AllGatherRows.apply(x, sizes, group), sizes
