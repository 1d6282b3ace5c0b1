"""Memorized Batch Normalization: statistics of the last few batches, and the Double-Forward that keeps them fresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.errors import LeakfreeError
from leakfree.keeping import random_states_kept, state_kept
from leakfree.norms.moments import BatchMoments
from leakfree.norms.partitioned import BatchNorm
from leakfree.norms.past import Past
from leakfree.partition import Partition

__all__ = ["MemorizedBatchNorm", "double_forward"]


class MemorizedBatchNorm(BatchNorm):
    """MBN: normalizes with the statistics of this batch and of the batches before it, in training as in eval.

    Of the last ``memory`` batches, that of age s (0 is the current one) has weight ``a_s = decay**s``, normalized to a
    sum of 1 over the batches there are: ``mean = sum a_s mean_s`` and ``var = sum a_s (var_s + (mean_s - mean)**2)``,
    which includes the variance between batches. The gradient goes through the current batch's moments; the older ones
    are constants. Buffers then hold this mean and (biased) variance, so that eval normalizes by the rule of training.

    A batch without rows is not remembered. Inside a scope with base groups of rows, each group is a current
    batch of its own, and their pooled moments are remembered. Ranks remember their own batches: under DDP pass
    ``broadcast_buffers=False``, else every forward gives all ranks the memory of rank 0.

    In the state dict beside a batch norm's: the memory. A checkpoint of a batch norm loads with an empty one.
    With one entry the layer is BN in training.

    Args:
        memory: batches to use, the current one included; at least 1.
        decay: weight of a batch in units of the next one's, in (0, 1]; 1 = uniform.
        momentum: unused here (no moving average is kept); for the way back to a batch norm.
        num_features, dim, eps, affine: as for the other batch norms.

    Attributes:
        memory_mean, memory_var: (memory, C), mean and biased variance of the last batches, newest first.
        memory_count: int64 (), how many of them there are.
        running_mean, running_var: (C,), those of the memory together. ``precise_bn`` can replace them for eval; the
            next training forward makes them the memory's again.

    Reference: Guo et al. 2018, "Double Forward Propagation for Memorized Batch Normalization" (arXiv 2010.04947).
    Choices where the source could not be read: weights, gradient, and the combined variance.
    """

    memory_mean: Tensor
    memory_var: Tensor
    memory_count: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        memory: int = 4,
        decay: float = 0.5,
        momentum: float | None = 0.1,
        dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_features, momentum=momentum, dim=dim, **options)  # type: ignore[arg-type]
        if memory < 1:
            raise ValueError(f"memory must be at least 1 batch, the current one, got {memory}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        if not self.track_running_stats:
            raise ValueError("MBN keeps its memory's statistics for eval: track_running_stats must be True")
        self.memory, self.decay = memory, decay
        for name, value in self._empty_memory().items():
            self.register_buffer(name, value)
        self._past = Past(type(self).__name__)
        self._refreshes = False  # see double_forward
        self._refreshed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_refreshes": False}  # a copy made inside of double_forward is outside of it

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, memory={self.memory}, decay={self.decay}"

    @property
    def _is_plain(self) -> bool:
        return False

    def _empty_memory(self) -> dict[str, Tensor]:
        return {
            "memory_mean": torch.zeros(self.memory, self.num_features),
            "memory_var": torch.ones(self.memory, self.num_features),
            "memory_count": torch.zeros((), dtype=torch.int64),
        }

    def reset_running_stats(self) -> None:
        """Forget everything."""
        super().reset_running_stats()
        if "memory_count" in self._buffers:  # torch's constructor calls this first
            for name, value in self._empty_memory().items():
                self.get_buffer(name).copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        memory = self._empty_memory()
        if f"{prefix}running_mean" in state_dict and not any(f"{prefix}{name}" in state_dict for name in memory):
            state_dict.update({f"{prefix}{name}": value for name, value in memory.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        if self._measured or not self.training:
            return super()._normalize(x, partition, tracked)
        partition = dataclasses.replace(partition)  # lives as long as the graph of this forward
        batch = BatchMoments(x, partition)
        if tracked:
            older = self._older()
            self._memorize(batch, older)
            if not self._refreshes:
                self._past.keep(x, older, partition)
        else:
            older = self._past.again(x)  # the memory has moved on
        mean, var = _combine(batch.mean, batch.var, older)
        return batch.normalize(mean, var, self.eps, self.weight, self.bias)

    @torch.no_grad()
    def _older(self) -> tuple[Tensor, ...]:
        """(weight of the current batch (), mean (C,), variance (C,) of the older ones together), float64."""
        newest = int(self._refreshes)  # where it is taken again, the newest entry is the current batch
        rows = slice(newest, newest + self.memory - 1)
        mean, var = self.memory_mean[rows].double(), self.memory_var[rows].double()
        ages = torch.arange(1, self.memory, device=mean.device)
        weight = (ages <= self.memory_count - newest) * self.decay ** ages.double()
        total = weight.sum()
        weight = weight / torch.where(total > 0, total, 1.0)
        center = weight @ mean
        return 1 / (1 + total), center, weight @ (var + (mean - center).square())

    @torch.no_grad()
    def _memorize(self, batch: BatchMoments, older: tuple[Tensor, ...]) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        count, mean, var = batch.pooled()
        seen = count > 0
        if self._refreshes:
            if self._refreshed:
                raise LeakfreeError(
                    "double_forward: an MBN layer ran more than once inside, so that it cannot be told which of its "
                    "memory's entries to replace; open it once for each forward of a model that runs each layer once"
                )
            self._refreshed = True
            seen = seen & (self.memory_count > 0)
        else:
            self._count_forward(count)
            self.memory_count.copy_(torch.where(seen, self.memory_count + 1, self.memory_count).clamp(max=self.memory))
        for memory, new in ((self.memory_mean, mean), (self.memory_var, var)):
            kept = memory[1:] if self._refreshes else memory[:-1]
            memory.copy_(torch.where(seen, torch.cat([new.to(memory.dtype)[None], kept]), memory))
        for buffer, new in zip((self.running_mean, self.running_var), _combine(mean, var, older), strict=True):
            buffer.copy_(torch.where(seen, new, buffer.double()))


def _combine(mean: Tensor, var: Tensor, older: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Moments of a mixture of the current batch and of what :meth:`MemorizedBatchNorm._older` gives."""
    share, older_mean, older_var = older
    distance = mean - older_mean
    return (
        older_mean + share * distance,
        share * var + (1 - share) * older_var + share * (1 - share) * distance.square(),
    )


