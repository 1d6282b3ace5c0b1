"""Shuffling in the data loader: the images of a rank's keys are drawn shuffled, so none has to move.

Where both views of a batch come from a loader (MoCo: queries and keys), each rank can load its queries
from its own slice of the global batch and its keys from a random share of it. That is the shuffle of
ShuffleBN (He et al. 2020, section 3.3) without its first exchange; the first author recommends it in
facebookresearch/moco, issue 20. Only the key features, (N, 128) in MoCo, go home after the key encoder.
The price: a rank reads and decodes two images for each pair of views, where a loader of two crops reads one.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from leakfree.distributed import Group, all_gather_ints, get_rank, get_world_size
from leakfree.errors import DataError
from leakfree.shuffle.exchange import Ticket, make_ticket
from leakfree.shuffle.plan import GroupDraw, permute

__all__ = ["KeyShuffleBatchSampler", "PairedIndex", "PairedViews"]


class PairedIndex(NamedTuple):
    """The samples to load as a query and as a key, and the number of the step, which selects the permutation."""

    query: int
    key: int
    draw: int


class KeyShuffleBatchSampler(Sampler[list[PairedIndex]]):
    """Batches whose queries are this rank's slice of the global batch, and whose keys a random share of it.

    Step t takes the next ``G = batch_size * world_size`` samples of an epoch, each epoch a seeded permutation
    of all samples; the fewer than G left at its end are dropped, so no sample is twice in a batch. Rank r's
    queries are rows ``r * batch_size`` to ``(r + 1) * batch_size - 1`` of the step, its keys the rows that meet
    there under the draw (seed, t). Both are functions of (seed, t, G) alone: resumable at any step, and one
    process with a batch of G reads what W ranks read, in rank order.

    The key encoder must have a batch norm per rank ("BN", or torch's): it then computes what ShuffleBN or
    ``Shuffled`` of the same seed and count of draws compute. With SyncBN the shuffle has no effect.
    The rows of a rank's keys are in random order, so consecutive chunks are random groups too: for
    ``num_groups > world_size`` give the key encoder GhostBN with
    ``group_size = batch_size * world_size // num_groups``. In one process that is the only way: a batch norm
    over the whole batch does not notice the order of its rows.

    Works with any number of loader processes, since each batch carries the number of its draw.

    Args:
        num_samples: of the data set, at least G.
        batch_size: queries, and keys, on each rank.
        rank, world_size: of this process, in the process group that takes the keys home.
        seed: 0 or more, the same on every rank.
        max_steps: steps of the whole run, and the ``len`` of the sampler.
        start_step: the first step to yield, when a run is resumed.
        num_groups: groups of keys that share statistics, over all ranks: a multiple of ``world_size``, by
            default itself. Must divide G. The order of the keys does not depend on it.

    Yields:
        For each step from ``start_step`` a list of ``batch_size`` :class:`PairedIndex`.

    Raises:
        DataError: fewer samples than G.
        ValueError: another argument out of its range.

    Warns:
        UserWarning: a single group.

    Example:
        >>> sampler = KeyShuffleBatchSampler(
        ...     len(dataset), 32, rank=rank, world_size=world_size, seed=0, max_steps=1000
        ... )
        >>> loader = DataLoader(PairedViews(dataset, augment), batch_sampler=sampler, num_workers=4)
        >>> for query_images, key_images, draws in loader:
        ...     queries = encoder(query_images)
        ...     with torch.no_grad():
        ...         keys = batch_unshuffle(key_encoder(key_images), sampler.ticket(draws, device=queries.device))
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        max_steps: int,
        start_step: int = 0,
        num_groups: int | None = None,
    ) -> None:
        if not (batch_size >= 1 and 0 <= rank < world_size):
            raise ValueError(
                f"{batch_size} samples per rank, rank {rank} of {world_size}: need 1 or more, and a rank in range"
            )
        if not (0 <= seed < 2**63 and start_step >= 0 and max_steps >= 0):
            raise ValueError(f"seed {seed}, start_step {start_step}, max_steps {max_steps}: need 0 to 2**63 - 1")
        num_groups = world_size if num_groups is None else num_groups
        rows = batch_size * world_size
        if num_groups < 1 or num_groups % world_size or rows % num_groups:
            raise ValueError(
                f"num_groups must be a multiple of the {world_size} ranks and divide the {rows} rows of a step, "
                f"got {num_groups}"
            )
        if num_samples < rows:
            raise DataError(f"{num_samples} samples, but a step takes {batch_size} on each of {world_size} ranks")
        if num_groups == 1:
            warnings.warn(
                "KeyShuffleBatchSampler: in one process the order of the keys has no effect on a batch norm over the "
                "whole batch; set num_groups >= 2, and GhostBN of that many groups in the key encoder",
                stacklevel=2,
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.max_steps = max_steps
        self.start_step = start_step
        self.num_groups = num_groups
        self._agreed = False

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[list[PairedIndex]]:
        for step in range(self.start_step, self.max_steps):
            yield self.batch(step)

    def batch(self, step: int) -> list[PairedIndex]:
        """Return this rank's pairs of one step."""
        first = self.rank * self.batch_size
        queries = self._samples(step, np.arange(first, first + self.batch_size, dtype=np.int64))
        keys = self._samples(step, self._draw(step).sources)
        return [PairedIndex(query, key, step) for query, key in zip(queries, keys, strict=True)]

    def ticket(self, draws: Tensor | int, *, device: torch.device | str, group: Group = None) -> Ticket:
        """Return what ``batch_unshuffle`` needs to take the key features of one batch home.

        After ``keys = batch_unshuffle(key_encoder(key_images), ticket)`` row i of ``keys`` belongs to query i.
        Every rank must call it; the first call of a sampler compares the ranks, in one small collective.

        Args:
            draws: int64 (N,), the third tensor of a batch of :class:`PairedViews`; or the step.
            device: of the key features.
            group: the process group whose ranks the sampler was made for.

        Raises:
            ValueError: ``draws`` of several steps; a sampler made for another rank or world size.
            RuntimeError: on every rank, when they are at different steps or have different arguments.
        """
        step = _step(draws)
        here = (get_rank(group), get_world_size(group))
        if here != (self.rank, self.world_size):
            raise ValueError(
                f"this sampler was made for rank {self.rank} of {self.world_size}, this process is rank {here[0]} of "
                f"{here[1]}: keys would go astray"
            )
        if not self._agreed:
            mine = [self.seed, step, self.num_samples, self.batch_size, self.num_groups]
            everyone = all_gather_ints(mine, group)
            if any(other != everyone[0] for other in everyone):
                raise RuntimeError(
                    "ranks drew different batches (seed, step, num_samples, batch_size, num_groups per rank: "
                    f"{[tuple(other) for other in everyone]}): these must be the same on every rank"
                )
            self._agreed = True
        return make_ticket(self._draw(step), torch.device(device), group)

    def positions(self, draws: Tensor | int, *, device: torch.device | str) -> Tensor:
        """Return where the keys of this rank's queries stand among the keys of all ranks.

        For a method that gathers all keys anyway (MoCo's queue), instead of a ticket: with ``everyone`` the
        (G, C) concatenation of the ranks' keys as they left the key encoder, ``everyone[positions]`` belong to
        the queries. Nothing is communicated, nor compared between ranks.

        Args:
            draws, device: as for :meth:`ticket`.

        Returns:
            int64 (batch_size,) on ``device``.

        Raises:
            ValueError: ``draws`` of several steps.
        """
        return torch.from_numpy(self._draw(_step(draws)).positions).to(device)

    def _draw(self, step: int) -> GroupDraw:
        return GroupDraw((self.batch_size,) * self.world_size, self.rank, self.num_groups, self.seed, step)

    def _samples(self, step: int, rows: npt.NDArray[np.int64]) -> list[int]:
        """The samples at ``rows`` of the global batch of a step."""
        rows_per_step = self.batch_size * self.world_size
        epoch, step_in_epoch = divmod(step, self.num_samples // rows_per_step)
        # Not the key of GroupDraw: order and groups must not be the same permutation where one step is an epoch.
        key = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0])
        samples: list[int] = permute(step_in_epoch * rows_per_step + rows, self.num_samples, key).tolist()
        return samples


