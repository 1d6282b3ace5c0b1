"""Moving rows to random ranks and back: the differentiable batch shuffle.

Between the shuffle and the unshuffle a row computes among random companions. Each row crosses the
wire once per direction (an uneven all-to-all), against ``world_size`` times in the all-gather shuffle
of MoCo (He et al. 2020, section 3.3) and of detectron2's RoI shuffle (Wu & Johnson 2021, section 6).
The permutation comes from a seed that all ranks share, so none is broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leakfree.distributed import Group, all_gather_ints, all_to_all_rows, get_rank, get_world_size
from leakfree.shuffle.plan import GroupDraw

__all__ = ["Ticket", "batch_shuffle", "batch_unshuffle", "draw_groups"]

_DEFAULT_GENERATOR = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Ticket:
    """How to take shuffled rows home. Opaque; made by :func:`batch_shuffle`.

    ``send_order`` sorts this rank's rows by destination; ``arrival_order`` sorts the received rows by
    position, so that rank r holds consecutive positions of the permuted batch.
    """

    send_order: Tensor
    arrival_order: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    groups: Tensor  # (M,) group of each received row, counted from this rank's first group
    num_groups: int  # that meet on this rank
    process_group: Group


class _Reorder(torch.autograd.Function):
    """``x[order]`` for a permutation ``order``: the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, torch.argsort(order)), None


def draw_groups(
    num_rows: int,
    num_groups: int | None,
    *,
    seed: int,
    index: int,
    base_groups: int | None = None,
    group: Group = None,
) -> GroupDraw:
    """Draw balanced random groups over the rows of all ranks; one small collective for the sizes.

    Args:
        num_rows: rows on this rank, zero included.
        num_groups: groups over all ranks; None takes the sum over ranks of ``base_groups`` or, where
            that is None, the world size, at least 2.
        seed, index: the same on every rank.

    Raises:
        RuntimeError: on every rank, when ranks disagree on the seed or the count of draws; going on
            would send rows astray.
    """
    mine = [num_rows, base_groups or 0, seed, index, num_groups or 0]
    everyone = all_gather_ints(mine, group)
    if any(other[2:] != everyone[0][2:] for other in everyone):
        raise RuntimeError(
            "ranks drew different shuffles (seed, draw, num_groups per rank: "
            f"{[tuple(other[2:]) for other in everyone]}): every rank must shuffle equally often, with one seed"
        )
    if num_groups is None:
        num_groups = sum(other[1] for other in everyone) or max(2, len(everyone))
    return GroupDraw(tuple(other[0] for other in everyone), get_rank(group), num_groups, seed, index)


def make_ticket(draw: GroupDraw, device: torch.device, group: Group) -> Ticket:
    """Turn a draw into the two reorderings and the sizes of one exchange."""
    destination = draw.rank_of_group(draw.groups)
    send_order = np.argsort(destination, kind="stable")
    send = np.bincount(destination, minlength=draw.world_size)
    bounds = np.cumsum(draw.sizes)
    source_rank = np.searchsorted(bounds, draw.sources, side="right")
    receive = np.bincount(source_rank, minlength=draw.world_size)
    # Rows arrive by rank and, within a rank, in their order there: by row number.
    arrival_order = np.argsort(np.argsort(draw.sources))
    first = draw.first_position(draw.local_groups.start)
    groups = draw.group_of(np.arange(first, first + len(draw.sources))) - draw.local_groups.start
    return Ticket(
        torch.from_numpy(send_order).to(device),
        torch.from_numpy(arrival_order).to(device),
        tuple(int(count) for count in send),
        tuple(int(count) for count in receive),
        torch.from_numpy(groups).to(device),
        len(draw.local_groups),
        group,
    )


def move(x: Tensor, ticket: Ticket) -> Tensor:
    """Rows to where the ticket's groups meet, ordered by position."""
    rows = _Reorder.apply(x, ticket.send_order)
    rows = all_to_all_rows(rows, ticket.send, ticket.receive, ticket.process_group)
    return _Reorder.apply(rows, ticket.arrival_order)


def batch_shuffle(x: Tensor, *, generator: torch.Generator | None = None, group: Group = None) -> tuple[Tensor, Ticket]:
    """Permute the rows of all ranks' batches; each rank gets a random, balanced share.

    The concatenation over ranks of the outputs is a uniformly drawn permutation of the concatenation
    of the inputs; shares differ by at most one row. In one process it permutes the batch, which a
    batch norm over the whole batch does not notice: combine it with GhostBN, or use ShuffleBN.

    Across ranks: every rank must call it, with any number of rows (zero too), and must take the
    backward when any rank does. Row shapes and dtypes are the same on all ranks.
    Gradient: flows through; the backward is the inverse exchange.

    Args:
        x: (N, *) rows.
        generator: a CPU generator in the same state on every rank; by default one of leakfree's own,
            seeded alike everywhere, which advances with each call.

    Returns:
        (M, *) shuffled rows, and the ticket for :func:`batch_unshuffle`.

    Raises:
        RuntimeError: on every rank, when the ranks' generators disagree.
    """
    key = int(torch.randint(2**62, (), generator=generator or _DEFAULT_GENERATOR))
    draw = draw_groups(len(x), get_world_size(group), seed=key, index=0, group=group)
    ticket = make_ticket(draw, x.device, group)
    return move(x, ticket), ticket


def batch_unshuffle(x: Tensor, ticket: Ticket) -> Tensor:
    """Take rows home: the inverse of :func:`batch_shuffle`, for any per-row result of the shuffled rows.

    Args:
        x: (M, *) one row for each row that ``batch_shuffle`` returned, in its order.

    Returns:
        (N, *) rows on the rank and in the order in which they came; bitwise what was sent.

    Raises:
        ValueError: ``x`` has another number of rows than the shuffle returned.
    """
    if len(x) != len(ticket.arrival_order):
        raise ValueError(
            f"cannot unshuffle: the shuffle returned {len(ticket.arrival_order)} rows, this tensor has {len(x)}"
        )
    rows = _Reorder.apply(x, torch.argsort(ticket.arrival_order))
    rows = all_to_all_rows(rows, ticket.receive, ticket.send, ticket.process_group)
    return _Reorder.apply(rows, torch.argsort(ticket.send_order))
