"""Which images a rank sees at which step: pure functions of (seed, step), whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from leakfree.errors import DataError

__all__ = ["EvaluationBatchSampler", "TrainingBatchSampler"]


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
        if not (images_per_rank >= 1 and 0 <= rank < world_size):
            raise ValueError(
                f"{images_per_rank} images per rank, rank {rank} of {world_size}: need 1 or more, and a rank in range"
            )
        self.num_images = num_images
        self.images_per_rank = images_per_rank
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_step = start_step
        self.max_steps = max_steps
        self._epochs: dict[int, np.ndarray] = {}

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
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch may cross into the next epoch: two are enough
                self._epochs.pop(next(iter(self._epochs)))
            rng = np.random.default_rng([0, self.seed, epoch])
            self._epochs[epoch] = rng.permutation(self.num_images)
        return int(self._epochs[epoch][place])


class EvaluationBatchSampler(Sampler[list[int]]):
    """Batches of consecutive images; batch b goes to rank ``b % world_size``.

    Nothing is padded or repeated, and which images meet in a batch does not depend on the number of ranks: under
    mini-batch statistics it is part of the measurement. Ranks may get different numbers of batches, or none.

    Yields:
        Lists of image indices; the last batch of all may be short.
    """

    def __init__(self, num_images: int, images_per_batch: int, rank: int, world_size: int) -> None:
        if not (images_per_batch >= 1 and 0 <= rank < world_size):
            raise ValueError(
                f"{images_per_batch} images per batch, rank {rank} of {world_size}: need 1 or more, and a rank in range"
            )
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
