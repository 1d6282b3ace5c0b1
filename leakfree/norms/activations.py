"""The activations that norms with an activation know by name: their value and gradient, in memory of choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]

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
