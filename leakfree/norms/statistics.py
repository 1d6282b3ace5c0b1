"""Moments of groups of rows, and the normalization with them: the arithmetic of every batch norm here.

Legend: N rows of this rank, C channels, S positions of a row (H*W), G groups.
Rows are summed in the precision of ``blocked``, everything across rows in float64, about the group's
mean, so that neither a large mean nor many ranks cancel the variance. The wire carries G*(2C+1) numbers
forward and G*2C backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakfree.distributed import all_reduce_sum_
from leakfree.norms.blocked import (
    Rows,
    affine,
    deviation_sums,
    gradient,
    product_sums,
    row_sums,
)
from leakfree.partition import Partition

__all__ = ["Moments", "group_moments", "partitioned_batch_norm"]

# Up to this |mean| / std, ``x * scale + shift`` is as exact as ``(x - mean) * scale`` to float32's 1e-6, and cheaper.
_NEAR_ZERO = 8.0
_FEW_GROUPS = 32  # up to which a kernel per group is worth its launches


@dataclass(frozen=True)
class Moments:
    """Per-group moments over rows and positions, float64, over all ranks the partition spans."""

    count: Tensor  # (G,) values per channel
    mean: Tensor  # (G, C)
    var: Tensor  # (G, C) biased

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean (C,), biased variance (C,)) of all groups together (methods: pooled estimator)."""
        total = self.count.sum()
        weight = self.count / total.clamp(min=1)
        mean = weight @ self.mean
        return total, mean, weight @ torch.addcmul(self.var, self.mean - mean, self.mean - mean)


def sum_groups(values: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """Sum (N, C) rows into (G, C), in float64."""
    if groups is None:
        return values.sum(0, keepdim=True, dtype=torch.float64)
    total = torch.zeros(num_groups, values.shape[1], dtype=torch.float64, device=values.device)
    return total.index_add_(0, groups, values.double())


def spread_groups(groups: Tensor | None, dtype: torch.dtype, *numbers: Tensor) -> list[Tensor]:
    """Each (G, C) -> (N or 1, C) in ``dtype``."""
    tables = (table.to(dtype) for table in numbers)
    return [table if groups is None else table.index_select(0, groups) for table in tables]


def is_near_zero(mean: Tensor, var: Tensor) -> bool:
    """Whether no channel of any group is far from 0; False where asking would wait for the device."""
    return mean.device.type == "cpu" and bool((mean * mean <= _NEAR_ZERO**2 * var).all())


def group_moments(x: Tensor, partition: Partition) -> Moments:
    """Moments of each group of the rows of ``x`` (N, C, *); one all-reduce if the partition spans ranks."""
    return _moments(Rows.of(x.detach()), partition)


def _moments(x: Rows, partition: Partition, *, room: Tensor | None = None) -> Moments:
    moments = _local_moments(x, partition.groups, partition.num_groups, room)
    if not partition.synchronized:
        return moments
    weight, mean, var = moments.count[:, None], moments.mean, moments.var
    packed = torch.cat([weight, weight * mean, weight * torch.addcmul(var, mean, mean)], dim=1)
    all_reduce_sum_(packed, partition.process_group)
    count = packed[:, 0]
    mean, square = (packed[:, 1:] / count.clamp(min=1)[:, None]).chunk(2, dim=1)
    return Moments(count, mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0))


def _local_moments(x: Rows, groups: Tensor | None, num_groups: int, room: Tensor | None) -> Moments:
    """Moments of this rank's rows, from sums over each row about the group's mean."""
    totals = sum_groups(row_sums(x), groups, num_groups)
    rows = totals.new_full((1,), x.shape[0]) if groups is None else torch.bincount(groups, minlength=num_groups)
    count = rows.double() * x.shape[2:].numel()
    share = count.clamp(min=1).reciprocal_()[:, None]
    mean = totals * share
    center = mean.to(x.wide)  # any number near the mean would do
    (row_center,) = spread_groups(groups, x.wide, center)
    var = sum_groups(deviation_sums(x, row_center, squared=True, room=room), groups, num_groups) * share
    if is_near_zero(mean, var):  # the rounding of the center is nothing beside the deviations
        return Moments(count, mean, var)
    # Here the rounding of the sums themselves would show: they are taken again, about the center.
    shift = sum_groups(deviation_sums(x, row_center, room=room), groups, num_groups) * share
    return Moments(count, center + shift, torch.addcmul(var, shift, shift, value=-1).clamp_(min=0))


