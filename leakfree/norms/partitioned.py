"""BN, SyncBN, GhostBN, ShuffleBN, BatchStatBN: one batch norm, five answers to "who shares statistics".

A subclass only answers :meth:`PartitionedBatchNorm.partition`. Everything else (normalization, running
statistics, modes) is here once. In eval all of them are the same function of their buffers, so their
checkpoints are interchangeable, with torch's ``nn.BatchNorm*d`` too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from leakfree.distributed import Group
from leakfree.errors import LeakfreeError
from leakfree.keeping import attributes_kept
from leakfree.norms.functional import batch_statistics_transformed, is_transformed
from leakfree.norms.statistics import partitioned_batch_norm
from leakfree.norms.traced import traced_call
from leakfree.partition import Partition, current_scope
from leakfree.recomputation import Replay, recomputing
from leakfree.shuffle.exchange import draw_groups
from leakfree.shuffle.plan import GroupDraw, mix_seed

__all__ = [
    "BatchNorm",
    "BatchStatBatchNorm",
    "GhostBatchNorm",
    "PartitionedBatchNorm",
    "ShuffleBatchNorm",
    "SyncBatchNorm",
    "batch_statistics",
]


class State(NamedTuple):
    """The parameters and buffers of a batch norm with one set of statistics: (C,), the counter ()."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


class PartitionedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are shared inside the groups of a partition.

    Train: each group is normalized with its own mean and biased variance; the running buffers receive
    the pooled moments of all groups (variance unbiased, as torch's), once per forward. A forward
    without rows (on all ranks the partition spans) leaves the buffers and their counter untouched.
    Eval: ``running_mean`` and ``running_var``, or the batch's own with ``track_running_stats=False``.
    Under activation checkpointing the recomputed forward finds the groups of the first one again, and
    updates nothing a second time.

    Args:
        num_features: C of an input (N, C, *).
        dim: 1, 2 or 3 to check the input: (N, C) or (N, C, L), (N, C, H, W), (N, C, D, H, W);
            None takes any.
        eps, momentum, affine, track_running_stats: as in torch; ``momentum`` weighs the new value.

    Attributes:
        last_groups: int64 (N,), the group of each row in the last training forward; None for one group.
        frozen: while True, training mode uses the running statistics and leaves them alone
            (set by ``leakfree.schedules.FreezeBN``).

    Raises:
        ValueError: input of another rank or channel count than promised.
    """

    last_groups: Tensor | None
    _draws = False  # whether partitions are random

    def __init__(
        self,
        num_features: int,
        *,
        dim: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if dim not in (None, 1, 2, 3):
            raise ValueError(f"dim must be 1, 2 or 3, got {dim!r}")
        self.dim = dim
        self.frozen = False
        self.last_groups = None
        self._measured = False  # see batch_statistics
        self._was_in_scope = False
        self._replay: Replay[Partition] = Replay(type(self).__name__, Partition.same_as)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dim={self.dim}" + (", frozen=True" if self.frozen else "")

    def partition(self, x: Tensor) -> Partition:
        """The groups of the rows of ``x`` (N, C, *). Called once per training forward."""
        raise NotImplementedError

    @property
    def batch_statistics_in_eval(self) -> bool:
        return not self.track_running_stats

    def _check_input_dim(self, input: Tensor) -> None:
        valid = {None: range(2, 6), 1: (2, 3), 2: (4,), 3: (5,)}[self.dim]
        if input.ndim not in valid or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}({self.num_features}, dim={self.dim}) expects (N, {self.num_features}, *) "
                f"with {' or '.join(map(str, valid))} dimensions, got {tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise ValueError(f"{type(self).__name__} expects floating point numbers, got {input.dtype}")

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        if torch.compiler.is_compiling() and self.training and not self._is_plain:
            return self._forward_eagerly(input)  # a compiler would not see that a forward is recomputed
        if is_transformed() and self._takes_batch_statistics:
            with batch_statistics_transformed(self):
                return self._forward(input)
        return self._forward(input)

    @torch.compiler.disable
    def _forward_eagerly(self, x: Tensor) -> Tensor:
        return self._forward(x)

    @property
    def _is_plain(self) -> bool:
        """Whether this forward shares statistics as torch's batch norm would, so that compilers may have it."""
        return False

    def _forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self._takes_batch_statistics:
            return self._forward_running(input)
        updates = self.training and not self.frozen and not self._measured
        own = self.training and not self._measured
        again = own and recomputing()
        partition = self._partition(input, again) if own else _on_device(self._partition_in_eval(input), input)
        if partition.groups is not None and len(partition.groups) != len(input):
            raise ValueError(
                f"{type(self).__name__}: the groups cover {len(partition.groups)} rows, the input has {len(input)}"
            )
        if updates and not again:
            self.last_groups = partition.groups
        return self._normalize(input, partition, updates and self.track_running_stats and not again)

    @property
    def _takes_batch_statistics(self) -> bool:
        """Whether a forward would now normalize with the batch's own statistics."""
        return self._measured or (not self.frozen and (self.training or self.batch_statistics_in_eval))

    def _forward_running(self, x: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            raise LeakfreeError(f"{type(self).__name__}: frozen, but it keeps no running statistics")
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        """Normalize with the moments of the groups of ``x``; if ``tracked``, the running buffers receive them."""
        if partition.groups is None and not partition.synchronized:
            return self._forward_native(x, tracked)
        y, moments = partitioned_batch_norm(x, partition, self.weight, self.bias, self.eps)
        if tracked:
            self._update_running(*moments.pooled())
        return y

    def _partition_in_eval(self, x: Tensor) -> Partition:
        """Who shares the batch's own statistics outside training.

        Evaluations have uneven batches, so nothing may be communicated there.
        """
        return _base_partition()

    def _partition(self, x: Tensor, again: bool) -> Partition:
        """:meth:`partition`, or what it was when the forward that is now recomputed ran."""
        if again:
            before = self._replay.recall(x)
            if before is not None:
                return before
            if self._draws or self._was_in_scope:
                raise RuntimeError(
                    f"{type(self).__name__}: this forward runs inside a backward, but its input is that of no recent "
                    "forward, so the groups of that cannot be found again; keep the layer out of the checkpointed part"
                )
        partition = _on_device(self.partition(x), x)
        scoped = current_scope() is not None
        if scoped:
            self._was_in_scope = True
        if (self._draws or scoped) and not again and not torch.compiler.is_compiling():
            self._replay.remember(x, dataclasses.replace(partition), graph=partition)
        return partition

    def _forward_native(self, x: Tensor, tracked: bool, state: State | None = None) -> Tensor:
        """One group on one rank: torch's fused kernel, with the layer's own state by default."""
        weight, bias, running_mean, running_var, counter = state or State(
            self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked
        )
        if not len(x):  # torch's kernel takes no empty batch on every device; the graph must stay connected
            y = x if weight is None else x * _column(weight, x)
            return (y if bias is None else y + _column(bias, x)).to(x.dtype)
        if running_mean is None or running_var is None or self._measured or not self.training:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if not tracked:  # recomputed: checkpointing wants as many tensors kept for the backward as in the first forward
            return F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, True, 0.0, self.eps)
        assert counter is not None
        counter.add_(1)
        momentum = 1.0 / float(counter) if self.momentum is None else self.momentum
        # `data`: torch keeps them for the backward, though unused, and another forward may change them before it
        return F.batch_norm(x, running_mean.data, running_var.data, weight, bias, True, momentum, self.eps)

    def _refuse_single_value(self, x: Tensor, partition: Partition) -> None:
        """Raise as torch does where a channel would be normalized by the variance of one value."""
        alone = self.training and partition.groups is None and not partition.synchronized
        if alone and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")

    @torch.no_grad()
    def _update_running(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Count one forward: count () or (1,), mean and biased var (C,), or (D,) and (D, C) where buffers have D rows.

        What saw no values (count 0) stays as it is.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        share = self._count_forward(count)
        unbiased = var * (count / (count - 1).clamp(min=1))[..., None]
        for buffer, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            buffer.lerp_(new.to(buffer.dtype), share.to(buffer.dtype))

    def _count_forward(self, count: Tensor) -> Tensor:
        """Count a forward over ``count`` values; the share that its statistics get in the buffers, float64.

        It has a last dimension of 1 beside the shape of ``count``. Where there were no values it is 0.
        """
        assert self.num_batches_tracked is not None
        seen = count > 0  # a tensor: no device synchronization
        self.num_batches_tracked.add_(seen.to(self.num_batches_tracked.dtype))
        momentum = 1.0 / self.num_batches_tracked.clamp(min=1).double() if self.momentum is None else self.momentum
        return (seen.double() * momentum)[..., None]


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *([1] * (like.ndim - 2)))


def _base_partition() -> Partition:
    scope = current_scope()
    return scope.base if scope is not None and scope.base is not None else Partition()


def _on_device(partition: Partition, x: Tensor) -> Partition:
    if partition.groups is None or partition.groups.device == x.device:
        return partition
    return dataclasses.replace(partition, groups=partition.groups.to(x.device, non_blocking=True))


class BatchNorm(PartitionedBatchNorm):
    """BN: the rows of this rank share statistics; inside a scope, the rows of each of its base groups.

    Outside a :func:`leakfree.partition.normalization_scope` it is torch's batch norm, bit for bit.
    Reference: Ioffe & Szegedy 2015.
    """

    def partition(self, x: Tensor) -> Partition:
        return _base_partition()

    @property
    def _is_plain(self) -> bool:
        # Once it ran in a scope, a forward outside may be the recomputation of one inside.
        return current_scope() is None and not self._was_in_scope


class BatchStatBatchNorm(BatchNorm):
    """BN that uses the mini-batch's statistics in eval too; eval neither reads nor writes buffers.

    A diagnostic that takes train/test inconsistency out of a comparison, and a remedy for R-CNN heads
    (Wu & Johnson 2021, section 3.3). Its predictions depend on the batch's other samples.
    """

    @property
    def batch_statistics_in_eval(self) -> bool:
        return True


class SyncBatchNorm(PartitionedBatchNorm):
    """SyncBN: all rows of all ranks share statistics, weighted by values (N*H*W), empty ranks included.

    Equals BN on the concatenated batch: output, gradients and buffers (torch's ``SyncBatchNorm``
    definition; detectron2's ``NaiveSyncBatchNorm`` weighs ranks equally instead). Runs on CPU too.
    Every rank must run it equally often, and the inputs of all ranks, empty ones too, must agree on
    whether they need a gradient (behind a layer with weights they do).
    """

    def __init__(
        self, num_features: int, *, process_group: Group = None, dim: int | None = None, **options: object
    ) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        self.process_group = process_group

    def partition(self, x: Tensor) -> Partition:
        return Partition(across_ranks=True, process_group=self.process_group)


class GhostBatchNorm(PartitionedBatchNorm):
    """GhostBN: consecutive chunks of about ``group_size`` rows of this rank share statistics.

    N rows make max(1, N // group_size) chunks whose sizes differ by at most one, so no chunk is
    smaller than ``group_size`` unless the batch is. Buffers receive the pooled moments of all chunks
    (one update per forward, unlike the sequential rule of Hoffer et al. 2017).
    """

    def __init__(self, num_features: int, *, group_size: int, dim: int | None = None, **options: object) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1 row, got {group_size}")
        self.group_size = group_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"

    def partition(self, x: Tensor) -> Partition:
        return Partition.chunks_of(self.group_size, len(x))


class ShuffleBatchNorm(PartitionedBatchNorm):
    """ShuffleBN: balanced random groups over the rows of all ranks; no row moves.

    Equals shuffle -> BN per rank -> unshuffle (MoCo, He et al. 2020, section 3.3; RoI shuffle, Wu &
    Johnson 2021, section 6) in output and gradients, at the cost of two small all-reduces; the buffers
    receive the pooled moments of all groups, alike on every rank. Works in one process.

    The draw is a function of ``seed`` and ``num_batches_tracked``, so a checkpoint continues it, and
    activation checkpointing repeats it.

    Args:
        num_groups: over all ranks; by default as many as the enclosing scope's base groups, else the
            world size, at least 2. One group has no effect and says so.
        seed: the same on every rank; different heads should take different seeds.
        draw: "head": all layers inside one :func:`leakfree.partition.normalization_scope` see the same
            groups in a forward, as if the rows had moved. "layer": each call in the scope draws anew, which
            mixes more and is another method. Outside a scope a layer knows no head: its groups depend on
            its own seed and count of forwards only.
        process_group: the ranks to draw over; "node" for those of this machine.
    """

    _draws = True

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = None,
        seed: int = 0,
        draw: str = "head",
        process_group: Group = None,
        dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        if num_groups is not None and num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        if draw not in ("head", "layer"):
            raise ValueError(f"draw must be 'head' or 'layer', got {draw!r}")
        if self.num_batches_tracked is None:
            raise ValueError("ShuffleBN counts its draws in num_batches_tracked: track_running_stats must be True")
        self.num_groups = num_groups
        self.seed = seed
        self.draw = draw
        self.process_group = process_group
        self._told: set[str] = set()

    def extra_repr(self) -> str:
        own = f"num_groups={self.num_groups}, seed={self.seed}" + ("" if self.draw == "head" else ", draw='layer'")
        return f"{super().extra_repr()}, {own}"

    @torch.compiler.disable  # integers on the host, and a collective
    def partition(self, x: Tensor) -> Partition:
        draw = self._draw(len(x))
        if draw.num_groups == 1:
            self._say_once("with a single group the shuffle has no effect; set num_groups >= 2")
            return Partition(across_ranks=True, process_group=self.process_group)
        if 0 < draw.total < 2 * draw.num_groups:
            self._say_once(
                f"{draw.num_groups} groups for {draw.total} rows leave groups of a single row, normalized by itself"
            )
        return Partition(torch.from_numpy(draw.groups), draw.num_groups, True, self.process_group)

    def _draw(self, num_rows: int) -> GroupDraw:
        assert self.num_batches_tracked is not None
        scope = current_scope()
        index, base_groups, seed = int(self.num_batches_tracked), None, self.seed

        def draw() -> GroupDraw:
            return draw_groups(
                num_rows, self.num_groups, seed=seed, index=index, base_groups=base_groups, group=self.process_group
            )[0]

        if scope is None:
            return draw()
        base_groups = scope.base_groups()
        if self.draw == "layer":
            scope.num_shuffles += 1
            seed = mix_seed(self.seed, scope.num_shuffles)
            return draw()
        shared = scope.share(("shuffle", self.num_groups, self.seed, self.process_group), draw)
        assert isinstance(shared, GroupDraw)
        return shared

    def _say_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"ShuffleBN: {what}", stacklevel=4)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, every :class:`PartitionedBatchNorm` of ``model`` normalizes with the batch's own statistics, in any mode.

    Other norms (torch's own, FrozenBatchNorm) stay as they are; convert them first. Groups are those of
    the enclosing :func:`leakfree.partition.normalization_scope` (one group without), whatever the layer's
    own partition: the same checkpoint can be measured under per-image and under random groups. Buffers are
    neither read nor written; frozen layers take part.
    """
    layers = [module for module in model.modules() if isinstance(module, PartitionedBatchNorm)]
    with attributes_kept(layers, "_measured"):
        for layer in layers:
            layer._measured = True
        yield
