"""What is left of a ProxyNorm when its parameters are final: the proxy's moments are numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from leakfree.norms.activations import ACTIVATIONS
from leakfree.norms.proxied_activation import HasActivated
from leakfree.norms.proxy import ProxyNorm
from leakfree.norms.traced import traced_call

__all__ = ["CachedProxyNorm"]


class CachedProxyNorm(HasActivated):
    """A ProxyNorm for inference: LN or GN, the activation, and ``z * cached_scale + cached_shift``.

    It has the weight and bias of the ProxyNorm (the same Parameters), and computes in the same dtypes. The constants
    are those of its proxy now, buffers (C,) in the dtype of the weight, at least float32.

    Args:
        norm: the ProxyNorm.
        standardizes: False leaves the constants out, where the layer behind has them in its weights.
    """

    weight: Tensor | None
    bias: Tensor | None
    cached_scale: Tensor | None
    cached_shift: Tensor | None

    def __init__(self, norm: ProxyNorm, *, standardizes: bool = True) -> None:
        super().__init__()
        self.num_groups, self.num_features, self.norm_eps = norm.num_groups, norm.num_features, norm.norm_eps
        self.activation = norm.activation
        self.tells = norm.tells
        self.training = norm.training
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", norm.bias)
        scale, shift = norm.proxy_map()
        self.register_buffer("cached_scale", scale if standardizes else None)
        self.register_buffer("cached_shift", shift if standardizes else None)

    def extra_repr(self) -> str:
        standardizes = self.cached_scale is not None
        return (
            f"{self.num_features}, num_groups={self.num_groups}, activation={self.activation}, "
            f"standardizes={standardizes}"
        )

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        weight, bias = (None if tensor is None else tensor.to(wide) for tensor in (self.weight, self.bias))
        z = ACTIVATIONS[self.activation].apply(
            F.group_norm(input.to(wide), self.num_groups, weight, bias, self.norm_eps)
        )
        if self.cached_scale is not None and self.cached_shift is not None:
            shape = (1, -1) + (1,) * (input.ndim - 2)
            z = torch.addcmul(self.cached_shift.to(wide).view(shape), z, self.cached_scale.to(wide).view(shape))
        return z.to(input.dtype)
