"""Who shares statistics: the one question BN, SyncBN, GhostBN and ShuffleBN answer differently.

A :class:`Partition` gives every row (sample, RoI) of this rank's batch a group; rows of one group
share their mean and variance. A :class:`NormalizationScope` is one forward of an enclosing module
(a box head): it says which rows would have met on one rank, and lets all norm layers inside see the
same random groups. What is done with a partition lives in ``leakfree.norms``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from leakfree.distributed import Group, all_gather_ints, get_rank, is_distributed

__all__ = ["NormalizationScope", "Partition", "current_scope", "image_partition", "normalization_scope"]


@dataclass(frozen=True)
class Partition:
    """The groups of this rank's rows.

    ``groups`` is int64 (N,) with ids in [0, num_groups), on any device; None puts every row in
    group 0. With ``across_ranks`` the ids are global and rows of all ranks meet in a group;
    otherwise they are local to this rank. All ranks must agree on ``across_ranks`` and, if it is
    set, on ``num_groups``. ``chunks`` is set by :meth:`consecutive`: the rows of each group, in order.
    """

    groups: Tensor | None = None
    num_groups: int = 1
    across_ranks: bool = False
    process_group: Group = None
    chunks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ValueError(f"a partition needs at least one group, got num_groups={self.num_groups}")
        if self.groups is None and self.num_groups != 1:
            raise ValueError(f"groups=None is one group, got num_groups={self.num_groups}")

    @staticmethod
    def consecutive(sizes: Sequence[int]) -> Partition:
        """Groups of this rank that hold its first ``sizes[0]`` rows, the next ``sizes[1]``, ...; zeros allowed."""
        if len(sizes) < 2:
            return Partition(chunks=tuple(sizes))
        groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(list(sizes), dtype=torch.int64))
        return Partition(groups, len(sizes), chunks=tuple(sizes))

    @staticmethod
    def chunks_of(group_size: int, num_rows: int) -> Partition:
        """max(1, num_rows // group_size) consecutive groups of this rank, whose sizes differ by at most one.

        So no group is smaller than ``group_size`` unless the batch is.
        """
        num_groups = max(1, num_rows // group_size)
        starts = [-(-group * num_rows // num_groups) for group in range(num_groups + 1)]
        return Partition.consecutive([stop - start for start, stop in pairwise(starts)])

    @property
    def synchronized(self) -> bool:
        """Whether statistics must be summed over ranks."""
        return self.across_ranks and is_distributed(self.process_group)

    def same_as(self, other: Partition) -> bool:
        """Whether rows share statistics alike in both."""
        mine = (self.num_groups, self.across_ranks, self.groups is None)
        if mine != (other.num_groups, other.across_ranks, other.groups is None):
            return False
        return self.groups is None or other.groups is None or torch.equal(self.groups.cpu(), other.groups.cpu())


@dataclass
class NormalizationScope:
    """One forward of an enclosing module; see :func:`normalization_scope`."""

    base: Partition | None = None
    num_shuffles: int = 0  # ShuffleBN layers that have drawn for themselves in this forward
    _shared: dict[object, object] = field(default_factory=dict)

    def base_groups(self) -> int | None:
        """This rank's share of the number of base groups, None without a base: the ranks' shares add up to it."""
        if self.base is None:
            return None
        counted_elsewhere = self.base.synchronized and get_rank(self.base.process_group) > 0
        if counted_elsewhere:
            return 0
        return self.base.num_groups if self.base.chunks is None else len(self.base.chunks)  # none where no image is

    def share(self, key: object, draw: Callable[[], object]) -> object:
        """Return the value drawn under ``key`` in this scope, drawing it on the first call."""
        if key not in self._shared:
            self._shared[key] = draw()
        return self._shared[key]


_SCOPE: ContextVar[NormalizationScope | None] = ContextVar("leakfree_normalization_scope", default=None)


def current_scope() -> NormalizationScope | None:
    """The innermost open scope, or None."""
    return _SCOPE.get()


@contextmanager
def normalization_scope(base: Partition | None = None) -> Iterator[NormalizationScope]:
    """Make the forward inside one unit: its norm layers share their random draws.

    Args:
        base: which rows a plain BN normalizes together inside (by default all rows of the rank).
            With it, what a rank with one image sees can be had on any number of ranks. ShuffleBN
            inside draws as many random groups as ``base`` has, over all ranks.
    """
    token = _SCOPE.set(NormalizationScope(base))
    try:
        scope = _SCOPE.get()
        assert scope is not None
        yield scope
    finally:
        _SCOPE.reset(token)


def image_partition(
    rows_per_image: Sequence[int], images_per_group: int, *, across_ranks: bool = True, process_group: Group = None
) -> Partition:
    """Group rows by the image they come from, ``images_per_group`` images to a group.

    Images are counted over all ranks in rank order, so the groups are those of one process that
    holds all images: a group may span ranks. Then (and only for ``images_per_group > 1``) every rank
    must call it equally often. With ``across_ranks=False`` each rank counts its own images and nothing
    is communicated. Rows must be ordered by image.

    Args:
        rows_per_image: the number of rows (RoIs) of each image of this rank; zeros allowed.
        images_per_group: images whose rows share statistics, at least 1.
    """
    if images_per_group < 1:
        raise ValueError(f"images_per_group must be at least 1, got {images_per_group}")
    num_images, first, total, spans = len(rows_per_image), 0, len(rows_per_image), False
    if across_ranks and images_per_group > 1 and is_distributed(process_group):
        everyone = [count for (count,) in all_gather_ints([num_images], process_group)]
        first, total = sum(everyone[: get_rank(process_group)]), sum(everyone)
        starts = [sum(everyone[:rank]) for rank in range(len(everyone))]
        spans = any(start % images_per_group for start in starts)  # alike on every rank
    if spans:
        images = torch.repeat_interleave(
            torch.arange(num_images), torch.as_tensor(list(rows_per_image), dtype=torch.int64)
        )
        groups = (images + first) // images_per_group
        return Partition(groups, max(1, -(-total // images_per_group)), True, process_group)
    return Partition.consecutive(
        [sum(rows_per_image[i : i + images_per_group]) for i in range(0, num_images, images_per_group)]
    )