class _Normalize(torch.autograd.Function):
    """y = weight * (x - mean_g) / sqrt(var_g + eps) + bias with the batch's own group moments.

    The gradient goes through the moments, over all ranks the groups span. Gradients of weight and
    bias are this rank's share, as data-parallel training expects.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, partition: Partition, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = Rows.of(x)
        room = rows.room()  # before anything else is allocated: see ``blocked``
        moments = _moments(rows, partition, room=room)
        spread = moments.var + eps
        near = is_near_zero(moments.mean, spread)
        invstd = spread.rsqrt_()
        scale = invstd if weight is None else invstd * weight.double()
        if near:  # the data's own 0 is the center, and the mean is the distance to it
            center, distance = None, moments.mean
        else:
            center = moments.mean.to(rows.wide)
            distance = moments.mean - center
        shift = distance * -scale if bias is None else torch.addcmul(bias.double(), distance, scale, value=-1)
        a, b, *c = spread_groups(partition.groups, rows.wide, scale, shift, *([] if center is None else [center]))
        y = rows.tensor(affine(rows, c[0] if c else None, a, b, room))
        ctx.save_for_backward(x, center, distance, invstd, scale, moments.count)
        ctx.partition = partition
        ctx.affine = [None if table is None else (table.dtype, table.ndim) for table in (weight, bias)]
        ctx.mark_non_differentiable(moments.count, moments.mean, moments.var)
        return y, moments.count, moments.mean, moments.var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, center, distance, invstd, scale, count = ctx.saved_tensors
        partition: Partition = ctx.partition
        groups, num_groups = partition.groups, partition.num_groups
        rows = Rows.of(x)
        dy_rows = rows.match(dy)
        room = rows.room() if ctx.needs_input_grad[0] else None
        row_center = None if center is None else spread_groups(groups, rows.wide, center)[0]
        sums = torch.cat(product_sums(dy_rows, rows, row_center, room=room), dim=1)
        total, product = sum_groups(sums, groups, num_groups).chunk(2, dim=1)
        product = torch.addcmul(product, distance, total, value=-1).mul_(invstd)  # sum of dy * xhat
        weight_grad, bias_grad = (
            None if kind is None else (of_groups if kind[1] == 2 else of_groups.sum(0)).to(kind[0])
            for of_groups, kind in zip((product, total), ctx.affine, strict=True)
        )
        if partition.synchronized:  # also where x needs no gradient here: an empty rank's may differ from the others'
            sums = torch.cat([total, product], dim=1)
            all_reduce_sum_(sums, partition.process_group)
            total, product = sums.chunk(2, dim=1)
        dx = None
        if room is not None:
            share = scale / count.clamp(min=1)[:, None]
            slope = (share * product).mul_(invstd).neg_()
            offset = torch.addcmul(share * total, slope, distance).neg_()
            a, k, b = spread_groups(groups, rows.wide, scale, slope, offset)
            dx = rows.tensor(gradient(dy_rows, rows, row_center, a, k, b, room))
        return dx, weight_grad, bias_grad, None, None


def _fused_is_faster(x: Tensor, partition: Partition) -> bool:
    return x.device.type != "cpu" and x.dtype != torch.float64 and partition.num_groups <= _FEW_GROUPS and len(x) > 0


def chunked_batch_norm(
    x: Tensor, sizes: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """:func:`partitioned_batch_norm` of consecutive groups of this rank, each by torch's fused kernel.

    The faster way where those kernels are faster than ``blocked``: on GPUs, as long as groups are few.
    ``weight`` and ``bias`` are (C,) or None.
    """
    outputs, means, variances = [], [], []
    empty = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(list(sizes)):
        mean = var = empty
        if len(chunk):
            chunk, mean, invstd = torch.native_batch_norm(chunk, weight, bias, None, None, True, 0.0, eps)
            mean, var = mean.detach().double(), (invstd.detach().double() ** -2 - eps).clamp(min=0)
        outputs.append(chunk)
        means.append(mean)
        variances.append(var)
    count = torch.tensor(list(sizes), dtype=torch.float64, device=x.device) * x.shape[2:].numel()
    return torch.cat(outputs), Moments(count, torch.stack(means), torch.stack(variances))


@torch.compiler.disable  # blocks and collectives: nothing a compiler would fuse better
def partitioned_batch_norm(
    x: Tensor, partition: Partition, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Moments]:
    """Normalize each group of ``partition`` with its own biased moments.

    ``y = weight * (x - mean_g) / sqrt(var_g + eps) + bias`` for a row of group g (Ioffe & Szegedy 2015,
    algorithm 1, with "mini-batch" read as "group"). Equals torch's batch norm run on each group.

    Across ranks: if the partition spans ranks, one all-reduce forward and one backward; every rank
    calls it, and takes the backward if any does, empty ranks too.

    Args:
        x: (N, C, *), any floating dtype, contiguous or channels last (the result is the same); rows are
            summed in float32 (float64 for float64), everything else in float64; the result has x's dtype.
        weight, bias: (C,), or (G, C) for an affine map of each group, or None.

    Returns:
        y like ``x``, and the moments (not differentiable).
    """
    if partition.chunks is not None and _fused_is_faster(x, partition) and (weight is None or weight.ndim == 1):
        return chunked_batch_norm(x, partition.chunks, weight, bias, eps)
    y, count, mean, var = _Normalize.apply(x, weight, bias, partition, eps)
    return y, Moments(count, mean, var)
