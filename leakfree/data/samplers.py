"""Which images a rank sees at which step: pure functions of (seed, step), whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from leakfree.errors import DataError

__all__ = ["EvaluationBatchSampler", "SameClassBatchSampler", "TrainingBatchSampler"]


def _check_share(images: int, of: str, rank: int, world_size: int) -> None:
    if not (images >= 1 and 0 <= rank < world_size):
        raise ValueError(f"{images} images per {of}, rank {rank} of {world_size}: need 1 or more, and a rank in range")


class TrainingBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of an endless stream of epochs, each a seeded permutation of all images.

    Step t takes positions ``t * B .. (t + 1) * B - 1`` of the stream, with ``B = images_per_rank * world_size``;
    ranks take contiguous slices in rank order. So the images of a step depend on (seed, t, B) only: not on the
    number of ranks, not on where a run was resumed.

    Yields:
        For each step from ``start_step`` a list of (image index, position in the stream).

    Attributes:
        start_step, max_steps: ``len`` is ``max_steps``, the length of the whole run.
    """

    def __init__(
        self,
        num_images: int,
        images_per_rank: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int = 0,
        max_steps: int = 1,
    ) -> None:
        if num_images < 1:
            raise DataError("no image to train on")
        _check_share(images_per_rank, "rank", rank, world_size)
        self.num_images = num_images
        self.images_per_rank = images_per_rank
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_step = start_step
        self.max_steps = max_steps
        self._epochs: dict[object, np.ndarray] = {}

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start_step, self.max_steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return this rank's (image index, position) pairs of one step."""
        first = (step * self.world_size + self.rank) * self.images_per_rank
        return [(self._image_at(position), position) for position in range(first, first + self.images_per_rank)]

    def _image_at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_images)
        return int(self._order([0, self.seed, epoch], self.num_images)[place])

    def _order(self, key: list[int], count: int, keep: int = 2) -> np.ndarray:
        """The permutation of ``count`` that ``key`` seeds; the last ``keep`` are remembered.

        A batch may cross into the next epoch: two are enough for one stream.
        """
        name = tuple(key)
        if name not in self._epochs:
            while len(self._epochs) >= keep:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[name] = np.random.default_rng(key).permutation(count)
        return self._epochs[name]


class SameClassBatchSampler(TrainingBatchSampler):
    """Batches of groups of ``group_size`` images, each group of one class (Wu & Johnson 2021, section 6).

    The classes take turns: each run of as many groups as there are classes holds every class once, in a seeded order,
    so a batch of whole runs is balanced. Inside a class, images come as in :class:`TrainingBatchSampler`: an endless
    stream of epochs, each a seeded permutation. Steps, ranks and resuming as there; groups are consecutive.

    Args:
        labels: int64 (n,), the class of each image; values without an image are no class.
        group_size: images of a group; must divide the total batch.
    """

    def __init__(
        self,
        labels: np.ndarray,
        group_size: int,
        images_per_rank: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int = 0,
        max_steps: int = 1,
    ) -> None:
        super().__init__(len(labels), images_per_rank, rank, world_size, seed, start_step, max_steps)
        total = images_per_rank * world_size
        if group_size < 1 or total % group_size:
            raise ValueError(f"{total} images of a batch cannot be split into groups of {group_size}")
        self.group_size = group_size
        self._pools = [np.flatnonzero(labels == value) for value in np.unique(labels)]

    def _image_at(self, position: int) -> int:
        group, place = divmod(position, self.group_size)
        turn, seat = divmod(group, len(self._pools))
        keep = 2 * len(self._pools) + 2  # two epochs of each class, and the order of the classes
        chosen = int(self._order([5, self.seed, turn], len(self._pools), keep)[seat])
        pool = self._pools[chosen]
        epoch, place = divmod(turn * self.group_size + place, len(pool))
        return int(pool[self._order([2, self.seed, chosen, epoch], len(pool), keep)[place]])


class EvaluationBatchSampler(Sampler[list[int]]):
    """Batches of consecutive images; batch b goes to rank ``b % world_size``.

    Nothing is padded or repeated, and which images meet in a batch does not depend on the number of ranks: under
    mini-batch statistics it is part of the measurement. Ranks may get different numbers of batches, or none.

    Yields:
        Lists of image indices; the last batch of all may be short.
    """

    def __init__(self, num_images: int, images_per_batch: int, rank: int, world_size: int) -> None:
        _check_share(images_per_batch, "batch", rank, world_size)
        self.num_images = num_images
        self.images_per_batch = images_per_batch
        self.rank = rank
        self.world_size = world_size

    def _starts(self) -> range:
        stride = self.images_per_batch * self.world_size
        return range(self.rank * self.images_per_batch, self.num_images, stride)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts():
            yield list(range(start, min(start + self.images_per_batch, self.num_images)))
