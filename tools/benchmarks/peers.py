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

    def concat_all(self, x: Tensor) -> tuple[Tensor, list[int]]:
        sizes = self.gather_size(len(x), x.device)
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: len(x)] = x
        everyone = self.gather_rows(padded)
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)]), sizes

    def shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, *) rows -> (M, *) rows of all ranks, and what ``unshuffle`` needs."""
        rows, sizes = self.concat_all(x)
        order = torch.randperm(len(rows), device=x.device)
        dist.broadcast(order, src=0)
        shares = torch.split(order, max(1, math.ceil(len(rows) / dist.get_world_size())))
        rank = dist.get_rank()
        mine = shares[rank] if rank < len(shares) else order[:0]
        start = sum(sizes[:rank])
        return rows[mine], torch.argsort(order)[start : start + sizes[rank]]

    def unshuffle(self, x: Tensor, home: Tensor) -> Tensor:
        """(M, *) -> (N, *): the rows of this rank, in their order."""
        return self.concat_all(x)[0][home]


def installed_detectron2_shuffle() -> AllGatherShuffle:
    """The same with detectron2's own pickled exchange of sizes and fvcore's all-gather."""
    from detectron2.utils import comm
    from fvcore.nn.distributed import differentiable_all_gather

    return AllGatherShuffle(differentiable_all_gather, lambda size, device: comm.all_gather(size))


def concat_all(x: Tensor) -> Tensor:
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x)
    return torch.cat(everyone)


@torch.no_grad()
def moco_shuffle_and_home(images: Tensor) -> tuple[Tensor, Tensor]:
    """MoCo ``moco/builder.py`` (He et al. 2020, section 3.3): equal batches, no gradient; and where rows stand."""
    rows = concat_all(images)
    order = torch.randperm(len(rows), device=images.device)
    dist.broadcast(order, src=0)
    return rows[order.view(dist.get_world_size(), -1)[dist.get_rank()]], torch.argsort(order)


def moco_shuffle(images: Tensor) -> Tensor:
    return moco_shuffle_and_home(images)[0]


def installed_lightly_shuffle_and_home() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    from lightly.models.utils import batch_shuffle_distributed

    return batch_shuffle_distributed


def installed_lightly_shuffle() -> Callable[[Tensor], Tensor]:
    shuffle = installed_lightly_shuffle_and_home()
    return lambda images: shuffle(images)[0]


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


def _column(table: Tensor) -> Tensor:
    return table.view(1, -1, 1, 1)


class NaiveBatchRenorm(nn.BatchNorm2d):
    """Ioffe 2017, algorithm 1, an operation for each step of it."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + self.eps).sqrt()
        running_mean, running_std = self.get_buffer("running_mean"), self.get_buffer("running_var")
        r = (std.detach() / running_std).clamp(1 / 3, 3)
        d = ((mean.detach() - running_mean) / running_std).clamp(-5, 5)
        xhat = (x - _column(mean)) / _column(std) * _column(r) + _column(d)
        with torch.no_grad():
            running_mean += 0.01 * (mean - running_mean)
            running_std += 0.01 * (std - running_std)
        return xhat * _column(self.weight) + _column(self.bias)


class NaiveBatchGroupNorm(nn.BatchNorm2d):
    """Zhou et al. 2020 (arXiv 2012.02782), section 3: the tensor reshaped to groups, normalized, reshaped back."""

    def __init__(self, num_features: int, num_groups: int) -> None:
        super().__init__(num_features)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), self.num_groups, -1)
        mean = groups.mean((0, 2), keepdim=True)
        var = groups.var((0, 2), unbiased=False, keepdim=True)
        xhat = ((groups - mean) / (var + self.eps).sqrt()).reshape(x.shape)
        return xhat * _column(self.weight) + _column(self.bias)


