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
from leakfree.errors import RunError
from leakfree.state import buffers_kept

__all__ = ["buffers_of_rank", "differing_buffers", "pool_statistics", "pooled_statistics"]


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


def differing_buffers(model: nn.Module) -> list[dict[str, Tensor]]:
    """For each rank, its buffers that are not the same on all ranks; every rank calls it and gets all."""
    buffers = {name: buffer.detach().cpu().contiguous() for name, buffer in model.named_buffers()}
    sums = [zlib.crc32(buffer.reshape(-1).view(torch.uint8).numpy().tobytes()) for buffer in buffers.values()]
    everyone = all_gather_ints(sums) if sums else [[]]
    differ = [name for name, *values in zip(buffers, *everyone, strict=True) if len(set(values)) > 1]
    return all_gather_objects({name: buffers[name].clone() for name in differ})


def buffers_of_rank(kept: list[dict[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """The buffers of one rank from those that :func:`differing_buffers` found, on as many ranks or on others.

    On another number of ranks, running averages are the mean over those ranks whose images this one now has, by their
    share of these; those whose layer never saw a sample do not count. Counters are the largest.

    Raises:
        RunError: on another number of ranks, something else than running averages was each rank's own.
    """
    before = len(kept)
    if before == world_size:
        return kept[rank]
    # Of before * world_size slices of a batch, an old rank has world_size and a new one has before.
    first, last = rank * before, (rank + 1) * before
    shares = {
        old: share
        for old in range(before)
        if (share := min(last, (old + 1) * world_size) - max(first, old * world_size)) > 0
    }
    own: dict[str, Tensor] = {}
    for name in kept[0]:
        layer, _, leaf = name.rpartition(".")
        values = {old: kept[old][name] for old in shares}
        if leaf == "num_batches_tracked":
            own[name] = torch.stack(list(values.values())).amax(0)
        elif leaf in ("running_mean", "running_var"):
            own[name] = _weighted_mean(values, {old: _weight(kept[old], layer, shares[old]) for old in shares})
        else:
            raise RunError(
                f"{name} is each rank's own: a run with it cannot go on with {world_size} ranks in place of {before}"
            )
    return own


def _weight(buffers: dict[str, Tensor], layer: str, share: int) -> Tensor:
    """() or, where a layer has several domains, (D, 1)."""
    counter = buffers.get(f"{layer}.num_batches_tracked".lstrip("."))
    if counter is None:  # alike on all ranks
        return torch.tensor(float(share), dtype=torch.float64)
    weight = share * (counter > 0).double()
    return weight[..., None] if weight.ndim else weight


def _weighted_mean(values: dict[int, Tensor], weights: dict[int, Tensor]) -> Tensor:
    first = next(iter(values.values()))
    total = sum(weights.values(), torch.zeros((), dtype=torch.float64))
    mean = sum((values[old].double() * weights[old] for old in values), torch.zeros((), dtype=torch.float64))
    return torch.where(total > 0, mean / total.clamp(min=1), first.double()).to(first.dtype)
