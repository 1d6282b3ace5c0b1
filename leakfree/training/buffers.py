"""Buffers that differ between ranks: pooled for whoever reads the weights, kept apart for an exact resume.

Under local batch norm every rank keeps its own running averages. Training never mixes them, so neither
checkpoints nor evaluations during training change what comes after.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leakfree.distributed import all_gather_ints, all_gather_objects, is_distributed
from leakfree.state import buffers_kept

__all__ = ["differing_buffers", "pool_statistics", "pooled_statistics", "share_buffers"]

_POOLED = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def pool_statistics(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' ``running_mean`` and ``running_var``, in place.

    The ranks weigh alike, but those whose layer never saw a sample (counter 0) do not count. This is
    the moving average over steps *and* ranks: averages of averages, so that the order of pooling and
    updating does not matter. The variance is the mean variance inside a normalization batch, as torch's
    moving average over steps is; the spread of the ranks' means is not added. Counters become the
    largest. One collective; every rank calls it.
    """
    layers: list[Any] = [item for item in model.modules() if isinstance(getattr(item, "running_mean", None), Tensor)]
    if not layers or not is_distributed():
        return
    parts = []
    for layer in layers:
        mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
        seen = torch.ones(mean.shape[:-1], device=mean.device) if counter is None else counter > 0
        weight = seen.to(torch.float64)[..., None]  # of each domain, where a layer has several
        parts += [mean.double() * weight, var.double() * weight, weight]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    pooled = iter(total.view(part.shape) for total, part in zip(sums, parts, strict=True))
    for layer in layers:
        mean, var, weight = next(pooled), next(pooled), next(pooled)
        for buffer, total in ((layer.running_mean, mean), (layer.running_var, var)):
            buffer.copy_(torch.where(weight > 0, total / weight.clamp(min=1), buffer.double()))
    counters = [layer.num_batches_tracked for layer in layers if isinstance(layer.num_batches_tracked, Tensor)]
    if counters:
        largest = torch.cat([counter.flatten() for counter in counters])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        for counter, value in zip(counters, largest.split([counter.numel() for counter in counters]), strict=True):
            counter.copy_(value.view(counter.shape))


@contextmanager
def pooled_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms hold the pooled statistics; afterwards each rank has its own again."""
    with buffers_kept(model):
        pool_statistics(model)
        yield


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers that a checkpoint holds: pooled statistics, and of the rest (a memory of the last
    batches, say) those of rank 0. What is then measured is what the checkpoint would give. Every rank calls it."""
    pool_statistics(model)
    if is_distributed():
        for buffer in model.buffers():
            value = buffer.contiguous()
            dist.broadcast(value, src=0)
            buffer.copy_(value)


def differing_buffers(model: nn.Module) -> list[dict[str, Tensor]]:
    """For each rank, its buffers where they are not on all ranks what :func:`share_buffers` would make of them; every
    rank calls it and gets all."""
    buffers = {name: buffer.detach().cpu().contiguous() for name, buffer in model.named_buffers()}
    sums = [zlib.crc32(buffer.reshape(-1).view(torch.uint8).numpy().tobytes()) for buffer in buffers.values()]
    own = {name: value.clone() for name, value in model.named_buffers() if name.rpartition(".")[2] in _POOLED}
    with pooled_statistics(model):  # a mean of equal numbers may be another one
        changed = {name for name, value in model.named_buffers() if name in own and not torch.equal(value, own[name])}
    facts = [number for name, of in zip(buffers, sums, strict=True) for number in (of, name in changed)]
    everyone = all_gather_ints(facts) if facts else [[]]
    columns = list(zip(*everyone, strict=True))
    differ = [
        name
        for name, sums_of, changes in zip(buffers, columns[::2], columns[1::2], strict=True)
        if len(set(sums_of)) > 1 or any(changes)
    ]
    return all_gather_objects({name: buffers[name].clone() for name in differ})
