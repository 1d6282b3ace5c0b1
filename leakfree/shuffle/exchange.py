"""Moving rows to random ranks and back: the differentiable batch shuffle.

Between the shuffle and the unshuffle a row computes among random companions. Each row crosses the
wire once per direction (an uneven all-to-all), against ``world_size`` times in the all-gather shuffle
of MoCo (He et al. 2020, section 3.3) and of detectron2's RoI shuffle (Wu & Johnson 2021, section 6).
The permutation comes from a seed that all ranks share, so none is sent. All tensors of a nest travel in
one exchange, and so do their gradients.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leakfree.distributed import Group, all_gather_table, all_to_all_bytes, get_rank, get_world_size
from leakfree.recomputation import recomputing
from leakfree.shuffle.nest import replace_tensors, tensors_of
from leakfree.shuffle.plan import GroupDraw

__all__ = ["Ticket", "batch_shuffle", "batch_unshuffle", "draw_groups", "make_ticket", "shuffle_nest", "unshuffle_nest"]

_DEFAULT_GENERATOR = torch.Generator().manual_seed(0)
_CHANNELS_FIRST, _CHANNELS_LAST, _EITHER = 0, 1, 2
_told: set[str] = set()


@dataclass(frozen=True, eq=False)
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
    channels_last: bool = False  # how rows of images lie on the wire: alike on all ranks
    differentiable: bool = True  # whether any rank wants the gradient
    thread: Tensor | None = None  # ties the way home to the way out in the graph: see _Move

    @property
    def num_rows(self) -> int:
        """Rows that meet on this rank."""
        return len(self.arrival_order)

    @cached_property
    def departure_order(self) -> Tensor:
        """Inverse of ``arrival_order``: sorts the rows that met here by the rank they came from."""
        return torch.argsort(self.arrival_order)

    @cached_property
    def home_order(self) -> Tensor:
        """Inverse of ``send_order``: the rows that came home, in the order in which they left."""
        return torch.argsort(self.send_order)


def draw_groups(
    num_rows: int,
    num_groups: int | None,
    *,
    seed: int,
    index: int,
    base_groups: int | None = None,
    balance: bool = True,
    facts: Sequence[int] = (),
    group: Group = None,
) -> tuple[GroupDraw, Tensor]:
    """Draw random groups over the rows of all ranks; one small collective for the sizes.

    Args:
        num_rows: rows on this rank, zero included.
        num_groups: groups over all ranks; None takes the sum over ranks of ``base_groups`` or, where
            that is None, the world size, at least 2.
        seed, index, balance: the same on every rank; see :class:`GroupDraw`.
        facts: further numbers to tell the other ranks, equally many on each.

    Returns:
        The draw, and the facts of every rank, int64 (world size, len(facts)).

    Raises:
        RuntimeError: on every rank, when ranks disagree on the seed or the count of draws; going on
            would send rows astray.
        ValueError: a seed that does not fit in 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    shared = [seed, index, num_groups or 0, int(balance)]
    table = all_gather_table([num_rows, base_groups or 0, *shared, *facts], group)
    agreed = table[:, 2 : 2 + len(shared)]
    if bool((agreed != agreed[:1]).any()):
        raise RuntimeError(
            f"ranks drew different shuffles (seed, draw, num_groups, balance per rank: {agreed.tolist()}): "
            "every rank must shuffle equally often, with one seed"
        )
    if num_groups is None:
        num_groups = int(table[:, 1].sum()) or max(2, len(table))
    draw = GroupDraw(table[:, 0].numpy(), get_rank(group), num_groups, seed, index, balance)
    return draw, table[:, 2 + len(shared) :]


def make_ticket(
    draw: GroupDraw, device: torch.device, group: Group, *, channels_last: bool = False, differentiable: bool = True
) -> Ticket:
    """Turn a draw into the two reorderings and the sizes of one exchange."""
    destination = draw.rank_of_group(draw.groups)
    send_order = np.argsort(destination, kind="stable")
    # Rows arrive by rank and, within a rank, in their order there: by row number.
    departure_order = np.argsort(draw.sources)
    arrival_order = np.empty_like(departure_order)
    arrival_order[departure_order] = np.arange(len(departure_order))
    groups = draw.group_of(draw.local_positions) - draw.local_groups.start
    return Ticket(
        torch.from_numpy(send_order).to(device),
        torch.from_numpy(arrival_order).to(device),
        tuple(np.bincount(destination, minlength=draw.world_size).tolist()),
        tuple(np.bincount(draw.rank_of_row(draw.sources), minlength=draw.world_size).tolist()),
        torch.from_numpy(groups).to(device),
        len(draw.local_groups),
        group,
        channels_last,
        differentiable,
    )


