"""The passes of a batch norm over the data: few reads of memory, no large temporaries.

A batch norm is bound by memory. Here each pass is one fused kernel of torch where there is one, else a
few operations on a cache-sized block at a time, so that their common buffer never reaches memory; half
precision is widened in the block. Devices other than the CPU take the whole tensor as one block.

Legend: N rows, C channels, S positions of a row (H*W). Coefficients and sums are (N, C), or (1, C) for
all rows alike. Sums run over the positions of one row only, in float32 (float64 for float64 data). (torch's
channels-last kernels add thousands of values in float32 one after the other, which shows at 1e-6: unused here.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    def as_channels(self, values: Tensor) -> Tensor:
        """(R, S, 1) -> (1, R, S), for torch's kernels."""
        return values.view(1, values.shape[0], values.shape[1])

    def coefficient(self, numbers: Tensor) -> Tensor:
        """(N or 1, C) -> (R or 1, 1, K)"""
        if self.channels_last:
            return numbers.unsqueeze(1).expand(self.shape[0], 1, -1)
        return numbers.expand(self.shape[0], -1).reshape(-1, 1, 1)

    def per_channel(self, sums: Tensor) -> Tensor:
        """(R, K) -> (N, C)"""
        return sums.view(self.shape[0], self.shape[1])

    def room_for_sums(self) -> Tensor:
        return torch.zeros(self.values.shape[0], self.values.shape[2], dtype=self.wide, device=self.values.device)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, positions, scratch of their shape) of each block; the parts of a long row follow one another."""
        length, positions, depth = self.values.shape
        if not self.values.numel():
            return
        limit = _BLOCK_BYTES * torch.get_num_threads() // self.wide.itemsize
        limit = limit if self.values.device.type == "cpu" else self.values.numel()
        step = min(length, max(1, limit // (positions * depth)))
        part = min(positions, max(1, limit // depth)) if step == 1 else positions
        scratch = torch.empty(step * part * depth, dtype=self.wide, device=self.values.device)
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


def deviation_sums(x: Rows, center: Tensor, *, squared: bool = False) -> Tensor:
    """Sum over positions of ``x - center``, or of its square: (N, C)."""
    total, c = x.room_for_sums(), x.coefficient(center)
    for rows, here, block in x.blocks():
        deviation = torch.sub(x.values[rows, here], c[rows], out=block)
        _add_sum(total, rows, here, deviation.square_() if squared else deviation)
    return x.per_channel(total)


def product_sums(dy: Rows, x: Rows, center: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over positions of ``dy`` and of ``dy * (x - center)``: two (N, C). None is a center of 0."""
    if x.fused and dy.fused:
        length = x.values.shape[0]
        mean = x.values.new_zeros(length) if center is None else x.coefficient(center).view(length)
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            dy.as_channels(dy.values),
            x.as_channels(x.values),
            *(None, None, None),  # weight, running statistics
            *(mean, torch.ones_like(mean), True, 0.0),
            [False, True, True],
        )
        return x.per_channel(total), x.per_channel(product)
    total, product = x.room_for_sums(), x.room_for_sums()
    c = None if center is None else x.coefficient(center)
    for rows, here, block in x.blocks():
        _add_sum(total, rows, here, dy.values[rows, here])
        if c is None and x.values.dtype == x.wide:
            torch.mul(x.values[rows, here], dy.values[rows, here], out=block)
        else:
            _minus(x.values[rows, here], c, rows, block).mul_(dy.values[rows, here])
        _add_sum(product, rows, here, block)
    return x.per_channel(total), x.per_channel(product)


def _minus(values: Tensor, center: Tensor | None, rows: slice, out: Tensor) -> Tensor:
    return out.copy_(values) if center is None else torch.sub(values, center[rows], out=out)


def affine(x: Rows, center: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """``(x - center) * scale + shift`` in the dtype of ``x``: (R, S, K). None is a center of 0."""
    a, b = x.coefficient(scale), x.coefficient(shift)
    if center is None and x.fused:
        length = x.values.shape[0]
        zero, one = x.values.new_zeros(length), x.values.new_ones(length)
        y = F.batch_norm(x.as_channels(x.values), zero, one, a.view(length), b.view(length), False, 0.0, 0.0)
        return y.view(x.values.shape)
    if center is None and x.values.dtype == x.wide:
        return torch.addcmul(b, x.values, a)
    y = torch.empty_like(x.values)
    c = None if center is None else x.coefficient(center)
    for rows, here, block in x.blocks():
        y[rows, here] = _minus(x.values[rows, here], c, rows, block).mul_(a[rows]).add_(b[rows])
    return y


def gradient(dy: Rows, x: Rows, center: Tensor | None, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``dy * scale + (x - center) * slope + offset`` in the dtype of ``x``: (R, S, K). None is a center of 0."""
    a = x.coefficient(scale)
    if center is None and x.values.dtype == x.wide:
        return affine(x, None, slope, offset).addcmul_(dy.values.to(x.wide), a)
    dx = torch.empty_like(x.values)
    c = None if center is None else x.coefficient(center)
    k, b = x.coefficient(slope), x.coefficient(offset)
    for rows, here, block in x.blocks():
        _minus(x.values[rows, here], c, rows, block).mul_(k[rows]).add_(b[rows])
        dx[rows, here] = block.addcmul_(dy.values[rows, here].to(block.dtype), a[rows])
    return dx
