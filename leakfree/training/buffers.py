"""Buffers that differ between ranks: pooled for whoever reads the weights, kept apart for an exact resume.

Under local batch norm every rank keeps its own running averages. Training never mixes them, so neither
checkpoints nor evaluations during training change what comes after.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leakfree.distributed import all_gather_objects, all_gather_table, get_world_size, is_distributed
from leakfree.errors import RunError
from leakfree.state import buffers_kept

__all__ = [
    "buffers_of_rank",
    "differing_buffers",
    "pool_statistics",
    "pooled_statistics",
    "pooled_values",
    "share_buffers",
]


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with a running mean; one that the model holds under several names is yielded under each."""
    for name, item in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(item, "running_mean", None), Tensor):
            yield f"{name}." if name else "", item


@torch.no_grad()
def pooled_values(model: nn.Module) -> dict[str, Tensor]:
    """The mean of all ranks' ``running_mean`` and ``running_var``, by the names of the buffers; {} on one rank.

    The ranks weigh alike, but those whose layer never saw a sample (counter 0) do not count. This is
    the moving average over steps *and* ranks: averages of averages, so that the order of pooling and
    updating does not matter. The variance is the mean variance inside a normalization batch, as torch's
    moving average over steps is; the spread of the ranks' means is not added. Counters become the
    largest. Every rank calls it.
    """
    named = list(_layers(model)) if is_distributed() else []
    layers = list({id(layer): layer for _, layer in named}.values())
    if not layers:
        return {}
    ones = torch.ones((), dtype=torch.int64, device=layers[0].running_mean.device)
    # a counter is of a layer, or of each of its domains: a row of its statistics
    rows = [layer.running_mean.reshape(-1, layer.running_mean.shape[-1]).shape for layer in layers]
    counters = torch.cat(
        [
            ones.expand(count) if layer.num_batches_tracked is None else layer.num_batches_tracked.reshape(count)
            for layer, (count, _) in zip(layers, rows, strict=True)
        ]
    )
    widths = torch.tensor([width for count, width in rows for _ in range(count)], device=counters.device)
    statistics = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
    own = torch.cat([item.reshape(-1) for item in statistics])
    seen = (counters > 0).double()
    weight = seen.repeat_interleave(widths, output_size=len(own) // 2).repeat(2)
    sums = torch.cat([own.double() * weight, seen])
    dist.all_reduce(sums)
    dist.all_reduce(counters, op=dist.ReduceOp.MAX)
    total, seen = sums.split([len(own), len(seen)])
    weight = seen.repeat_interleave(widths, output_size=len(own) // 2).repeat(2)
    pooled = torch.where(weight > 0, total / weight.clamp(min=1), own.double()).to(own.dtype)
    parts = pooled.split([item.numel() for item in statistics])
    found = {}
    places = {id(layer): place for place, layer in enumerate(layers)}
    largest = counters.split([count for count, _ in rows])
    for name, layer in named:
        place = places[id(layer)]
        found[f"{name}running_mean"] = parts[place].view_as(layer.running_mean).to(layer.running_mean.dtype)
        found[f"{name}running_var"] = parts[place + len(layers)].view_as(layer.running_var).to(layer.running_var.dtype)
        if isinstance(layer.num_batches_tracked, Tensor):
            found[f"{name}num_batches_tracked"] = largest[place].view_as(layer.num_batches_tracked)
    return found


@torch.no_grad()
def pool_statistics(model: nn.Module) -> None:
    """Give every rank :func:`pooled_values`, in place. Every rank calls it."""
    pooled = pooled_values(model)
    if pooled:
        torch._foreach_copy_([model.get_buffer(name) for name in pooled], list(pooled.values()))


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
            if value.numel():
                dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)  # not every backend sends truth values
            buffer.copy_(value)


@torch.no_grad()
def differing_buffers(model: nn.Module, pooled: dict[str, Tensor] | None = None) -> list[dict[str, Tensor]]:
    """For each rank, its buffers where they are not on all ranks what :func:`share_buffers` would make of them.

    Every rank calls it and gets all.

    Args:
        pooled: :func:`pooled_values`, where they are known.
    """
    if not is_distributed():
        return [{}]
    buffers = dict(model.named_buffers())
    if not buffers:
        return [{} for _ in range(get_world_size())]
    pooled = pooled_values(model) if pooled is None else pooled
    contents = _contents(buffers.values())
    shared = _contents([pooled.get(name, buffer) for name, buffer in buffers.items()])
    sums = all_gather_table([zlib.crc32(content.numpy().data) for content in (*contents, *shared)])
    own, sums = sums.split(len(contents), dim=1)
    # a mean of equal numbers may be another one
    differ = ((own != own[0]) | (own != sums)).any(0).tolist()
    # In one piece, not as tensors: each of these takes long to pack and to unpack.
    apart = [item for item, more in zip(buffers.items(), differ, strict=True) if more]
    described = [(name, buffer.dtype, buffer.shape) for name, buffer in apart]
    values = b"".join(content.numpy().tobytes() for content, more in zip(contents, differ, strict=True) if more)
    return [_apart(described, data) for described, data in all_gather_objects((described, values))]


def _contents(buffers: Iterable[Tensor]) -> list[Tensor]:
    """The bytes of each, on the CPU."""
    contents = [buffer.detach().contiguous().reshape(-1).view(torch.uint8) for buffer in buffers]
    if any(content.is_cuda for content in contents):  # one transfer
        return list(torch.cat(contents).cpu().split([len(content) for content in contents]))
    return contents


def _apart(described: list[tuple[str, torch.dtype, torch.Size]], data: bytes) -> dict[str, Tensor]:
    found, place = {}, 0
    for name, dtype, shape in described:
        size = shape.numel() * dtype.itemsize
        own = bytearray(data[place : place + size])
        found[name] = torch.frombuffer(own, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
        place += size
    return found


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
