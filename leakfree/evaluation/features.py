"""Features of a data set, extracted once and gathered over ranks: each sample once, in its order."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from leakfree.distributed import all_gather_table, barrier, broadcast_object, broadcast_rows, get_rank
from leakfree.errors import DataError
from leakfree.state import evaluating

__all__ = ["Features", "extract_features"]

_PIECE_BYTES = 2**24  # of features that travel at a time


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

    A sample that several ranks saw (samplers pad to equal shares) counts once. Ranks may have different numbers of
    batches, and none.

    Args:
        model: images (B, ...) -> features (B, D); a module is put into eval mode and back.
        batches: (images, classes int64 (B,), sample numbers int64 (B,)); numbers over all ranks are 0 ... N-1.
        folder: write the features to a new file there, batch by batch, and map it: no rank ever holds them in memory.
            Ranks must share the folder. Leave ``x`` as it is: all ranks see the file. Remove it when the features
            are no longer used.

    Raises:
        DataError: sample numbers that leave gaps, a sample with two classes, features that are no rows of one width,
            or a folder that the ranks do not share.
    """
    with _File(folder) if folder is not None else _Memory() as rows:
        ys, ids = array("q"), array("q")  # they grow in place: small tensors would pin the memory of large ones
        with evaluating(model) if isinstance(model, nn.Module) else torch.no_grad():
            for images, classes, numbers in batches:
                if not len(images) == len(classes) == len(numbers):
                    raise DataError(
                        f"extract_features: a batch of {len(images)} images has {len(classes)} classes and "
                        f"{len(numbers)} sample numbers"
                    )
                numbers = numbers.to("cpu", torch.int64)
                ys.frombytes(classes.to("cpu", torch.int64).numpy().tobytes())
                ids.frombytes(numbers.numpy().tobytes())
                rows.add(numbers, _as_rows(model(images.to(device, non_blocking=True)), len(images), rows.width))
        mine = torch.from_numpy(np.stack([np.array(ids, np.int64), np.array(ys, np.int64)], 1))
        table = all_gather_table([len(mine), rows.width])
        widths, counts = sorted(set(table[:, 1].tolist()) - {0}), table[:, 0].tolist()
        if len(widths) > 1:
            raise DataError(f"extract_features: features of different widths on different ranks: {widths}")
        everyone = torch.cat([mine[:0], *(part for _, _, part in broadcast_rows(mine, counts))])
        numbers, classes = everyone.unbind(1)
        total = _check(numbers, classes)
        y = torch.empty(total, dtype=torch.int64)
        y[numbers] = classes
        return Features(rows.gather(numbers, counts, (total, widths[0])), y)


def _as_rows(features: Tensor, size: int, width: int) -> Tensor:
    if features.ndim < 2 or len(features) != size or (size and not features.numel()):
        raise DataError(f"extract_features: {size} images should give {size} rows, got {tuple(features.shape)}")
    rows = features.detach().flatten(1).to("cpu", torch.float32)
    if width and rows.shape[1] != width:
        raise DataError(f"extract_features: features {rows.shape[1]} wide after features {width} wide")
    return rows


def _check(numbers: Tensor, classes: Tensor) -> int:
    """The number of samples."""
    if not len(numbers):
        raise DataError("extract_features: no samples on any rank")
    seen, first, of_first = np.unique(numbers.numpy(), return_index=True, return_inverse=True)
    gaps = np.flatnonzero(seen != np.arange(len(seen)))
    if len(gaps):
        wrong = f"got {seen[0]}" if seen[0] < 0 else f"{gaps[0]} is missing"
        raise DataError(f"extract_features: sample numbers must be 0 to N-1 without gaps; {wrong}")
    if bool((classes.numpy()[first][of_first] != classes.numpy()).any()):
        raise DataError("extract_features: a sample was given with two different classes")
    return len(seen)


class _Memory:
    """Rows held in memory: at last those of all ranks."""

    def __init__(self) -> None:
        self.width = 0
        self.parts: list[Tensor] = []

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.clear()

    def add(self, numbers: Tensor, rows: Tensor) -> None:
        self.width = rows.shape[1]
        self.parts.append(rows)

    def gather(self, numbers: Tensor, counts: list[int], shape: tuple[int, int]) -> Tensor:
        """(total, width); ``numbers`` of the rows of all ranks, in their order."""
        mine = torch.cat([torch.empty(0, shape[1]), *self.parts])
        self.parts.clear()
        out = torch.empty(shape)
        place = 0
        for _, _, part in broadcast_rows(mine, counts, piece=max(1, _PIECE_BYTES // (4 * shape[1]))):
            out[numbers[place : place + len(part)]] = part
            place += len(part)
        return out


class _File:
    """Rows that go to their places in a file that all ranks share; a failure removes it.

    Written, not mapped, while it grows: a full disk is an error then, and machines that share it by network do not
    overwrite each other's pages.
    """

    def __init__(self, folder: Path) -> None:
        self.width = 0
        path = ""
        if get_rank() == 0:  # a new file each time: features of before may still be mapped
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(".f32", "features-", folder)
            os.close(handle)
        self.path = Path(broadcast_object(path))
        self.there = self.path.is_file()
        if not bool(all_gather_table([self.there]).all()):
            self._remove()
            raise DataError(f"extract_features: folder {folder} is not shared by all ranks: {self.path} is not there")
        self.file = self.path.open("r+b", buffering=0)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()
        if kind is not None:
            self._remove()

    def _remove(self) -> None:
        if get_rank() == 0:
            self.path.unlink(missing_ok=True)

    def add(self, numbers: Tensor, rows: Tensor) -> None:
        self.width = rows.shape[1]
        if bool((numbers < 0).any()):
            raise DataError(f"extract_features: sample numbers must be 0 to N-1, got {int(numbers.min())}")
        order = numbers.argsort()
        ends = (numbers[order].diff() != 1).nonzero().view(-1) + 1  # of rows that lie side by side in the file
        for part in order.tensor_split(ends):
            if len(part):
                self._write(rows[part].numpy().tobytes(), int(numbers[part[0]]) * 4 * self.width)

    def _write(self, data: bytes, offset: int) -> None:
        self.file.seek(offset)
        left = memoryview(data)
        while left:
            left = left[self.file.write(left) :]

    def gather(self, numbers: Tensor, counts: list[int], shape: tuple[int, int]) -> Tensor:
        """The file, mapped."""
        self.file.close()
        barrier()
        return torch.from_numpy(np.memmap(self.path, np.float32, "r+", shape=shape))
