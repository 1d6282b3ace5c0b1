"""The passes of ProxyNorm over the data, forward and backward.

The input is read as few times as can be: a part of the batch that fits the caches goes through all steps before the
next one, forward and backward, and only the input is kept for the backward.

Legend: N rows (samples), C channels, S positions of a row, G groups of channels; u = gamma * Norm(x) + beta is what
enters the activation phi. Tables over rows and channels are in float32 (float64 for float64 data), what is summed
over them in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leakfree.norms.activated_proxy import ProxyMoments
from leakfree.norms.activations import Activation
from leakfree.norms.blocked import Rows, affine, deviation_sums, product_sums, row_sums

__all__ = ["ProxyNormalize", "Settings"]

_PART_BYTES = 4 << 20  # of the part of a batch that is taken through all steps at once, per thread
_WORK = 1.5  # memory of what is in work, at most, in that of the input; output and gradient take 1 each
_PIECE = 4096  # values whose squares torch may add in float32 to 1e-6


class Settings(NamedTuple):
    phi: Activation
    num_groups: int
    norm_eps: float


def _take(x: Rows, samples: slice) -> tuple[slice, Rows]:
    """Where ``samples`` are in the values (R, S, K), and a view of them."""
    each = 1 if x.channels_last else x.shape[1]
    lines = slice(samples.start * each, samples.stop * each)
    shape = torch.Size((samples.stop - samples.start, *x.shape[1:]))
    return lines, Rows(x.values[lines], shape, x.channels_last)


def _parts(x: Rows, phi: Activation) -> Iterator[tuple[slice, slice, Rows]]:
    """(samples, lines, the part): what goes through all steps before the next part."""
    samples, size = x.shape[0], x.values.numel()
    if not size:
        return
    # In work are u, without `homogeneous` also z, and of half precision four tensors of twice the size.
    in_work = 8.0 if x.values.dtype != x.wide else 1.0 if phi.homogeneous else 2.0
    limit = int(_WORK * size / in_work)
    if x.values.device.type == "cpu":
        limit = min(limit, _PART_BYTES * torch.get_num_threads() // x.wide.itemsize)
    step = max(1, limit // (size // samples))
    for start in range(0, samples, step):
        here = slice(start, min(start + step, samples))
        yield here, *_take(x, here)


class _Scratch:
    """Memory for the parts of a pass, one after the other, in the dtype to compute in."""

    def __init__(self, x: Rows) -> None:
        self._wide, self._memory = x.wide, x.values.new_empty(0)

    def like(self, part: Rows) -> Rows:
        if self._memory.numel() < part.values.numel():
            self._memory = torch.empty(part.values.numel(), dtype=self._wide, device=part.values.device)
        values = self._memory[: part.values.numel()].view(part.values.shape)
        return Rows(values, part.shape, part.channels_last)


def _group_means(table: Tensor, num_groups: int, positions: int) -> Tensor:
    """Sums over positions (n, C) -> means over groups of channels and positions (n, G, 1), float64."""
    grouped = table.view(len(table), num_groups, -1)
    return grouped.sum(2, keepdim=True, dtype=torch.float64) / (grouped.shape[2] * positions)


def _spread(table: Tensor, x: Rows) -> Tensor:
    """(n, G, 1) -> (n, C) in the dtype to compute in."""
    n, groups, _ = table.shape
    return table.to(x.wide).expand(n, groups, x.shape[1] // groups).reshape(n, x.shape[1])


def _moments(x: Rows, num_groups: int, room: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the groups of each sample, (n, G, 1) float64."""
    in_order = num_groups == 1 or not x.channels_last  # a group is one piece of memory
    if not in_order or x.values.dtype != x.wide or x.values.device.type != "cpu":
        return _centered_moments(x, num_groups, room)
    pieces = _pieces(x, num_groups)
    share = 1 / (pieces.shape[2] * pieces.shape[3])
    mean = pieces.sum((2, 3)).double().unsqueeze_(2).mul_(share)
    square = torch.linalg.vector_norm(pieces, dim=3).double().square_().sum(2, keepdim=True).mul_(share)
    var = torch.addcmul(square, mean, mean, value=-1)
    rough = (mean * mean > var).flatten(1).any(1).tolist()  # |mean| > std: the subtraction loses more than a bit
    if all(rough):
        return _centered_moments(x, num_groups, room)
    for n in (n for n, is_rough in enumerate(rough) if is_rough):  # a sample's way never depends on the others
        mean[n : n + 1], var[n : n + 1] = _centered_moments(_take(x, slice(n, n + 1))[1], num_groups, room)
    return mean, var


def _centered_moments(x: Rows, num_groups: int, room: Tensor) -> tuple[Tensor, Tensor]:
    """As in ``statistics``: sums are taken again about the mean, as their rounding would show where that is large."""
    positions = x.shape[2:].numel()
    center = _spread(_group_means(row_sums(x), num_groups, positions), x)
    var = _group_means(deviation_sums(x, center, squared=True, room=room), num_groups, positions)
    shift = _group_means(deviation_sums(x, center, room=room), num_groups, positions)
    first = center.view(len(center), num_groups, -1)[..., :1].double()
    return first + shift, torch.addcmul(var, shift, shift, value=-1).clamp_(min=0)


