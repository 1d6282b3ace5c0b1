"""Batch Renormalization: the batch's statistics, corrected towards the moving averages."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from leakfree.norms.moments import BatchMoments
from leakfree.norms.partitioned import BatchNorm
from leakfree.norms.past import Past
from leakfree.partition import Partition

__all__ = ["BatchRenorm"]


class BatchRenorm(BatchNorm):
    """BatchRenorm: ``xhat = (x - mu_B) / sigma_B * r + d``, with r and d constants to the gradient.

    ``r = clip(sigma_B / sigma, 1 / r_max, r_max)`` and ``d = clip((mu_B - mu) / sigma, -d_max, d_max)`` with the
    moving averages from before this forward, ``sigma_B = sqrt(var_B + eps)``. Where neither is clipped, a sample is
    normalized by the moving averages alone, in training as in eval; the gradient still goes through mu_B and sigma_B.
    Afterwards ``mu += momentum * (mu_B - mu)`` and ``sigma += momentum * (sigma_B - sigma)``. ``running_var`` holds
    ``sigma**2 - eps``, so checkpoints are those of a batch norm and eval is that of one.

    The limits grow with the number of forwards, ``num_batches_tracked``: 1 and 0 (plain BN) until ``ramp[0]``, then
    linearly to ``d_max`` at ``ramp[1]`` and ``r_max`` at ``ramp[2]``. The paper's ramp is for its run of 100,000s of
    steps; :class:`leakfree.schedules.RenormSchedule` scales it to yours.
    Inside a scope with base groups each group is a batch of its own, and the buffers receive their mean.

    Args:
        r_max, d_max: limits of the correction when the ramp is over; at least 1 and 0.
        ramp: three ascending numbers of forwards; None = the full limits from the start.
        momentum: weight of the new value (the paper's alpha); None = plain average.

    Reference: Ioffe 2017, "Batch Renormalization", algorithm 1 and section 3. Choices: eps inside the root;
    sigma is averaged, not its square; no Bessel correction.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        ramp: tuple[int, int, int] | None = (5_000, 25_000, 40_000),
        momentum: float | None = 0.01,
        dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_features, momentum=momentum, dim=dim, **options)  # type: ignore[arg-type]
        if r_max < 1 or d_max < 0:
            raise ValueError(f"r_max must be at least 1 and d_max at least 0, got {r_max} and {d_max}")
        if not self.track_running_stats:
            raise ValueError("BatchRenorm corrects towards its running statistics: track_running_stats must be True")
        self.r_max, self.d_max = r_max, d_max
        self.ramp = ramp
        self._past = Past(type(self).__name__)

    @property
    def ramp(self) -> tuple[int, int, int] | None:
        return self._ramp

    @ramp.setter
    def ramp(self, marks: tuple[int, int, int] | None) -> None:
        if marks is not None and (len(marks) != 3 or not 0 <= marks[0] < marks[1] or not marks[0] < marks[2]):
            raise ValueError(f"ramp takes (start, end of d, end of r) with start before both ends, got {marks}")
        self._ramp = None if marks is None else (int(marks[0]), int(marks[1]), int(marks[2]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, ramp={self.ramp}"

    @property
    def _is_plain(self) -> bool:
        return False

    def limits(self) -> tuple[Tensor, Tensor]:
        """(r_max, d_max) of the next training forward, float64 ()."""
        assert self.num_batches_tracked is not None
        done = self.num_batches_tracked.double()
        if self.ramp is None:
            return torch.full_like(done, self.r_max), torch.full_like(done, self.d_max)
        start, end_d, end_r = self.ramp
        grown = ((done - start) / (end - start) for end in (end_r, end_d))
        r, d = (share.clamp(0, 1) for share in grown)
        return 1 + (self.r_max - 1) * r, self.d_max * d

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        partition = dataclasses.replace(partition)  # lives as long as the graph of this forward
        batch = BatchMoments(x, partition)
        scale = torch.rsqrt(batch.var + self.eps)
        shift = -batch.mean * scale
        if self.training and not self._measured:
            if tracked:
                r, d = self._correct(batch, 1 / scale.detach())
                self._past.keep(x, (r, d), partition)
            else:
                r, d = self._past.again(x)  # the moving averages have moved on
            scale, shift = scale * r, shift * r + d
        if self.weight is not None:
            scale, shift = scale * self.weight.double(), shift * self.weight.double()
        return batch.affine(scale, shift if self.bias is None else shift + self.bias.double())

    @torch.no_grad()
    def _correct(self, batch: BatchMoments, batch_std: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, (G, C), from the moving averages before this forward, which then follow it."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, std = self.running_mean.double(), (self.running_var.double() + self.eps).sqrt()
        r_max, d_max = self.limits()
        r = (batch_std / std).clamp(1 / r_max, r_max)
        d = ((batch.mean - mean) / std).clamp(-d_max, d_max)
        total = batch.count.sum()
        weight = batch.count / total.clamp(min=1)
        share = self._count_forward(total)
        new_std = std + share * (weight @ batch_std - std)
        new_var = (new_std * new_std - self.eps).clamp(min=0)
        self.running_mean.copy_(mean + share * (weight @ batch.mean - mean))
        self.running_var.copy_(torch.where(share > 0, new_var, self.running_var.double()))  # else bit for bit
        return r, d