def _layout(tensor: Tensor) -> int:
    if tensor.ndim < 4 or not tensor.numel():
        return _EITHER
    if tensor.movedim(1, -1).is_contiguous():
        return _EITHER if tensor.is_contiguous() else _CHANNELS_LAST  # one channel, or one pixel
    return _CHANNELS_FIRST


def facts_of(found: Sequence[tuple[str, Tensor]], gradient: bool) -> list[int]:
    """What ranks must agree on before tensors travel: a fingerprint, the layout, whether gradients come back."""
    tensors = [tensor for _, tensor in found]
    kinds = [(path, str(tensor.dtype), tuple(tensor.shape[1:])) for path, tensor in found]
    layouts = {_layout(tensor) for tensor in tensors} - {_EITHER}
    layout = min(layouts, default=_EITHER)  # channels first where there are both
    return [zlib.crc32(repr(kinds).encode()), layout, int(gradient or any(tensor.requires_grad for tensor in tensors))]


def agree(facts: Tensor, found: Sequence[tuple[str, Tensor]]) -> tuple[bool, bool]:
    """(channels last, differentiable) for all ranks, from their :func:`facts_of`.

    Raises:
        ValueError: on every rank, when the tensors differ in number, dtype or row shape.
    """
    if bool((facts[:, 0] != facts[0, 0]).any()):
        here = ", ".join(f"{path} {tuple(tensor.shape)} {tensor.dtype}" for path, tensor in found)
        raise ValueError(f"ranks shuffle tensors of different names, dtypes or row shapes; on this rank: {here}")
    layouts = set(facts[:, 1].tolist())
    return _CHANNELS_LAST in layouts and _CHANNELS_FIRST not in layouts, bool(facts[:, 2].any())


def _row_bytes(tensor: Tensor, channels_last: bool) -> Tensor:
    """(N, *) as uint8 (N, bytes of a row), a view where the layout is that of the wire."""
    if channels_last and tensor.ndim > 3:
        tensor = tensor.movedim(1, -1)
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # of an expanded or an empty tensor, which counts as contiguous all the same
        flat = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device).copy_(flat)
    return flat.view(torch.uint8).view(len(tensor), tensor.shape[1:].numel() * tensor.element_size())


def _rows_like(tensor: Tensor, num_rows: int, channels_last: bool) -> Tensor:
    """Room for ``num_rows`` rows like those of ``tensor``, in the layout of the wire."""
    if channels_last and tensor.ndim > 3:
        # `data`: not a view to autograd, so that the result may be changed in place
        return tensor.new_empty(num_rows, *tensor.shape[2:], tensor.shape[1]).movedim(-1, 1).data
    return tensor.new_empty(num_rows, *tensor.shape[1:])


def _gather_bytes(source: Tensor, order: Tensor, out: Tensor) -> None:
    """``out[:] = source[order]`` for uint8 rows, in the widest words that both sides' alignment allows."""
    if not out.numel():
        return
    step = math.gcd(source.shape[1], source.stride(0), out.stride(0), source.storage_offset(), out.storage_offset(), 8)
    word = {8: torch.int64, 4: torch.int32}.get(step, torch.uint8)
    torch.index_select(source.view(word), 0, order, out=out.view(word))


