"""A batch norm by any rule: the moments of a batch as autograd values, and the affine map that a rule makes of them.

Batch Renormalization, Batch Group Normalization, Cross-Iteration and Memorized BN differ from BN in one
thing only: which function of the batch's moments (and of what they remember) gives the scale and the shift of
each channel. Here that function is plain torch on small float64 tables::

    batch = BatchMoments(x, partition)
    scale = weight * torch.rsqrt(batch.var + eps)
    y = batch.affine(scale, bias - batch.mean * scale)

while the data is read as often as by BN itself: twice or three times forward, twice backward. The gradient
with respect to ``x`` is written once, through ``y`` and through the moments together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leakfree.distributed import all_reduce_sum_
from leakfree.norms.blocked import Rows, affine, deviation_sums, gradient, product_sums, row_sums
from leakfree.norms.statistics import Moments, group_moments, is_near_zero, spread_groups, sum_groups
from leakfree.partition import Partition

__all__ = ["BatchMoments"]


class _Link:
    """What the backward of the affine map leaves for that of the moments, which comes after it."""

    def __init__(self) -> None:
        self._left: tuple[int, Tensor, Tensor] | None = None

    def leave(self, dy: Tensor, scale: Tensor) -> None:
        self._left = torch._C._current_graph_task_id(), dy, scale

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """(dy, scale) of this backward; another one that stopped before the moments may have left its own."""
        left, self._left = self._left, None
        if left is None or left[0] != torch._C._current_graph_task_id():
            return None, None
        return left[1], left[2]


class BatchMoments:
    """The moments of each group of the rows of ``x`` (N, C, *), through which gradients flow.

    Args:
        x: any floating dtype, contiguous or channels last.
        partition: who shares statistics; its process group sums moments and their gradients over ranks.
        instances: whether the mean of each row is wanted too.

    Across ranks the inputs must agree on whether they need a gradient; those without rows need not.

    Attributes:
        count: (G,) values per channel, float64, constant.
        mean, var: (G, C) float64, var biased. On CPU, for one group of one rank and channels near 0, they are as
            exact as torch's batch norm, else as :func:`leakfree.norms.group_moments`.
        instance_mean: (N, C) float64, mean over the positions of each row; None unless asked for.
    """

    @torch.compiler.disable  # a compiler would lose what one backward leaves for the other
    def __init__(self, x: Tensor, partition: Partition | None = None, *, instances: bool = False) -> None:
        self._partition = partition if partition is not None else Partition()
        if self._partition.synchronized and not len(x) and not x.requires_grad and torch.is_grad_enabled():
            x = x.detach().requires_grad_()  # this rank's backward meets those of the others
        self._x = x
        self._link: _Link | None = _Link()
        moments = _moments(x.detach(), self._partition)
        self.count = moments.count
        self._near = is_near_zero(moments.mean, moments.var)
        means = _row_means(x.detach(), None if self._near else moments.mean, self._partition) if instances else None
        self.mean, self.var, instance_mean, self._anchor = _Moments.apply(
            x, moments.mean, moments.var, moments.count, means, self._partition, self._near, self._link
        )
        self.instance_mean: Tensor | None = instance_mean if instances else None

    def pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean (C,), biased variance (C,)) of all groups together, as constants."""
        return Moments(self.count, self.mean.detach(), self.var.detach()).pooled()

    def normalize(
        self, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """:meth:`affine` with ``mean`` and ``var``, float64 (G, C), and a weight and bias of the channels (C,)."""
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean * scale
        return self.affine(scale, shift if bias is None else shift + bias.double())

    @torch.compiler.disable
    def affine(self, scale: Tensor, shift: Tensor, *, of_rows: bool = False) -> Tensor:
        """``x * scale + shift`` in the dtype of ``x``; can be called once.

        Args:
            scale, shift: float64 (G, C); with ``of_rows`` (N, C), a map of each row.

        Raises:
            ValueError: a scale or shift of another shape or dtype.
            RuntimeError: a second call.
        """
        link, self._link = self._link, None
        if link is None:  # the gradient of x knows of one map
            raise RuntimeError("BatchMoments.affine was called before: take the moments again for another map")
        rows, unit = (len(self._x), "row") if of_rows else (self._partition.num_groups, "group")
        expected = (rows, self._x.shape[1])
        for name, table in (("scale", scale), ("shift", shift)):
            if table.shape != expected or table.dtype != torch.float64:
                raise ValueError(
                    f"BatchMoments.affine: {name} must be float64 {expected}, one number per {unit} and channel, "
                    f"got {str(table.dtype).removeprefix('torch.')} {tuple(table.shape)}"
                )
        center = None if self._near else self.mean.detach()
        constants = (center, self._partition, of_rows, link)
        result: Tensor = _Affine.apply(self._x.detach(), scale, shift, self._anchor, *constants)
        return result


def _moments(x: Tensor, partition: Partition) -> Moments:
    fused = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
    if partition.groups is not None or partition.synchronized or not fused:
        return group_moments(x, partition)
    rows = Rows.of(x)
    mean, var = torch.ops.aten.batch_norm_update_stats(rows.tensor(rows.values), None, None, 0.0)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64)
    moments = Moments(count, mean.double()[None], var.double()[None])
    if is_near_zero(moments.mean, moments.var):
        return moments
    return group_moments(x, partition)  # there torch's kernel is off by 1e-3 standard deviations


