"""ProxyNorm: a norm of each sample by itself, its activation, and the channel's normalization after that.

LN and GN leave channels with means and variances of their own. Proxy Normalization removes them behind the
activation, by the statistics that the activation of a normal variable (the proxy) would have: no sample is asked.

The layer reads its input as few times as it can: a part of the batch that fits the caches goes through all steps
before the next one, forward and backward, and only the input is kept for the backward.

Legend: N rows (samples), C channels, S positions of a row, G groups of channels; u = gamma * Norm(x) + beta is what
enters the activation phi. Tables over rows and channels are in float32 (float64 for float64 data), what is summed
over them in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from leakfree.errors import ConfigError, choices
from leakfree.norms.blocked import Rows, affine, deviation_sums, product_sums, row_sums
from leakfree.norms.independent import check_groups, check_input
from leakfree.norms.traced import traced_call

__all__ = ["ACTIVATIONS", "ProxyNorm"]

_PART_BYTES = 4 << 20  # of the part of a batch that is taken through all steps at once, per thread
_WORK = 1.5  # memory of what is in work, at most, in that of the input; output and gradient take 1 each
_PIECE = 4096  # values whose squares torch may add in float32 to 1e-6

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation that can follow the norm.

    Attributes:
        apply: of a tensor, for autograd.
        into: ``(u, out)``: phi(u) in the memory of ``out``, which may be u's.
        gradient_into: ``(dz, u, out)``: dz * phi'(u) in the memory of ``out``, which may be u's.
        homogeneous: whether phi(u) = u * phi'(u), which saves a pass.
        clamps: whether phi(u) = max(u, 0), which saves another.
    """

    apply: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], object]
    gradient_into: Callable[[Tensor, Tensor, Tensor], object]
    homogeneous: bool = False
    clamps: bool = False


def _leaky_gradient(dz: Tensor, u: Tensor, out: Tensor) -> None:
    aten.leaky_relu_backward.grad_input(dz, u, 0.01, False, grad_input=out)


def _elu_gradient(dz: Tensor, u: Tensor, out: Tensor) -> None:
    aten.elu_backward.grad_input(dz, 1.0, 1.0, 1.0, False, u, grad_input=out)


ACTIVATIONS = {
    "relu": Activation(
        F.relu,
        lambda u, out: aten.clamp_min.out(u, 0, out=out),
        lambda dz, u, out: aten.threshold_backward.grad_input(dz, u, 0, grad_input=out),
        homogeneous=True,
        clamps=True,
    ),
    "leaky_relu": Activation(
        F.leaky_relu, lambda u, out: aten.leaky_relu.out(u, 0.01, out=out), _leaky_gradient, homogeneous=True
    ),
    "relu6": Activation(
        F.relu6,
        lambda u, out: aten.clamp.out(u, 0, 6, out=out),
        lambda dz, u, out: aten.hardtanh_backward.grad_input(dz, u, 0, 6, grad_input=out),
    ),
    "elu": Activation(F.elu, lambda u, out: aten.elu.out(u, out=out), _elu_gradient),
    "silu": Activation(
        F.silu,
        lambda u, out: aten.silu.out(u, out=out),
        lambda dz, u, out: aten.silu_backward.grad_input(dz, u, grad_input=out),
    ),
    "gelu": Activation(
        F.gelu,
        lambda u, out: aten.gelu.out(u, out=out),
        lambda dz, u, out: aten.gelu_backward.grad_input(dz, u, grad_input=out),
    ),
    "hardswish": Activation(
        F.hardswish,
        lambda u, out: aten.hardswish.out(u, out=out),
        lambda dz, u, out: out.copy_(aten.hardswish_backward(dz, u)),
    ),
    "mish": Activation(
        F.mish,
        lambda u, out: aten.mish.out(u, out=out),
        lambda dz, u, out: out.copy_(aten.mish_backward(dz, u)),
    ),
}
"""By name; the parameters of an activation are torch's defaults (slope 0.01, alpha 1, exact GELU)."""


