"""FrozenBN: batch norm whose statistics are constants."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from leakfree.norms.traced import traced_call

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(nn.Module):
    """``y = weight * (x - running_mean) / sqrt(running_var + eps) + bias`` in train and in eval.

    Each sample is treated by itself, so nothing leaks. The statistics are buffers that nothing here
    updates. A fresh layer is the identity (``running_var = 1 - eps``, as in detectron2).
    State dict keys are those of ``nn.BatchNorm*d``, ``num_batches_tracked`` included.

    Args:
        num_features: C of an input (N, C, *).
        affine_trainable: whether weight and bias receive gradients (detectron2: no).
        affine: whether there are a weight and a bias.
        momentum: unused here; kept for the way back to a batch norm.

    Attributes:
        trained_before: whether weight and bias were trainable before ``convert_norms`` froze them, for the way back.

    Reference: Wu & Johnson 2021, section 4.3; detectron2 ``FrozenBatchNorm2d``.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        dim: int | None = None,
        eps: float = 1e-5,
        affine_trainable: bool = False,
        affine: bool = True,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.dim = dim
        self.eps = eps
        self.affine = affine
        self.affine_trainable = affine_trainable
        self.momentum = momentum
        self.trained_before: dict[str, bool] = {}
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=affine_trainable) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features), requires_grad=affine_trainable) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, affine_trainable={self.affine_trainable}"

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        if input.ndim < 2 or input.shape[1] != self.num_features or not input.is_floating_point():
            raise ValueError(
                f"FrozenBatchNorm expects (N, {self.num_features}, *) floating point numbers, got {tuple(input.shape)} "
                f"{input.dtype}"
            )
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32  # of the map; the result is rounded
        shape = (1, -1) + (1,) * (input.ndim - 2)
        scale = torch.rsqrt(self.running_var.to(dtype) + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.to(dtype)
        shift = -self.running_mean.to(dtype) * scale
        if self.bias is not None:
            shift = shift + self.bias.to(dtype)
        return torch.addcmul(shift.view(shape), input.to(dtype), scale.view(shape)).to(input.dtype)
