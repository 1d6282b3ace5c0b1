"""What leakfree is compared with: other people's algorithms written plainly, and their own code where installed.

The plain ones follow the code that people copy today, step by step and without its framework, so that a comparison
needs nothing but torch. A function named ``installed_*`` imports a peer when called and raises ImportError without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- Shuffling by all-gather ----------------------------------------------------------------------------------------


class _AllGather(torch.autograd.Function):
    """fvcore ``nn/distributed.py``: the backward stacks the gradients of all slices and all-reduces them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        everyone = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x)
        return tuple(everyone)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        stacked = torch.stack(gradients)
        dist.all_reduce(stacked)
        return stacked[dist.get_rank()]


def _gather_rows(x: Tensor) -> list[Tensor]:
    return list(_AllGather.apply(x))


def _gather_size(size: int, device: torch.device) -> list[int]:
    everyone = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor([size], device=device))
    return [int(item) for item in everyone]


class AllGatherShuffle:
    """detectron2 ``projects/Rethinking-BatchNorm/configs/mask_rcnn_BNhead_shuffle.py`` (Wu & Johnson 2021, section 6).

    Every rank gets every row, padded to the longest rank, and keeps its share of a permutation that rank 0
    broadcasts; the way back is the same.
    """

    def __init__(
        self,
        gather_rows: Callable[[Tensor], list[Tensor]] = _gather_rows,
        gather_size: Callable[[int, torch.device], list[int]] = _gather_size,
    ) -> None:
        self.gather_rows = gather_rows
        self.gather_size = gather_size

    def _concat_all(self, x: Tensor) -> tuple[Tensor, list[int]]:
        sizes = self.gather_size(len(x), x.device)
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: len(x)] = x
        everyone = self.gather_rows(padded)
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)]), sizes

    def shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, *) rows -> (M, *) rows of all ranks, and what ``unshuffle`` needs."""
        rows, sizes = self._concat_all(x)
        order = torch.randperm(len(rows), device=x.device)
        dist.broadcast(order, src=0)
        shares = torch.split(order, max(1, math.ceil(len(rows) / dist.get_world_size())))
        rank = dist.get_rank()
        mine = shares[rank] if rank < len(shares) else order[:0]
        start = sum(sizes[:rank])
        return rows[mine], torch.argsort(order)[start : start + sizes[rank]]

    def unshuffle(self, x: Tensor, home: Tensor) -> Tensor:
        """(M, *) -> (N, *): the rows of this rank, in their order."""
        return self._concat_all(x)[0][home]


def installed_detectron2_shuffle() -> AllGatherShuffle:
    """The same with detectron2's own pickled exchange of sizes and fvcore's all-gather."""
    from detectron2.utils import comm
    from fvcore.nn.distributed import differentiable_all_gather

    return AllGatherShuffle(differentiable_all_gather, lambda size, device: comm.all_gather(size))


def _concat_all(x: Tensor) -> Tensor:
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x)
    return torch.cat(everyone)


@torch.no_grad()
def moco_shuffle(images: Tensor) -> Tensor:
    """MoCo ``moco/builder.py`` (He et al. 2020, section 3.3): equal batches, no gradient."""
    rows = _concat_all(images)
    order = torch.randperm(len(rows), device=images.device)
    dist.broadcast(order, src=0)
    return rows[order.view(dist.get_world_size(), -1)[dist.get_rank()]]


def installed_lightly_shuffle() -> Callable[[Tensor], Tensor]:
    from lightly.models.utils import batch_shuffle_distributed

    return lambda images: batch_shuffle_distributed(images)[0]


# --- Norms ----------------------------------------------------------------------------------------------------------


class _AllReduce(torch.autograd.Function):
    """fvcore's differentiable all-reduce: an all-gather and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        everyone = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x)
        return torch.stack(everyone).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient)
        return gradient


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """detectron2 ``layers/batch_norm.py``: the mean over ranks of E[x] and E[x^2], variance E[x^2] - E[x]^2."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        mean, square = x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))
        if dist.is_initialized() and dist.get_world_size() > 1:
            both = _AllReduce.apply(torch.cat([mean, square])) * (1.0 / dist.get_world_size())
            mean, square = both.split(self.num_features)
        var = square - mean * mean
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        running_mean, running_var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        running_mean += self.momentum * (mean.detach() - running_mean)
        running_var += self.momentum * (var.detach() - running_var)
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class SplitBatchNorm(nn.Module):
    """timm ``layers/split_batchnorm.py``: a batch norm for each chunk, and a concatenation."""

    def __init__(self, num_features: int, num_splits: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(num_features) for _ in range(num_splits))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(chunk) for norm, chunk in zip(self.norms, x.chunk(len(self.norms)), strict=True)])


class FrozenBatchNorm(nn.Module):
    """detectron2's ``FrozenBatchNorm2d`` where a gradient is needed: ``x * scale + shift``."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + self.eps).rsqrt()
        shift = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)


def installed_timm_split(num_features: int, num_splits: int) -> nn.Module:
    from timm.layers.split_batchnorm import SplitBatchNorm2d

    return SplitBatchNorm2d(num_features, num_splits=num_splits)


def installed_lightly_split(num_features: int, num_splits: int) -> nn.Module:
    from lightly.models.batchnorm import SplitBatchNorm as LightlySplitBatchNorm

    return LightlySplitBatchNorm(num_features, num_splits)


def installed_torchvision_frozen(num_features: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(num_features)


def installed_detectron2_frozen(num_features: int) -> nn.Module:
    from detectron2.layers.batch_norm import FrozenBatchNorm2d

    return FrozenBatchNorm2d(num_features)


def installed_detectron2_sync(num_features: int) -> nn.Module:
    from detectron2.layers.batch_norm import NaiveSyncBatchNorm as Detectron2SyncBatchNorm

    return Detectron2SyncBatchNorm(num_features)
