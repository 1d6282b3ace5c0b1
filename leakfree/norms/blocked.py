"""The passes of a batch norm over the data: few reads of memory, no large temporaries.

A batch norm is bound by memory. Here each pass is one fused kernel of torch where there is one, else a
few operations on a cache-sized block at a time, so that their common buffer never reaches memory; half
precision is widened in the block. Devices other than the CPU take the whole tensor as one block.

Fresh memory can cost more than a pass over it (the system clears each page), and an allocator reuses the
last result's only while nothing small was put there. So results are allocated first (:meth:`Rows.room`), and
their memory serves as the buffer until they are made.

Legend: N rows, C channels, S positions of a row (H*W). Coefficients and sums are (N, C), or (1, C) for
all rows alike. Sums run over the positions of one row only, in float32 (float64 for float64 data). (torch's
channels-last kernels add thousands of values in float32 one after the other, which shows at 1e-6: unused here.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Rows",
    "affine",
    "deviation_sums",
    "gradient",
    "product_sums",
    "row_sums",
]

_BLOCK_BYTES = 1 << 20  # of a block's buffer, per thread
_LONG = 256  # positions from which a broadcast difference and its square are faster in one kernel


@dataclass(frozen=True)
class Rows:
    """A tensor (N, C, *) seen as (R, S, K) in the order of its memory.

    K is 1 and R = N * C where channels are contiguous; K = C and R = N where they come last. So (N, C)
    numbers, as (R, 1, K), broadcast against it without a copy in either layout.
    """

    values: Tensor  # (R, S, K), contiguous
    shape: torch.Size  # of the tensor
    channels_last: bool

    @staticmethod
    def of(x: Tensor) -> Rows:
        """View ``x``; a tensor that is dense in neither layout is copied. With one position, channels come last."""
        return Rows._view(x, x.shape[2:].numel() == 1 or x.movedim(1, -1).is_contiguous())

    @staticmethod
    def _view(x: Tensor, channels_last: bool) -> Rows:
        rows, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
        if channels_last:
            return Rows(x.movedim(1, -1).contiguous().view(rows, positions, channels), x.shape, True)
        return Rows(x.contiguous().view(rows * channels, positions, 1), x.shape, False)

    def match(self, other: Tensor) -> Rows:
        """View ``other``, of the same shape, in this layout; copied if it has another one."""
        return Rows._view(other, self.channels_last)

    def tensor(self, values: Tensor) -> Tensor:
        """(R, S, K), which is given away, -> (N, C, *) in this layout."""
        if self.channels_last:
            values = values.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)
        else:
            values = values.view(self.shape)
        return values.data  # not a view to autograd: the result may be changed in place (ReLU)

    @property
    def wide(self) -> torch.dtype:
        """The dtype to compute in."""
        return torch.float64 if self.values.dtype == torch.float64 else torch.float32

    @property
    def fused(self) -> bool:
        """Whether torch's batch norm kernels run on each row and channel as if it were a channel."""
        here = self.values.device.type == "cpu" and self.values.dtype == self.wide
        return here and not self.channels_last and self.values.numel() > 0

    def coefficient(self, numbers: Tensor) -> Tensor:
        """(N or 1, C) -> (R or 1, 1, K)"""
        if self.channels_last:
            return numbers.unsqueeze(1).expand(self.shape[0], 1, -1)
        return numbers.expand(self.shape[0], -1).reshape(-1, 1, 1)

    def per_channel(self, sums: Tensor) -> Tensor:
        """(R, K) -> (N, C)"""
        return sums.view(self.shape[0], self.shape[1])

    def room(self) -> Tensor:
        """Memory for a result, (R, S, K) in the dtype of the values; until it is made, a buffer for the passes."""
        return torch.empty_like(self.values)

    def zero_and_one(self) -> tuple[Tensor, Tensor]:
        """(R,) each: the statistics with which torch's kernels leave values as they are."""
        length = self.values.shape[0]
        return self.values.new_zeros(length), self.values.new_ones(length)

    def sums(self) -> Tensor:
        return torch.zeros(self.values.shape[0], self.values.shape[2], dtype=self.wide, device=self.values.device)

    def blocks(self, room: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, positions, scratch of their shape) of each block; the parts of a long row follow one another.

        The scratch lies in ``room`` if that has the dtype to compute in.
        """
        length, positions, depth = self.values.shape
        if not self.values.numel():
            return
        limit = _BLOCK_BYTES * torch.get_num_threads() // self.wide.itemsize
        limit = limit if self.values.device.type == "cpu" else self.values.numel()
        step = min(length, max(1, limit // (positions * depth)))
        part = min(positions, max(1, limit // depth)) if step == 1 else positions
        size = step * part * depth
        if room is not None and room.dtype == self.wide:
            scratch = room.view(-1)[:size]
        else:
            scratch = torch.empty(size, dtype=self.wide, device=self.values.device)
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            for first in range(0, positions, part):
                here = slice(first, min(first + part, positions))
                shape = (rows.stop - rows.start, here.stop - here.start, depth)
                yield rows, here, scratch[: shape[0] * shape[1] * shape[2]].view(shape)


def _add_sum(total: Tensor, rows: slice, here: slice, values: Tensor) -> None:
    """Add a block's sums over positions; the first part of a row needs no addition."""
    if here.start == 0:
        torch.sum(values, 1, dtype=total.dtype, out=total[rows])
    else:
        total[rows] += values.sum(1, dtype=total.dtype)