def _exchange(tensors: Sequence[Tensor], ticket: Ticket, back: bool) -> list[Tensor]:
    """Move the rows of all tensors in one all-to-all: to where they meet, or ``back`` home."""
    send, receive = (ticket.receive, ticket.send) if back else (ticket.send, ticket.receive)
    pack, unpack = (ticket.departure_order, ticket.home_order) if back else (ticket.send_order, ticket.arrival_order)
    sources = [_row_bytes(tensor, ticket.channels_last) for tensor in tensors]
    if len(send) == 1:  # in one process the two orders are one
        return [_gather(source, pack[unpack], like, ticket) for source, like in zip(sources, tensors, strict=True)]
    # One row of the wire holds that row of every tensor, each at a multiple of 8 bytes where there are several.
    widths = [source.shape[1] for source in sources]
    ends = list(accumulate(widths if len(widths) == 1 else (-(-width // 8) * 8 for width in widths)))
    starts = [0, *ends]
    size = starts.pop()
    wire = torch.empty(len(pack), size, dtype=torch.uint8, device=ticket.send_order.device)
    for source, width, start in zip(sources, widths, starts, strict=True):
        _gather_bytes(source, pack, wire[:, start : start + width])
    leaving, coming = ([count * size for count in counts] for counts in (send, receive))
    came = all_to_all_bytes(wire.view(-1), leaving, coming, ticket.process_group).view(len(unpack), size)
    del wire  # before the results are made: one buffer less at the peak
    return [
        _gather(came[:, start : start + width], unpack, like, ticket)
        for like, width, start in zip(tensors, widths, starts, strict=True)
    ]


def _gather(source: Tensor, order: Tensor, like: Tensor, ticket: Ticket) -> Tensor:
    """Rows of bytes, in that order, as a tensor with rows like those of ``like``."""
    out = _rows_like(like, len(order), ticket.channels_last)
    _gather_bytes(source, order, _row_bytes(out, ticket.channels_last))
    return out


class _Move(torch.autograd.Function):
    """The exchange; the gradients of all float tensors take the inverse one, together.

    ``anchor`` makes the outputs require grad on every rank, so that all ranks take the backward even if
    the rows of some need no gradient. The last output is the anchor of the way home: so the graph leads from
    there to the way out even if what lies between is cut off on some ranks (a head's zeros for no rows).
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor | None, ticket: Ticket, back: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = _exchange(tensors, ticket, back)
        ctx.ticket, ctx.back = ticket, back
        ctx.floats = [tensor.is_floating_point() or tensor.is_complex() for tensor in tensors]
        ctx.mark_non_differentiable(*(item for item, real in zip(out, ctx.floats, strict=True) if not real))
        return (*out, torch.zeros(()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        moving = [gradient for gradient, real in zip(gradients[:-1], ctx.floats, strict=True) if real]
        home = iter(_exchange(moving, ctx.ticket, not ctx.back))
        return (None, None, None, *(next(home) if real else None for real in ctx.floats))


def _move(nest: Any, tensors: Sequence[Tensor], ticket: Ticket, back: bool, gradient: bool) -> tuple[Any, Tensor]:
    anchor = None
    if gradient and torch.is_grad_enabled() and any(t.is_floating_point() or t.is_complex() for t in tensors):
        anchor = ticket.thread if back else None
        if anchor is None or not anchor.requires_grad:
            anchor = torch.zeros((), requires_grad=True)
    # without the thread: the graph must not hold itself
    *out, thread = _Move.apply(anchor, replace(ticket, thread=None), back, *tensors)
    return replace_tensors(nest, iter(out)), thread


@torch.compiler.disable
def shuffle_nest(nest: Any, ticket: Ticket) -> tuple[Any, Ticket]:
    """Every tensor's rows to where the ticket's groups meet, ordered by position, in one exchange; the way home."""
    tensors = [tensor for _, tensor in tensors_of(nest, "input")]
    met, thread = _move(nest, tensors, ticket, False, ticket.differentiable)
    return met, replace(ticket, thread=thread)


@torch.compiler.disable
def unshuffle_nest(nest: Any, ticket: Ticket, gradient: bool = False) -> Any:
    """The inverse of :func:`shuffle_nest`, for any per-row results of the shuffled rows.

    Args:
        gradient: whether the results of any rank may need one even if the shuffled rows did not.

    Raises:
        ValueError: a tensor with another number of rows than the shuffle returned, by its path.
    """
    found = tensors_of(nest, "output")
    for path, tensor in found:
        if tensor.ndim == 0 or len(tensor) != ticket.num_rows:
            raise ValueError(
                f"cannot unshuffle {path} of shape {tuple(tensor.shape)}: the shuffle returned {ticket.num_rows} rows"
            )
    tensors = [tensor for _, tensor in found]
    gradient = gradient or ticket.differentiable or any(tensor.requires_grad for tensor in tensors)
    return _move(nest, tensors, ticket, True, gradient)[0]


@torch.compiler.disable  # integers on the host, and a collective
def batch_shuffle(
    x: Any, *, generator: torch.Generator | None = None, group: Group = None, balance: bool = True
) -> tuple[Any, Ticket]:
    """Permute the rows of all ranks' batches; each rank gets a random share.

    The concatenation over ranks of the outputs is a uniformly drawn permutation of the concatenation
    of the inputs. In one process it permutes the batch, which a batch norm over the whole batch does not
    notice (it says so once): combine it with GhostBN, or use ShuffleBN.

    Across ranks: every rank must call it, with any number of rows (zero too), and must take the
    backward when any rank does. Rows have the same shapes and dtypes on all ranks. Each row crosses the
    wire at most once: (W-1)/W of this rank's bytes for W ranks, in one exchange for all tensors, after
    one collective of a few numbers for the sizes.
    Gradient: flows through every float tensor; the backward is the inverse exchange.

    Args:
        x: a tensor (N, *) or tensors of N rows nested in tuples, lists and dicts.
        generator: a CPU generator in the same state on every rank; by default one of leakfree's own,
            seeded alike everywhere, which advances with each call.
        group: the ranks to shuffle over; "node" keeps rows on their machine.
        balance: shares differ by at most one row. Otherwise each rank gets as many rows as it gave.

    Returns:
        The same nest with M shuffled rows, channels last if the inputs were, and the ticket for
        :func:`batch_unshuffle`.

    Raises:
        RuntimeError: on every rank, when the ranks' generators disagree.
        ValueError: on every rank, when dtypes or row shapes differ between ranks; tensors with different
            numbers of rows, or none.
    """
    if recomputing():
        raise RuntimeError(
            "batch_shuffle runs inside a backward (activation checkpointing), where it would draw another permutation "
            "than in the forward: keep it out of the checkpointed part, or use Shuffled, which repeats its draw"
        )
    world_size = get_world_size(group)
    if world_size == 1 and "alone" not in _told:
        _told.add("alone")
        warnings.warn(
            "batch_shuffle over one rank only permutes its batch, which a batch norm over the whole batch does not "
            "notice: put GhostBN behind it, or use ShuffleBN or Shuffled with num_groups >= 2",
            stacklevel=3,  # over the decorator
        )
    found = tensors_of(x, "input")
    num_rows = count_rows(found)
    key = int(torch.randint(2**62, (), generator=generator or _DEFAULT_GENERATOR))
    tensors = [tensor for _, tensor in found]
    draw, facts = draw_groups(
        num_rows, world_size, seed=key, index=0, balance=balance, facts=facts_of(found, False), group=group
    )
    channels_last, differentiable = agree(facts, found)
    ticket = make_ticket(draw, tensors[0].device, group, channels_last=channels_last, differentiable=differentiable)
    return shuffle_nest(x, ticket)


@torch.compiler.disable
def batch_unshuffle(x: Any, ticket: Ticket) -> Any:
    """Take rows home: the inverse of :func:`batch_shuffle`, for any per-row results of the shuffled rows.

    Args:
        x: a tensor (M, *), or a nest of them, with one row for each row that ``batch_shuffle`` returned,
            in its order.

    Returns:
        The same nest with N rows, on the rank and in the order in which they came; bitwise what was sent.

    Raises:
        ValueError: a tensor with another number of rows than the shuffle returned, by its path.
    """
    # What lies between may have weights, and a rank without rows may have skipped it.
    return unshuffle_nest(x, ticket, gradient=len(ticket.send) > 1)


def count_rows(found: Sequence[tuple[str, Tensor]]) -> int:
    """The number of rows that all the tensors have.

    Raises:
        ValueError: no tensor, or tensors that differ.
    """
    if not found:
        raise ValueError("nothing to shuffle: no tensor among the inputs")
    sizes = {path: len(tensor) if tensor.ndim else 0 for path, tensor in found}
    if len(set(sizes.values())) != 1 or any(tensor.ndim == 0 for _, tensor in found):
        raise ValueError(f"inputs to shuffle must have the same number of rows, got {sizes}")
    return sizes[found[0][0]]