def _step(draws: Tensor | int) -> int:
    if not isinstance(draws, Tensor):
        return operator.index(draws)
    steps = sorted(set(draws.flatten().tolist()))
    if len(steps) != 1:
        raise ValueError(f"the rows of a batch must be of one draw, got the draws {steps}: take each batch as it came")
    return operator.index(steps[0])


class PairedViews(Dataset[tuple[Any, Any, int]]):
    """Two views for each :class:`PairedIndex`: of one sample as a query, of another as a key.

    The default collation of a ``DataLoader`` makes (queries, keys, draws) of it, draws an int64 (N,).
    Random transforms draw from the generators of the loader's process, as in any data set.

    Args:
        dataset: map-style; ``dataset[i]`` is handed to the transforms as it is, with a label if it has one.
        query_transform: makes a view of what the data set returns.
        key_transform: for the keys; by default ``query_transform``.

    Raises:
        TypeError: indexed by anything but a :class:`PairedIndex`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        query_transform: Callable[[Any], Any],
        key_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.query_transform = query_transform
        self.key_transform = query_transform if key_transform is None else key_transform

    def __getitem__(self, index: PairedIndex) -> tuple[Any, Any, int]:
        if not isinstance(index, PairedIndex):
            raise TypeError(
                f"PairedViews takes a PairedIndex, got {index!r}: give its DataLoader "
                "batch_sampler=KeyShuffleBatchSampler(...), without batch_size, shuffle or sampler"
            )
        query, key = self.dataset[index.query], self.dataset[index.key]
        return self.query_transform(query), self.key_transform(key), index.draw
