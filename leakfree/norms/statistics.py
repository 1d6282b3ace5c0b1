"""Moments of groups of rows, and the normalization with them: the arithmetic of every batch norm here.

Legend: N rows of this rank, C channels, S positions of a row (H*W), G groups.
Moments are accumulated in float64 from numerically sound per-row moments, so that neither a large
mean nor many ranks cancel the variance; the wire carries G*(2C+1) numbers forward and G*2C backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leakfree.partition import Partition

__all__ = ["Moments", "group_moments", "partitioned_batch_norm"]


@dataclass(frozen=True)
class Moments:
    """Per-group moments over rows and positions, float64, over all ranks the partition spans."""

    count: Tensor  # (G,) values per channel
    mean: Tensor  # (G, C)
    var: Tensor  # (G, C) biased

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean (C,), biased variance (C,)) of all groups together (methods: pooled estimator)."""
        total = self.count.sum()
        weight = (self.count / total.clamp(min=1))[:, None]
        mean = (weight * self.mean).sum(0)
        var = (weight * (self.var + (self.mean - mean) ** 2)).sum(0)
        return total, mean, var


def _row_view(x: Tensor) -> Tensor | None:
    """x as (1, N*C, S) without a copy, or None: each row's channel becomes a channel of torch's kernels."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        return None
    return x.view(1, x.shape[0] * x.shape[1], -1) if x.numel() and x.ndim > 2 else None


# Above this |mean| / std, rounding a row's mean to float32 shows in the variance between rows (> 1e-7).
_FAR_FROM_ZERO = 100.0


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) over the positions of each row and channel: two float64 (N, C)."""
    if x.ndim == 2 or x.shape[2:].numel() == 1 or not len(x):
        mean = x.reshape(x.shape[0], x.shape[1], -1)[:, :, 0].double() if len(x) else x.new_zeros(x.shape[:2]).double()
        return mean, torch.zeros_like(mean)
    rows, dims = _row_view(x), tuple(range(2, x.ndim))
    if rows is not None:  # torch's fused kernel: one sound pass, float64 inside
        mean, var = torch.batch_norm_update_stats(rows, None, None, 0.0)
    else:
        var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), dims, correction=0)
    mean, var = mean.view(x.shape[:2]).double(), var.view(x.shape[:2]).double()
    if x.dtype != torch.float64 and (x.device.type != "cpu" or (mean.abs() > _FAR_FROM_ZERO * var.sqrt()).any()):
        mean = x.sum(dims, dtype=torch.float64) / x.shape[2:].numel()
    return mean, var