def _pieces(x: Rows, num_groups: int) -> Tensor:
    """The values of each group (n, G, pieces, length), short enough for sums of squares one after the other."""
    size = x.shape[1:].numel() // num_groups
    count = 1
    while size // count > _PIECE and size % (2 * count) == 0:
        count *= 2
    return x.values.view(x.shape[0], num_groups, count, size // count)


def _entry(mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``u = x * scale + shift`` enters the activation: scale and shift (n, C), as torch's group norm has them."""
    n, groups, _ = mean.shape
    scale = invstd.to(weight.dtype) * weight.view(1, groups, -1)
    shift = torch.addcmul(bias.view(1, groups, -1), scale, mean.to(weight.dtype), value=-1)
    return scale.view(n, -1), shift.view(n, -1)


class ProxyNormalize(torch.autograd.Function):
    """``(phi(weight * Norm(x) + bias) - E) / sqrt(Var + eps)`` from the proxy's moments and their derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        proxy_scale: Tensor,
        proxy_shift: Tensor,
        proxy: ProxyMoments,
        settings: Settings,
    ) -> Tensor:
        rows = Rows.of(x)
        y = rows.room()  # before anything else is allocated: see ``blocked``
        gamma, beta = proxy.values[:2]
        scale, shift = proxy.scale, proxy.shift
        mean = torch.empty(len(x), settings.num_groups, 1, dtype=torch.float64, device=x.device)
        invstd = torch.empty_like(mean)
        scratch = _Scratch(rows)
        phi = settings.phi
        in_place = phi.clamps and x.dtype == rows.wide
        if phi.clamps:  # max(u, 0) * scale + shift = max(u * scale + shift, shift)
            gamma, beta = gamma * scale, torch.addcmul(shift, beta, scale)
        for here, lines, part in _parts(rows, phi):
            u = Rows(y[lines], part.shape, part.channels_last) if in_place else scratch.like(part)
            mean[here], var = _moments(part, settings.num_groups, u.values)
            invstd[here] = (var + settings.norm_eps).rsqrt_()
            affine(part, None, *_entry(mean[here], invstd[here], gamma, beta), u.values)
            if phi.clamps:
                torch.maximum(u.values, u.coefficient(shift[None]), out=u.values)
                if not in_place:
                    y[lines] = u.values
            else:
                phi.into(u.values, u.values)
                affine(u, None, scale[None], shift[None], y[lines])
        ctx.save_for_backward(
            *(x, weight, bias, proxy_scale, proxy_shift, mean, invstd),
            *(proxy.values, scale, proxy.scale_slopes, proxy.shift_slopes),
        )
        ctx.settings = settings
        return rows.tensor(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters, mean, invstd, values, scale, scale_slopes, shift_slopes = ctx.saved_tensors
        settings: Settings = ctx.settings
        phi, groups, positions = settings.phi, settings.num_groups, x.shape[2:].numel()
        gamma, beta, proxy_scale, proxy_shift = values
        rows = Rows.of(x)
        dy_rows = rows.match(dy)
        room = rows.room() if ctx.needs_input_grad[0] else None
        slope = gamma * scale
        # Sums over rows and positions, (C,): of dy, dy * z, du and du * Norm(x), where du lacks the factor `scale`
        d_shift, d_scale, d_bias, d_weight = torch.zeros(4, x.shape[1], dtype=torch.float64, device=x.device)
        scratch, spare = _Scratch(rows), _Scratch(rows)
        for here, lines, part in _parts(rows, phi):
            means, invstds = mean[here], invstd[here]
            a, b = _entry(means, invstds, gamma, beta)
            dy_part = Rows(dy_rows.values[lines].to(rows.wide), part.shape, part.channels_last)
            u = scratch.like(part)
            affine(part, None, a, b, u.values)
            free = None if room is None else room[lines]  # until dx is made
            if phi.homogeneous:
                d_shift += row_sums(dy_part).sum(0, dtype=torch.float64)
            else:
                z = spare.like(part)
                phi.into(u.values, z.values)
                total, product = product_sums(dy_part, z, None, room=free)
                d_shift += total.sum(0, dtype=torch.float64)
                d_scale += product.sum(0, dtype=torch.float64)
            du = u
            phi.gradient_into(dy_part.values, u.values, du.values)
            total, product = product_sums(du, part, None, room=free)
            if phi.homogeneous:  # dy * z = dy * phi'(u) * u
                d_scale += torch.addcmul(total * b, product, a).sum(0, dtype=torch.float64)
            total, product = (table.view(len(means), groups, -1) for table in (total, product))
            product = torch.addcmul(product, total, means.to(total.dtype), value=-1)
            product *= invstds.to(total.dtype)  # sum of du * Norm(x)
            total, product = total.flatten(1), product.flatten(1)
            d_bias += total.sum(0, dtype=torch.float64)
            d_weight += product.sum(0, dtype=torch.float64)
            if room is None:
                continue
            # dx = invstd * (slope * du - mean(slope * du) - Norm(x) * mean(slope * du * Norm(x)))
            down = _group_means(total * slope, groups, positions) * invstds
            tilt = _group_means(product * slope, groups, positions) * invstds.square()
            offset = torch.addcmul(-down, tilt, means)
            dx = room[lines] if room.dtype == rows.wide else spare.like(part).values
            affine(part, None, _spread(-tilt, part), _spread(offset, part), dx)
            factor = part.coefficient(_entry(means, invstds, slope, beta)[0])
            if part.channels_last:
                dx.addcmul_(du.values, factor)
            else:  # torch has no fast kernel for a column in three operands
                dx.add_(du.values.mul_(factor))
            if room.dtype != rows.wide:
                room[lines] = dx
        d_a, d_b = torch.addcmul(d_scale * scale_slopes, d_shift, shift_slopes)
        gradients = [
            torch.addcmul(d_weight * scale + d_a * (1 + proxy_scale), d_b, proxy_shift),
            torch.addcmul(d_b, d_bias, scale),
            d_a * gamma,
            d_b * gamma,
        ]
        of_parameters = (
            None if tensor is None else gradient.to(tensor.dtype)
            for tensor, gradient in zip(parameters, gradients, strict=True)
        )
        return None if room is None else rows.tensor(room), *of_parameters, None, None
