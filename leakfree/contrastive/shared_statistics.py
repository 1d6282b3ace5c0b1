"""Running statistics that are those of the joint batch, although each rank normalizes by itself.

A teacher that takes its student's running statistics must be the same on every rank. Without synchronizing any
forward, the ranks merge what the last one added to their running averages: one collective a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leakfree.distributed import all_reduce_sum_, is_distributed
from leakfree.errors import ConfigError
from leakfree.norms import PartitionedBatchNorm
from leakfree.partition import current_scope

__all__ = ["SharedStatistics"]


class SharedStatistics:
    """Merges the running statistics of the batch norms of ``model`` over ranks, after each training forward.

    A step is :meth:`remember`, one forward, :meth:`merge`. Counts come from hooks on the layers. Does nothing in one
    process, nor for layers whose statistics the ranks shared in that forward.

    Raises:
        ConfigError: a batch norm that averages over all steps (momentum null).
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, PartitionedBatchNorm) and module.running_mean is not None
        ]
        if any(layer.momentum is None for layer in self._layers):
            raise ConfigError(
                "model.norm_options.momentum: null, an average over all steps, does not go with "
                "model.teacher_statistics=copy or ema: ranks could not tell what a step added to it; use a number"
            )
        self._counts: dict[int, float] = {}
        self._before: list[tuple[Tensor, Tensor]] = []
        for layer in self._layers:
            layer.register_forward_pre_hook(self._note)

    def _note(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        scope = current_scope()
        shared = scope is not None and scope.base is not None and scope.base.synchronized
        if layer.training and not layer.frozen and is_distributed() and not shared:
            self._counts[id(layer)] = inputs[0].numel() / inputs[0].shape[1]

    def remember(self) -> None:
        """Before the forward: what the ranks have in common."""
        if is_distributed():
            self._counts.clear()
            self._before = [
                (mean.to(torch.float64, copy=True), var.to(torch.float64, copy=True))
                for mean, var in map(_buffers, self._layers)
            ]

    @torch.no_grad()
    def merge(self) -> None:
        """After it: m and v of each rank's batch are read off its running averages, and merged by count.

        All ranks call it, behind a forward of the same layers.
        """
        ran = [
            (layer, before)
            for layer, before in zip(self._layers, self._before, strict=False)  # none in one process
            if id(layer) in self._counts and layer.momentum
        ]
        if not ran:
            return
        parts = []
        for layer, before in ran:
            assert layer.momentum is not None
            count = self._counts[id(layer)]
            mean, var = (
                start + (now.double() - start) / layer.momentum
                for start, now in zip(before, _buffers(layer), strict=True)
            )
            biased = var * max(count - 1, 0) / max(count, 1)
            parts += [count * mean, count * (biased + mean.square()), mean.new_full((1,), count)]
        flat = all_reduce_sum_(torch.cat(parts))
        sums = iter(flat.split([len(part) for part in parts]))
        for layer, before in ran:
            first, second, count = next(sums), next(sums), next(sums)
            mean = first / count.clamp(min=1)
            var = (second / count.clamp(min=1) - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
            share = layer.momentum * (count > 0).double()  # a batch without images on any rank adds nothing
            for buffer, start, value in zip(_buffers(layer), before, (mean, var), strict=True):
                buffer.copy_(start + share * (value - start))


def _buffers(layer: PartitionedBatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var