class ProxyNorm(nn.Module):
    """ProxyNorm: ``(z - E) / sqrt(Var + eps)`` with ``z = phi(weight * Norm(x) + bias)``; norm and activation in one.

    Norm is LN or GN without an affine map, phi the activation: put this layer in the place of both. E and Var are the
    mean and the biased variance of ``phi(weight * Y + bias)`` of each channel, with Y normal of mean ``proxy_shift``
    and standard deviation ``1 + proxy_scale``, at ``num_points`` quantiles of it; gradients go through them to all four
    parameters (C,). At first weight is 1 and the others are 0. The same in training and in eval; nothing leaks.

    E and Var are functions of the parameters alone: they and their derivatives are computed once for each value of the
    parameters, so once in an optimizer step, however many forwards it has. On the CPU the values are compared; as that
    would wait for another device, there they are computed in each forward of training and kept in eval as long as
    no parameter changes in place (a change through ``.data`` is not seen until the mode is set again).

    Weight decay is for ``proxy_shift`` and ``proxy_scale`` only, as the authors have it: see :meth:`proxy_parameters`.

    Input (N, C, *) of any floating dtype, the output like it; computed in float32 (float64 for float64 data), so exact
    to about 1e-7 of |mean| / std of a sample, as torch's group norm.
    Compiled or exported, the layer is plain operations of torch.

    Args:
        norm: "LN", over all values of a sample, or "GN".
        num_groups: of GN; must divide ``num_features``. None = 32 (the paper's number is not known).
        activation: one of :data:`ACTIVATIONS`.
        num_points: of the quadrature, the authors' 200.
        eps: beside the proxy's variance, the authors' 0.03: it keeps channels that are almost dead from exploding.
        norm_eps: beside the variance of Norm.

    Raises:
        ConfigError: an unknown norm or activation, groups that do not divide the channels.
        LeakfreeError: another number of channels, or a single value for each mean.

    Reference: Labatie et al. 2021 (arXiv 2106.03743), section 4 and equations 5-7; quadrature and eps as in the
    authors' code.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        norm: str = "LN",
        num_groups: int | None = None,
        activation: str = "relu",
        num_points: int = 200,
        eps: float = 0.03,
        norm_eps: float = 1e-5,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("LN", "GN"):
            raise ConfigError(f"ProxyNorm: unknown norm={norm!r}; choose from LN, GN")
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"ProxyNorm: unknown activation={activation!r}; choose from {choices(activation, ACTIVATIONS)}"
            )
        if norm == "LN" and num_groups not in (None, 1):
            raise ConfigError(f"ProxyNorm: num_groups={num_groups} is for norm='GN'; LN has one group")
        if num_points < 2:
            raise ConfigError(f"ProxyNorm: num_points must be at least 2, got {num_points}")
        self.num_groups = 1 if norm == "LN" else 32 if num_groups is None else num_groups
        check_groups("ProxyNorm", num_features, self.num_groups)
        self.num_features = num_features
        self.norm = norm
        self.activation = activation
        self.num_points = num_points
        self.eps = eps
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.proxy_scale = nn.Parameter(torch.zeros(num_features))
        self.proxy_shift = nn.Parameter(torch.zeros(num_features))
        self._known: _Proxy | None = None

    def extra_repr(self) -> str:
        groups = f", num_groups={self.num_groups}" if self.norm == "GN" else ""
        return f"{self.num_features}, norm={self.norm}{groups}, activation={self.activation}, eps={self.eps}"

    def proxy_parameters(self) -> list[nn.Parameter]:
        """``proxy_shift`` and ``proxy_scale``: those that weight decay is for; weight and bias go without."""
        return [self.proxy_shift, self.proxy_scale]

    def proxy_moments(self) -> tuple[Tensor, Tensor]:
        """E and Var of the activated proxy, (C,) each, without gradient: y is ``(z - E) * rsqrt(Var + eps)``."""
        proxy = self._proxy(torch.float64 if self.weight.dtype == torch.float64 else torch.float32)
        return proxy.mean.clone(), proxy.var.clone()

    def train(self, mode: bool = True) -> ProxyNorm:
        self._known = None
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        values = self.num_features // self.num_groups * input.shape[2:].numel()
        check_input("ProxyNorm", input, self.num_features, values, "use LN, or fewer groups")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._plain(input)
        proxy = self._proxy(_wide(input))
        settings = _Settings(ACTIVATIONS[self.activation], self.num_groups, self.norm_eps)
        y: Tensor = _ProxyNormalize.apply(
            input, self.weight, self.bias, self.proxy_scale, self.proxy_shift, proxy, settings
        )
        return y

    def _plain(self, x: Tensor) -> Tensor:
        """The definition, one operation for each step: for compilers, which fuse them."""
        phi, wide = ACTIVATIONS[self.activation].apply, _wide(x)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        weight, bias, scale, shift = self._parameters_in(wide)
        y = F.group_norm(x.to(wide), self.num_groups, eps=self.norm_eps)
        z = phi(weight.view(shape) * y + bias.view(shape))
        points = (1 + scale)[:, None] * _quantiles(self.num_points, weight) + shift[:, None]
        response = phi(weight[:, None] * points + bias[:, None])
        mean, var = response.mean(1), response.var(1, unbiased=False)
        return ((z - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)).to(x.dtype)

    def _parameters_in(self, dtype: torch.dtype) -> list[Tensor]:
        bias = torch.zeros_like(self.weight) if self.bias is None else self.bias
        return [tensor.to(dtype) for tensor in (self.weight, bias, self.proxy_scale, self.proxy_shift)]

    @torch.no_grad()
    def _proxy(self, dtype: torch.dtype) -> _Proxy:
        """The moments of the activated proxy, from the last time if the parameters are those of then."""
        values = torch.stack(self._parameters_in(dtype))
        if values.device.type == "cpu":
            version, known = None, self._known
        else:
            parameters = list(self.parameters(recurse=False))
            untold = self.training or any(tensor.is_inference() for tensor in parameters)  # these have no version
            version = None if untold else tuple((tensor._version, tensor.data_ptr()) for tensor in parameters)
            known = None if untold else self._known
        if torch.is_inference_mode_enabled():  # what is made there may not meet a gradient later
            return _activated_proxy(values, version, ACTIVATIONS[self.activation], self.num_points, self.eps)
        if known is not None and known.values.dtype == dtype and known.values.device == values.device:
            same = torch.equal(known.values, values) if version is None else known.version == version
            if same:
                return known
        self._known = _activated_proxy(values, version, ACTIVATIONS[self.activation], self.num_points, self.eps)
        return self._known


class _Proxy(NamedTuple):
    """Moments of ``phi(a * q + b)`` over the quantiles q, (C,), and what follows for ``y = z * scale + shift``."""

    values: Tensor  # (4, C) weight, bias, proxy_scale, proxy_shift
    version: tuple[tuple[int, int], ...] | None  # of the parameters and their addresses
    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor
    scale_slopes: Tensor  # (2, C) derivatives by a and by b
    shift_slopes: Tensor  # (2, C)


class _Settings(NamedTuple):
    phi: Activation
    num_groups: int
    norm_eps: float


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _quantiles(num_points: int, like: Tensor) -> Tensor:
    """Of the standard normal distribution, at the middles of ``num_points`` parts of equal probability."""
    places = (torch.arange(num_points, device=like.device, dtype=torch.float64) + 0.5) / num_points
    return (math.sqrt(2) * torch.erfinv(2 * places - 1)).to(like.dtype)


def _activated_proxy(
    values: Tensor, version: tuple[tuple[int, int], ...] | None, phi: Activation, num_points: int, eps: float
) -> _Proxy:
    weight, bias, proxy_scale, proxy_shift = values
    q = _quantiles(num_points, values)
    # weight * Y + bias = a * q + b
    v = torch.addcmul((weight * proxy_shift + bias)[:, None], (weight * (1 + proxy_scale))[:, None], q)
    z, slope = torch.empty_like(v), torch.ones_like(v)
    phi.into(v, z)
    mean = z.mean(1)
    deviation = z.sub_(mean[:, None])
    var = deviation.square().mean(1)
    weighted = torch.empty_like(v)
    phi.gradient_into(slope, v, weighted)
    mean_slopes = torch.stack([(weighted * q).mean(1), weighted.mean(1)])
    weighted.mul_(deviation)
    var_slopes = torch.stack([(weighted * q).mean(1), weighted.mean(1)]).mul_(2)
    scale = torch.rsqrt(var + eps)
    scale_slopes = -0.5 * scale**3 * var_slopes
    shift_slopes = -scale * mean_slopes - mean * scale_slopes
    return _Proxy(values, version, mean, var, scale, -mean * scale, scale_slopes, shift_slopes)


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


class _ProxyNormalize(torch.autograd.Function):
    """``(phi(weight * Norm(x) + bias) - E) / sqrt(Var + eps)`` from the proxy's moments and their derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        proxy_scale: Tensor,
        proxy_shift: Tensor,
        proxy: _Proxy,
        settings: _Settings,
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
        settings: _Settings = ctx.settings
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
