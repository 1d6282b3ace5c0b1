"""What an activation makes of the proxy, a normal variable for each channel: moments and their derivatives.

Legend: C channels, Q quantiles of the normal distribution, phi the activation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from leakfree.norms.activations import Activation

__all__ = ["ProxyMoments", "activated_proxy", "normal_quantiles"]


class ProxyMoments(NamedTuple):
    """Moments of ``phi(a * q + b)`` over the quantiles q, (C,), and what follows for ``y = z * scale + shift``."""

    values: Tensor  # (4, C) weight, bias, proxy_scale, proxy_shift
    version: tuple[tuple[int, int], ...] | None  # of the parameters and their addresses
    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor
    scale_slopes: Tensor  # (2, C) derivatives by a and by b
    shift_slopes: Tensor  # (2, C)


def normal_quantiles(num_points: int, like: Tensor) -> Tensor:
    """Of the standard normal distribution, at the middles of ``num_points`` parts of equal probability."""
    places = (torch.arange(num_points, device=like.device, dtype=torch.float64) + 0.5) / num_points
    return (math.sqrt(2) * torch.erfinv(2 * places - 1)).to(like.dtype)


def activated_proxy(
    values: Tensor, version: tuple[tuple[int, int], ...] | None, phi: Activation, num_points: int, eps: float
) -> ProxyMoments:
    weight, bias, proxy_scale, proxy_shift = values
    q = normal_quantiles(num_points, values)
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
    return ProxyMoments(values, version, mean, var, scale, -mean * scale, scale_slopes, shift_slopes)