class NaiveMemorizedBatchNorm(nn.BatchNorm2d):
    """Guo et al. 2018 (arXiv 2010.04947) as ``MBN`` reads it: means of x and x^2 over the last batches."""

    def __init__(self, num_features: int, memory: int = 4, decay: float = 0.9) -> None:
        super().__init__(num_features)
        self.memory, self.decay = memory, decay
        self.past: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        mean, square = x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))
        entries = [(mean, square), *self.past]
        self.past = [(m.detach(), q.detach()) for m, q in entries][: self.memory - 1]
        weights = [self.decay**age for age in range(len(entries))]
        mean, square = (
            sum(w * entry[i] for w, entry in zip(weights, entries, strict=True)) / sum(weights) for i in range(2)
        )
        xhat = (x - _column(mean)) / (_column(square - mean * mean) + self.eps).sqrt()
        return xhat * _column(self.weight) + _column(self.bias)


class NaiveInstanceEnhancement(nn.Module):
    """Liang et al. 2020, section 3: a batch norm without affine map, and a gate from the raw input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.gate_weight = nn.Parameter(torch.zeros(num_features))
        self.gate_bias = nn.Parameter(-torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        gate = torch.sigmoid(mean * _column(self.gate_weight) + _column(self.gate_bias))
        return self.norm(x) * (_column(self.weight) * gate) + _column(self.bias)


class NaiveProxyNorm(nn.Module):
    """Labatie et al. 2021, section 4, with LayerNorm and ReLU; the proxy's statistics by quadrature in each forward."""

    def __init__(self, num_features: int, points: int = 200) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.proxy_weight = nn.Parameter(torch.zeros(num_features))
        self.proxy_bias = nn.Parameter(torch.zeros(num_features))
        grid = 2 * (torch.arange(points) + 0.5) / points - 1
        self.register_buffer("quantiles", math.sqrt(2) * torch.erfinv(grid))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.group_norm(x, 1)
        z = torch.relu(y * _column(self.weight) + _column(self.bias))
        proxy = (1 + self.proxy_weight) * self.get_buffer("quantiles")[:, None] + self.proxy_bias
        response = torch.relu(proxy * self.weight + self.bias)
        mean, var = response.mean(0), response.var(0, unbiased=False)
        return (z - _column(mean)) / (_column(var) + 0.03).sqrt()


class NaiveCrossIteration(nn.Module):
    """Yao et al. 2021 (arXiv 2002.05712), equations 3-8, on a convolution, with the derivatives by autograd.

    As the authors do it, d mean / d W and d E[y^2] / d W and the weights of each of the last iterations are kept.
    """

    def __init__(self, conv: nn.Conv2d, past: int = 3) -> None:
        super().__init__()
        self.conv = conv
        self.past = past
        self.weight = nn.Parameter(torch.ones(conv.out_channels))
        self.bias = nn.Parameter(torch.zeros(conv.out_channels))
        self.window: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        weight = self.conv.weight
        mean, square = y.mean((0, 2, 3)), (y * y).mean((0, 2, 3))
        slopes = [torch.autograd.grad(table.sum(), weight, retain_graph=True)[0] for table in (mean, square)]
        means, squares = [mean], [square]
        for old_mean, old_square, mean_slope, square_slope, old_weight in self.window:
            step = weight.detach() - old_weight
            means.append(old_mean + (mean_slope * step).sum((1, 2, 3)))
            squares.append(old_square + (square_slope * step).sum((1, 2, 3)))
        here = (mean.detach(), square.detach(), *slopes, weight.detach().clone())
        self.window = [here, *self.window][: self.past]
        center = torch.stack(means).mean(0)
        second = torch.stack([torch.maximum(q, m * m) for m, q in zip(means, squares, strict=True)]).mean(0)
        xhat = (y - _column(center)) / (_column(second - center * center) + 1e-5).sqrt()
        return xhat * _column(self.weight) + _column(self.bias)

    def state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for entry in self.window for tensor in entry)


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


def installed_lightly_knn() -> Callable[..., Tensor]:
    from lightly.utils.benchmarking import knn_predict

    return knn_predict