def _row_means(x: Tensor, center: Tensor | None, partition: Partition) -> Tensor:
    """(N, C) float64; summed about ``center`` (G, C), so that a large one costs no digits."""
    rows, positions = Rows.of(x), max(x.shape[2:].numel(), 1)
    if center is None:
        return row_sums(rows).double() / positions
    (c,) = spread_groups(partition.groups, rows.wide, center)
    return c + deviation_sums(rows, c).double() / positions


class _Moments(torch.autograd.Function):
    """(mean, var, instance mean, anchor) of ``x``; the backward writes the whole gradient of ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        instance_mean: Tensor | None,
        partition: Partition,
        near: bool,
        link: _Link,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, mean, count)
        ctx.partition, ctx.near, ctx.link = partition, near, link
        # The anchor makes this node wait for the affine map's, also where a rule ignores the moments.
        return (
            mean.clone(),
            var.clone(),
            mean.new_zeros(0) if instance_mean is None else instance_mean,
            mean.new_zeros(()),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, count = ctx.saved_tensors
        partition: Partition = ctx.partition
        sums = torch.cat(gradients[:2], dim=1)
        if partition.synchronized:
            all_reduce_sum_(sums := sums.clone(), partition.process_group)
        d_mean, d_var = (sums / count.clamp(min=1)[:, None]).chunk(2, dim=1)
        rows = Rows.of(x)
        room = rows.room()
        center = None if ctx.near else mean.to(rows.wide)
        distance = mean if center is None else mean - center.double()
        slope = 2 * d_var
        offset = d_mean - slope * distance
        k, b, *c = spread_groups(partition.groups, rows.wide, slope, offset, *([] if center is None else [center]))
        if gradients[2].numel():
            b = b + (gradients[2] / max(x.shape[2:].numel(), 1)).to(rows.wide)
        dy, scale = ctx.link.take()
        middle = c[0] if c else None
        if dy is None or scale is None:
            dx = affine(rows, middle, k, b, room)
        else:
            dx = gradient(rows.match(dy), rows, middle, scale, k, b, room)
        return rows.tensor(dx), *[None] * 7


class _Affine(torch.autograd.Function):
    """``x * scale + shift``; the gradient of ``x`` is left to :class:`_Moments`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        anchor: Tensor,
        center: Tensor | None,
        partition: Partition,
        of_rows: bool,
        link: _Link,
    ) -> Tensor:
        rows = Rows.of(x)
        room = rows.room()
        c = None
        if center is not None:
            center = center.to(rows.wide)
            (c,) = spread_groups(partition.groups, rows.wide, center)
            shift = torch.addcmul(shift, scale, (c if of_rows else center).double())
        a, b = spread_groups(None if of_rows else partition.groups, rows.wide, scale, shift)
        y = rows.tensor(affine(rows, c, a, b, room))
        ctx.save_for_backward(x, a, center)
        ctx.partition, ctx.of_rows, ctx.link = partition, of_rows, link
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, center = ctx.saved_tensors
        partition: Partition = ctx.partition
        rows = Rows.of(x)
        dy_rows = rows.match(dy)
        c = None if center is None else spread_groups(partition.groups, rows.wide, center)[0]
        total, product = product_sums(dy_rows, rows, c)
        if ctx.of_rows:
            total, product, middle = total.double(), product.double(), c
        else:
            total, product = (sum_groups(table, partition.groups, partition.num_groups) for table in (total, product))
            middle = center
        if middle is not None:  # from the sum of dy * (x - center) to that of dy * x
            product = torch.addcmul(product, middle.double(), total)
        if ctx.needs_input_grad[3]:
            ctx.link.leave(dy, scale)
        return None, product, total, dy.new_zeros((), dtype=torch.float64), None, None, None, None