@contextmanager
def double_forward(model: nn.Module) -> Iterator[tuple[MemorizedBatchNorm, ...]]:
    """Double-Forward: inside, forwards of ``model`` in training mode replace the newest entry of each MBN's memory.

    After an optimizer step the statistics of the last batch are those of the weights before it. Run the same batch
    again in here, and they are those of the new weights::

        loss(model(x), y).backward()
        optimizer.step()
        with double_forward(model):
            model(x)

    No gradients. Nothing else changes: random states, the buffers and extra state of all other modules, and what
    counts forwards are afterwards as before; if something raises, the memories too. Random numbers (dropout)
    inside are not those of the first forward. Across ranks, a model that communicates in its forward does so
    here, so every rank runs it.

    Yields:
        The layers whose memory can change: the MBNs in training mode that are not frozen. Where there are none
        (after ``FreezeBN``), the second forward can be left out.

    Raises:
        LeakfreeError: the model has no MBN; a layer ran more than once inside.

    Reference: Guo et al. 2018 (arXiv 2010.04947), Double-Forward.
    """
    memorized = [module for module in model.modules() if isinstance(module, MemorizedBatchNorm)]
    if not memorized:
        raise LeakfreeError("double_forward: the model has no MBN layer, whose memory it is for")
    layers = tuple(layer for layer in memorized if layer.training and not layer.frozen)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states_kept())
        stack.enter_context(state_kept(model, spare=layers))
        for layer in layers:
            layer._refreshes, layer._refreshed = True, False
            stack.callback(setattr, layer, "_refreshes", False)
        yield layers
