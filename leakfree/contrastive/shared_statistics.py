"""Running statistics that are those of the joint batch, although each rank normalizes by itself.

A teacher that takes its student's running statistics must be the same on every rank. Without synchronizing any
forward, the ranks merge what the last one added to their running averages: one collective a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.distributed import all_reduce_sum_, is_distributed
from leakfree.norms import PartitionedBatchNorm

__all__ = ["SharedStatistics"]


class SharedStatistics:
    """Merges the running statistics of the batch norms of ``model`` over ranks, after each training forward.

    Counts come from hooks on the layers. Does nothing in one process, nor for layers that ran with shared statistics
    already (merging equals changes nothing).
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, PartitionedBatchNorm)]
        self._counts: dict[int, float] = {}
        self._before: list[Tensor] = []
        for layer in self._layers:
            layer.register_forward_pre_hook(self._note)

    def _note(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if layer.training and not layer.frozen and is_distributed():
            self._counts[id(layer)] = inputs[0].numel() / inputs[0].shape[1]

    def remember(self) -> None:
        """Before the forward: what the ranks have in common."""
        if is_distributed():
            self._counts.clear()
            buffers = (buffer for layer in self._layers for buffer in self._buffers(layer))
            self._before = [buffer.to(torch.float64, copy=True) for buffer in buffers]

    @torch.no_grad()
    def merge(self) -> None:
        """After it: m and v of each rank's batch are read off its running averages, and merged by count.

        All ranks call it, behind a forward of the same layers.
        """
        ran = [layer for layer in self._layers if id(layer) in self._counts]
        if not ran or not is_distributed():
            return
        before = iter(zip(self._before[::2], self._before[1::2], strict=True))
        starts = {id(layer): next(before) for layer in self._layers}
        parts = []
        for layer in ran:
            count, rate = self._counts[id(layer)], float(layer.momentum)  # type: ignore[arg-type]
            mean, var = (
                start + (now.double() - start) / rate
                for start, now in zip(starts[id(layer)], self._buffers(layer), strict=True)
            )
            within = var * (count - 1) / count if count else torch.zeros_like(var)
            parts += [count * mean, count * (within + mean.square()), mean.new_full((1,), count)]
        flat = all_reduce_sum_(torch.cat(parts))
        sums = iter(flat.split([len(part) for part in parts]))
        for layer in ran:
            first, second, count = next(sums), next(sums), next(sums).clamp(min=2)
            mean = first / count
            var = (second / count - mean.square()).clamp(min=0) * count / (count - 1)
            for buffer, start, value in zip(self._buffers(layer), starts[id(layer)], (mean, var), strict=True):
                buffer.copy_(start + float(layer.momentum) * (value - start))  # type: ignore[arg-type]

    @staticmethod
    def _buffers(layer: PartitionedBatchNorm) -> Iterator[Tensor]:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        yield layer.running_mean
        yield layer.running_var
