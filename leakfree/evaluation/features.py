"""Features of a data set, extracted once and gathered over ranks: each sample once, in its order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from leakfree.distributed import all_gather_objects, all_gather_table, barrier, broadcast_object, get_rank
from leakfree.errors import DataError
from leakfree.state import evaluating

__all__ = ["Features", "extract_features"]


@dataclass(frozen=True)
class Features:
    """``x`` (N, D) float32, ``y`` int64 (N,), in the order of the samples' numbers."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


def extract_features(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> Features:
    """Run ``model`` over this rank's batches and give every rank the features of all samples.

    A sample that several ranks saw (samplers pad to equal shares) counts once.

    Args:
        model: images (B, ...) -> features (B, D); a module is put into eval mode and back.
        batches: (images, classes int64 (B,), sample numbers int64 (B,)); numbers over all ranks are 0 ... N-1.
        folder: keep the features in a new file there and map it, instead of holding them in memory; ranks must
            share the folder. Remove the file when the features are no longer used.

    Raises:
        DataError: sample numbers that leave gaps, or a sample with two classes.
    """
    xs, ys, ids = [], [], []
    with evaluating(model) if isinstance(model, nn.Module) else torch.no_grad():
        for images, classes, numbers in batches:
            if not len(images) == len(classes) == len(numbers):
                raise DataError(
                    f"extract_features: a batch of {len(images)} images has {len(classes)} classes and {len(numbers)} "
                    "sample numbers"
                )
            xs.append(model(images.to(device, non_blocking=True)).float().flatten(1).cpu())
            ys.append(classes)
            ids.append(numbers)
    mine = (torch.cat(ids), torch.cat(ys)) if ids else (torch.empty(0, dtype=torch.int64),) * 2
    width = int(all_gather_table([xs[0].shape[1] if xs else 0])[:, 0].max())
    x = torch.cat(xs) if xs else torch.empty(0, width)
    labels = all_gather_objects(mine)
    numbers, classes = (torch.cat(parts) for parts in zip(*labels, strict=True))
    total = _check(numbers, classes)
    y = torch.empty(total, dtype=torch.int64)
    y[numbers] = classes
    if folder is not None:
        return Features(_mapped(folder, x, mine[0], total, width), y)
    out = torch.empty(total, width)
    for (theirs, _), part in zip(labels, all_gather_objects(x), strict=True):
        out[theirs] = part
    return Features(out, y)


def _check(numbers: Tensor, classes: Tensor) -> int:
    if not len(numbers):
        raise DataError("extract_features: no samples on any rank")
    seen, first = np.unique(numbers.numpy(), return_index=True)
    if seen[0] != 0 or seen[-1] != len(seen) - 1:
        missing = next(number for number, other in enumerate([*seen, -1]) if number != other)
        raise DataError(f"extract_features: sample numbers must be 0 to N-1 without gaps; {missing} is missing")
    of_first = torch.from_numpy(first)[numbers]
    if bool((classes[of_first] != classes).any()):
        raise DataError("extract_features: a sample was given with two different classes")
    return len(seen)


def _mapped(folder: Path, x: Tensor, numbers: Tensor, total: int, width: int) -> Tensor:
    path = ""
    if get_rank() == 0:  # a new file each time: features of before may still be mapped
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(".f32", "features-", folder)
        os.close(handle)
        np.memmap(path, np.float32, "w+", shape=(total, width)).flush()
    path = broadcast_object(path)
    table = np.memmap(path, np.float32, "r+", shape=(total, width))
    table[numbers.numpy()] = x.numpy()
    table.flush()
    barrier()
    return torch.from_numpy(table)