def _sum_rows(values: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """Sum (N, C) rows into (G, C)."""
    if groups is None:
        return values.sum(0, keepdim=True)
    return values.new_zeros(num_groups, values.shape[1]).index_add_(0, groups, values)


def group_moments(x: Tensor, partition: Partition) -> tuple[Moments, Tensor]:
    """Moments of each group, and this rank's row means (float64 (N, C)) for the backward."""
    row_mean, row_var = _row_moments(x)
    groups, num_groups = partition.groups, partition.num_groups
    positions = x.shape[2:].numel()
    rows = (
        row_mean.new_full((1,), len(x))
        if groups is None
        else torch.bincount(groups, minlength=num_groups).to(row_mean.dtype)
    )
    count = rows * positions
    mean = _sum_rows(row_mean, groups, num_groups) / rows.clamp(min=1)[:, None]
    spread = row_mean - (mean if groups is None else mean[groups])
    var = _sum_rows(row_var + spread * spread, groups, num_groups) / rows.clamp(min=1)[:, None]
    if partition.synchronized:
        weight = count[:, None]
        packed = torch.cat([count[:, None], weight * mean, weight * (var + mean * mean)], dim=1)
        dist.all_reduce(packed, group=partition.process_group)
        count = packed[:, 0]
        mean, square = (packed[:, 1:] / count.clamp(min=1)[:, None]).chunk(2, dim=1)
        var = (square - mean * mean).clamp(min=0)
    return Moments(count, mean, var), row_mean


def _spread(coefficient: Tensor, groups: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, C) float64 -> (N or 1, C, 1, ...) in ``dtype``, ready to broadcast against ``like``."""
    rows = coefficient.to(dtype) if groups is None else coefficient.to(dtype)[groups]
    return rows.reshape(*rows.shape, *([1] * (like.ndim - 2)))


class _Normalize(torch.autograd.Function):
    """y = weight * (x - mean_g) / sqrt(var_g + eps) + bias with the batch's own group moments.

    The gradient goes through the moments, over all ranks the groups span. Gradients of weight and
    bias are this rank's share, as data-parallel training expects.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, partition: Partition, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        moments, row_mean = group_moments(x, partition)
        invstd = torch.rsqrt(moments.var + eps)
        scale = invstd if weight is None else invstd * weight.double()
        shift = -moments.mean * scale if bias is None else bias.double() - moments.mean * scale
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        groups = partition.groups
        y = torch.addcmul(_spread(shift, groups, x, dtype), x.to(dtype), _spread(scale, groups, x, dtype)).to(x.dtype)
        ctx.save_for_backward(x, weight, moments.mean, invstd, moments.count, row_mean)
        ctx.partition = partition
        ctx.affine_dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(moments.count, moments.mean, moments.var)
        return y, moments.count, moments.mean, moments.var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, count, row_mean = ctx.saved_tensors
        partition: Partition = ctx.partition
        groups = partition.groups
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        row_dy, row_dyx = _row_gradient_sums(x, dy, row_mean)
        row_invstd = invstd if groups is None else invstd[groups]
        row_shift = row_mean - (mean if groups is None else mean[groups])
        row_dyx = (row_dyx + row_shift * row_dy) * row_invstd  # sum of dy * xhat of each row
        weight_grad, bias_grad = row_dyx.sum(0), row_dy.sum(0)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([_sum_rows(row_dy, groups, len(count)), _sum_rows(row_dyx, groups, len(count))], dim=1)
            if partition.synchronized:
                dist.all_reduce(sums, group=partition.process_group)
            mean_dy, mean_dyx = (sums / count.clamp(min=1)[:, None]).chunk(2, dim=1)
            scale = invstd if weight is None else invstd * weight.double()
            slope = -scale * mean_dyx * invstd
            offset = -scale * mean_dy - slope * mean
            dx = torch.addcmul(_spread(offset, groups, x, dtype), dy.to(dtype), _spread(scale, groups, x, dtype))
            dx = dx.addcmul_(x.to(dtype), _spread(slope, groups, x, dtype)).to(x.dtype)
        weight_dtype, bias_dtype = ctx.affine_dtypes
        return (
            dx,
            None if weight_dtype is None else weight_grad.to(weight_dtype),
            None if bias_dtype is None else bias_grad.to(bias_dtype),
            None,
            None,
        )


def _row_gradient_sums(x: Tensor, dy: Tensor, row_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of dy and of dy * (x - row mean): two float64 (N, C)."""
    if x.ndim == 2 or x.shape[2:].numel() == 1:
        sums = dy.reshape(row_mean.shape).double()
        return sums, torch.zeros_like(sums)
    rows = _row_view(x)
    if rows is not None:
        mean = row_mean.to(x.dtype).view(-1)
        _, dot, total = torch.ops.aten.native_batch_norm_backward(
            dy.contiguous().view(rows.shape),
            rows,
            None,
            None,
            None,
            mean,
            torch.ones_like(mean),
            True,
            0.0,
            [False, True, True],
        )
        return total.view(row_mean.shape).double(), dot.view(row_mean.shape).double()
    dims = tuple(range(2, x.ndim))
    wide = dy.dtype if dy.dtype == torch.float64 else torch.float32
    centered = x.to(wide) - row_mean.to(wide).reshape(*row_mean.shape, *([1] * (x.ndim - 2)))
    return dy.to(wide).sum(dims).double(), (dy.to(wide) * centered).sum(dims).double()


def partitioned_batch_norm(
    x: Tensor, partition: Partition, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Moments]:
    """Normalize each group of ``partition`` with its own biased moments.

    ``y = weight * (x - mean_g) / sqrt(var_g + eps) + bias`` for a row of group g (Ioffe & Szegedy 2015,
    algorithm 1, with "mini-batch" read as "group"). Equals torch's batch norm run on each group.

    Across ranks: if the partition spans ranks, one all-reduce forward and one backward; every rank
    calls it, empty ranks too.

    Args:
        x: (N, C, *), any floating dtype; statistics are accumulated in float64, the affine map runs
            in float32 for half precision.
        weight, bias: (C,) or None.

    Returns:
        y like ``x``, and the moments (not differentiable).
    """
    y, count, mean, var = _Normalize.apply(x, weight, bias, partition, eps)
    return y, Moments(count, mean, var)