def row_sums(x: Rows) -> Tensor:
    """Sum over the positions of each row and channel: (N, C)."""
    return x.per_channel(x.values.sum(1, dtype=x.wide))


def deviation_sums(x: Rows, center: Tensor, *, squared: bool = False, room: Tensor | None = None) -> Tensor:
    """Sum over positions of ``x - center``, or of its square: (N, C)."""
    total, c = x.sums(), x.coefficient(center)
    in_one = squared and x.values.dtype == x.wide and (x.channels_last or x.values.shape[1] >= _LONG)
    for rows, here, block in x.blocks(room):
        if in_one:
            torch.ops.aten.mse_loss.out(x.values[rows, here], c[rows], 0, out=block)
        else:
            torch.sub(x.values[rows, here], c[rows], out=block)
            if squared:
                block.square_()
        _add_sum(total, rows, here, block)
    return x.per_channel(total)


def product_sums(dy: Rows, x: Rows, center: Tensor | None, *, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over positions of ``dy`` and of ``dy * (x - center)``: two (N, C). None is a center of 0."""
    if x.fused and dy.fused:
        mean, invstd = x.zero_and_one()
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            _as_channels(dy.values),
            _as_channels(x.values),
            *(None, None, None),  # weight, running statistics
            *(mean if center is None else x.coefficient(center).view(-1), invstd, True, 0.0),
            [False, True, True],
        )
        return x.per_channel(total), x.per_channel(product)
    total, product = x.sums(), x.sums()
    c = None if center is None else x.coefficient(center)
    for rows, here, block in x.blocks(room):
        _add_sum(total, rows, here, dy.values[rows, here])
        if c is None and x.values.dtype == x.wide:
            torch.mul(x.values[rows, here], dy.values[rows, here], out=block)
        else:
            _minus(x.values[rows, here], c, rows, block).mul_(dy.values[rows, here])
        _add_sum(product, rows, here, block)
    return x.per_channel(total), x.per_channel(product)


def _as_channels(values: Tensor) -> Tensor:
    """(R, S, 1) -> (1, R, S), for torch's kernels."""
    return values.view(1, values.shape[0], values.shape[1])


def _minus(values: Tensor, center: Tensor | None, rows: slice, out: Tensor) -> Tensor:
    return out.copy_(values) if center is None else torch.sub(values, center[rows], out=out)


class _Affine:
    """``(x - center) * scale + shift``, a block at a time. None is a center of 0."""

    def __init__(self, x: Rows, center: Tensor | None, scale: Tensor, shift: Tensor) -> None:
        self.x, self.a, self.b = x, x.coefficient(scale), x.coefficient(shift)
        self.c = None if center is None else x.coefficient(center)
        if x.fused:
            self.zero, self.one = x.zero_and_one()
            self.none = x.values.new_empty(0)

    def into(self, out: Tensor, rows: slice, here: slice) -> Tensor:
        """Compute a block in ``out``, of the block's shape and the dtype to compute in."""
        values = self.x.values[rows, here]
        if self.c is None and self.x.fused:
            torch.ops.aten.native_batch_norm.out(
                _as_channels(values),
                *(self.a[rows].view(-1), self.b[rows].view(-1), self.zero[rows], self.one[rows], False, 0.0, 0.0),
                out=_as_channels(out),
                save_mean=self.none,
                save_invstd=self.none,
            )
            return out
        if self.c is None and values.dtype == out.dtype:
            return torch.addcmul(self.b[rows], values, self.a[rows], out=out)
        return _minus(values, self.c, rows, out).mul_(self.a[rows]).add_(self.b[rows])


def affine(x: Rows, center: Tensor | None, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """``(x - center) * scale + shift`` in the dtype of ``x``, in ``out`` (R, S, K). None is a center of 0."""
    y = _Affine(x, center, scale, shift)
    if out.dtype == x.wide and center is None and out.numel():  # one kernel
        return y.into(out, slice(None), slice(None))
    for rows, here, block in x.blocks(out):
        target = out[rows, here] if out.dtype == x.wide else block
        y.into(target, rows, here)
        if target is block:
            out[rows, here] = block
    return out


def gradient(
    dy: Rows, x: Rows, center: Tensor | None, scale: Tensor, slope: Tensor, offset: Tensor, out: Tensor
) -> Tensor:
    """``dy * scale + (x - center) * slope + offset`` in the dtype of ``x``, in ``out`` (R, S, K).

    None is a center of 0.
    """
    dx, a = _Affine(x, center, slope, offset), x.coefficient(scale)
    for rows, here, block in x.blocks(out):
        target = out[rows, here] if out.dtype == x.wide else block
        dx.into(target, rows, here).addcmul_(dy.values[rows, here].to(x.wide), a[rows])
        if target is block:
            out[rows, here] = block
    return out
