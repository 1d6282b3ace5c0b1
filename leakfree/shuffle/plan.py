"""Random groups over all ranks, drawn from a seed alone.

A counter-based permutation (a Feistel network on a a x b rectangle, walked until it lands inside the
range) gives any rank the new position of any row without drawing the whole permutation: no broadcast,
and work in proportion to the rank's own rows. Pure arithmetic on numpy integers; no torch.
Reference: Black & Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), section 5
(generalized Feistel) and section 3 (cycle walking).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["GroupDraw", "mix_seed", "permute", "unpermute"]

Ints = npt.NDArray[np.int64]
_ROUNDS = 8
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """splitmix64's finalizer on a Python integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_seed(seed: int, salt: int) -> int:
    """Another seed for each ``salt``, in [0, 2**62)."""
    return _mix(_mix(seed) ^ salt) >> 2


def _round(half: npt.NDArray[np.uint64], key: int, number: int, modulus: int) -> npt.NDArray[np.uint64]:
    """A pseudo-random function of one half of the block, in [0, modulus)."""
    value = half + np.uint64(_mix(key ^ _mix(number)))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value ^ (value >> np.uint64(31))) % np.uint64(modulus)


def _network(block: npt.NDArray[np.uint64], sides: tuple[int, int], key: int, inverse: bool) -> npt.NDArray[np.uint64]:
    halves = [block // np.uint64(sides[1]), block % np.uint64(sides[1])]
    for number in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        this = number % 2
        shift, side = _round(halves[1 - this], key, number, sides[this]), np.uint64(sides[this])
        halves[this] = (halves[this] + (side - shift if inverse else shift)) % side
    return halves[0] * np.uint64(sides[1]) + halves[1]


def _walk(values: Ints, total: int, key: int, inverse: bool) -> Ints:
    if values.size and (values.min() < 0 or values.max() >= total):
        raise ValueError(f"indices must lie in [0, {total}), got {values.min()} to {values.max()}")
    first = max(1, int(np.ceil(np.sqrt(total))))
    sides = (first, max(1, -(-total // first)))
    out = _network(values.astype(np.uint64), sides, key, inverse)
    while (outside := out >= np.uint64(max(total, 1))).any():
        out[outside] = _network(out[outside], sides, key, inverse)
    return out.astype(np.int64)


def permute(indices: Ints, total: int, key: int) -> Ints:
    """New positions of ``indices`` under the permutation of [0, total) that ``key`` selects."""
    return _walk(indices, total, key, inverse=False)


def unpermute(positions: Ints, total: int, key: int) -> Ints:
    """The inverse of :func:`permute`: which index stands at each position."""
    return _walk(positions, total, key, inverse=True)


@dataclass(frozen=True, eq=False)
class GroupDraw:
    """One draw of random groups over the rows of all ranks.

    Rows are numbered over all ranks in rank order. Row i goes to position p(i), and groups are ranges
    of positions: group g holds the positions from ``first_position(g)`` to ``first_position(g + 1)``.
    Groups live on ranks in order: group g on rank ``g * world_size // num_groups``.

    Attributes:
        sizes: (world_size,) integers, rows on each rank, zeros allowed.
        rank: this rank.
        num_groups: groups over all ranks, at least 1.
        seed, index: select the permutation; the same on every rank. ``index`` counts the draws.
        balance: groups differ by at most one row. Otherwise rank r's groups hold together as many rows
            as rank r has, and it takes at least as many groups as ranks.

    Raises:
        ValueError: no group; fewer groups than ranks that keep their sizes.
    """

    sizes: npt.ArrayLike
    rank: int
    num_groups: int
    seed: int
    index: int
    balance: bool = True

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {self.num_groups}")
        if not self.balance and self.num_groups < self.world_size:
            raise ValueError(
                f"ranks that keep their number of rows need a group each: num_groups={self.num_groups} is less than "
                f"{self.world_size} ranks"
            )

    @cached_property
    def rows(self) -> Ints:
        """(world_size,) ``sizes`` as an array."""
        return np.asarray(self.sizes, dtype=np.int64)

    @cached_property
    def bounds(self) -> Ints:
        """(world_size + 1,) number of the first row of each rank, and of all rows."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.rows)])

    @cached_property
    def total(self) -> int:
        return int(self.bounds[-1])

    @property
    def world_size(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> int:
        return _mix(_mix(self.seed) ^ self.index)

    @property
    def leaves_ranks_empty(self) -> bool:
        """Whether no rows meet on some rank."""
        if self.balance:
            return self.num_groups < self.world_size or self.total < self.num_groups
        return not self.rows.all()

    def rank_of_row(self, rows: Ints) -> Ints:
        """The rank that holds each row."""
        return np.searchsorted(self.bounds, rows, side="right").astype(np.int64) - 1

    @cached_property
    def positions(self) -> Ints:
        """(N,) position of each of this rank's rows."""
        rows = np.arange(self.bounds[self.rank], self.bounds[self.rank + 1], dtype=np.int64)
        return permute(rows, self.total, self.key)

    def group_of(self, positions: Ints) -> Ints:
        """The group of each position."""
        if self.balance:
            return positions * self.num_groups // max(self.total, 1)
        rank = self.rank_of_row(positions)  # whose share of the positions it is
        first = self._first_group(rank)
        count = self._first_group(rank + 1) - first
        return (first + (positions - self.bounds[rank]) * count // self.rows[rank]).astype(np.int64)

    def rank_of_group(self, groups: Ints) -> Ints:
        """The rank on which each group meets when rows move."""
        return groups * self.world_size // self.num_groups

    def _first_group(self, rank: Ints) -> Ints:
        return -(-rank * self.num_groups // self.world_size)

    @cached_property
    def groups(self) -> Ints:
        """(N,) group of each of this rank's rows."""
        return self.group_of(self.positions)

    def first_position(self, group: int) -> int:
        """The first position of a group (``total`` for ``group == num_groups``)."""
        if self.balance or group == self.num_groups:
            return -(-group * self.total // self.num_groups)
        rank = int(self.rank_of_group(np.int64(group)))  # type: ignore[arg-type]
        first, count = (int(self._first_group(np.int64(r))) for r in (rank, rank + 1))  # type: ignore[arg-type]
        return int(self.bounds[rank]) - (-(group - first) * int(self.rows[rank]) // (count - first))

    @cached_property
    def local_groups(self) -> range:
        """The groups that meet on this rank when rows move."""
        first = -(-self.rank * self.num_groups // self.world_size)
        return range(first, -(-(self.rank + 1) * self.num_groups // self.world_size))

    @cached_property
    def local_positions(self) -> Ints:
        """(M,) positions that meet on this rank when rows move."""
        first, last = self.first_position(self.local_groups.start), self.first_position(self.local_groups.stop)
        return np.arange(first, last, dtype=np.int64)

    @cached_property
    def sources(self) -> Ints:
        """(M,) row numbers that meet on this rank when rows move, in the order of their positions."""
        return unpermute(self.local_positions, self.total, self.key)
