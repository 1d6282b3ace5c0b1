"""Batch Group Normalization: channels share statistics too, in groups, over the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leakfree.norms.moments import BatchMoments
from leakfree.norms.partitioned import BatchNorm
from leakfree.partition import Partition

__all__ = ["BatchGroupNorm"]


class BatchGroupNorm(BatchNorm):
    """BGN: each group of consecutive channels shares one mean and variance, over the batch and all positions.

    With as many groups as channels it is BN, bit for bit; on a batch of one it is GN; one group normalizes the whole
    tensor. Weight and bias are per channel. Statistics are shared over the batch as in BN, so it leaks as BN does.
    Inside a scope with base groups of rows, each of those is a batch of its own.

    ``running_mean`` and ``running_var`` keep BN's shape (C,): training writes the moving average of a group's mean
    and unbiased variance into each of its channels. So a BN with the same buffers is the same function in eval, and
    ``convert_norms(model, "BN")`` keeps eval outputs. ``precise_bn`` fills them alike. Where the channels of a group
    differ (the buffers come from a BN), eval and training first pool them by :meth:`pool_channels`, which leaves equal
    ones as they are.

    Args:
        num_groups: G of the layer is ``min(num_groups, num_features)`` and must divide ``num_features``. Few groups
            suit small batches: a statistic is taken of N * C / G * H * W values.
        num_features, dim, eps, momentum, affine, track_running_stats: as for the other batch norms.

    Attributes:
        num_groups: G.

    Raises:
        ValueError: G is less than 1 or does not divide the channels.

    Reference: Zhou et al. 2020, "Batch Group Normalization" (arXiv 2012.02782). Choices: no more groups than
    channels (more would split the plane of a channel and tie the layer to one resolution); the same G in every layer
    that has the channels; moving averages as BN's.
    """

    def __init__(self, num_features: int, *, num_groups: int = 32, dim: int | None = None, **options: object) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        groups = min(num_groups, num_features)
        if groups < 1 or num_features % groups:
            divisors = [str(n) for n in range(1, num_features + 1) if num_features % n == 0]
            raise ValueError(
                f"num_groups={num_groups} does not divide {num_features} channels; use one of {', '.join(divisors)}"
            )
        self.num_groups = groups

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"

    @property
    def _is_plain(self) -> bool:
        return self._is_batch_norm and super()._is_plain

    @property
    def _is_batch_norm(self) -> bool:
        return self.num_groups == self.num_features

    @property
    def channels_per_group(self) -> int:
        return self.num_features // self.num_groups

    def pool_channels(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of channels -> moments of their groups, repeated for each channel: (*, C) each, in float64.

        The mean of the means, and the mean of the variances plus the variance between the means. That is exact for
        biased variances, of equally many values in each channel.
        """
        shape = (*mean.shape[:-1], self.num_groups, self.channels_per_group)
        means, variances = mean.double().reshape(shape), var.double().reshape(shape)
        pooled_mean = means.mean(-1, keepdim=True)
        pooled_var = (variances + (means - pooled_mean).square()).mean(-1, keepdim=True)
        # Dense also for one group, where this is else a view: the backward of torch's kernel takes no strides.
        mean, var = (pooled.expand(shape).reshape(mean.shape).contiguous() for pooled in (pooled_mean, pooled_var))
        return mean, var

    def _forward_running(self, x: Tensor) -> Tensor:
        if self._is_batch_norm or self.running_mean is None or self.running_var is None:
            return super()._forward_running(x)
        mean, var = (
            pooled.to(self.running_mean.dtype) for pooled in self.pool_channels(self.running_mean, self.running_var)
        )
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        if self._is_batch_norm:
            return super()._normalize(x, partition, tracked)
        batch = BatchMoments(x, partition)
        mean, var = self.pool_channels(batch.mean, batch.var)
        if tracked:
            self._track(*batch.pooled())
        return batch.normalize(mean, var, self.eps, self.weight, self.bias)

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Count one forward: count () of each channel, mean and biased var (C,) of the channels."""
        assert self.running_mean is not None
        assert self.running_var is not None
        buffers = (self.running_mean, self.running_var)
        for buffer, pooled in zip(buffers, self.pool_channels(*buffers), strict=True):
            buffer.copy_(torch.where(count > 0, pooled, buffer.double()))
        self._update_running(count * self.channels_per_group, *self.pool_channels(mean, var))
