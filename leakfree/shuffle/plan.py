"""Random balanced groups over all ranks, drawn from a seed alone.

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

__all__ = ["GroupDraw", "permute", "unpermute"]

Ints = npt.NDArray[np.int64]
_ROUNDS = 8
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """splitmix64's finalizer on a Python integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


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


@dataclass(frozen=True)
class GroupDraw:
    """One draw of balanced random groups over the rows of all ranks.

    Rows are numbered over all ranks in rank order. Row i goes to position p(i); group g holds the
    positions p with ``p * num_groups // total == g``, so group sizes differ by at most one. Groups
    live on ranks in order: group g on rank ``g * world_size // num_groups``.

    Attributes:
        sizes: rows on each rank, zeros allowed.
        rank: this rank.
        num_groups: groups over all ranks, at least 1.
        seed, index: select the permutation; the same on every rank. ``index`` counts the draws.
    """

    sizes: tuple[int, ...]
    rank: int
    num_groups: int
    seed: int
    index: int

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def key(self) -> int:
        return _mix(_mix(self.seed) ^ self.index)

    @property
    def offset(self) -> int:
        """Number of this rank's first row."""
        return sum(self.sizes[: self.rank])

    @cached_property
    def positions(self) -> Ints:
        """(N,) position of each of this rank's rows."""
        rows = np.arange(self.offset, self.offset + self.sizes[self.rank], dtype=np.int64)
        return permute(rows, self.total, self.key)

    def group_of(self, positions: Ints) -> Ints:
        """The group of each position."""
        return positions * self.num_groups // max(self.total, 1)

    def rank_of_group(self, groups: Ints) -> Ints:
        """The rank on which each group meets when rows move."""
        return groups * self.world_size // self.num_groups

    @cached_property
    def groups(self) -> Ints:
        """(N,) group of each of this rank's rows."""
        return self.group_of(self.positions)

    def first_position(self, group: int) -> int:
        """The first position of a group (``total`` for ``group == num_groups``)."""
        return -(-group * self.total // self.num_groups)

    @cached_property
    def local_groups(self) -> range:
        """The groups that meet on this rank when rows move."""
        first = -(-self.rank * self.num_groups // self.world_size)
        return range(first, -(-(self.rank + 1) * self.num_groups // self.world_size))

    @cached_property
    def sources(self) -> Ints:
        """Row numbers that meet on this rank when rows move, in the order of their positions."""
        first, last = self.local_groups.start, self.local_groups.stop
        positions = np.arange(self.first_position(first), self.first_position(last), dtype=np.int64)
        return unpermute(positions, self.total, self.key)
