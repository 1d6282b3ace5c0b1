"""Which domain the rows of a forward are from: said by a context, never by the order of calls.

A domain is a data set, a corruption, or a level of a feature pyramid that shares its head with the
others. What is done with it lives in ``per_domain``.

Legend: D domains, N rows, C channels, S positions of a row.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from leakfree.errors import LeakfreeError
from leakfree.norms.statistics import Moments, group_moments
from leakfree.partition import Partition
from leakfree.recomputation import recomputing

__all__ = ["NO_ROWS", "Given", "Key", "Levels", "Rows", "current_domain", "domain", "given_domain"]

Key = int | str  # a domain by its index or its name


@dataclass(frozen=True, eq=False)
class Rows:
    """The domains of the rows of a tensor (N, C, *): ``index`` of all of them, or ``ids``, int64 (N,)."""

    index: int | None = None
    ids: Tensor | None = None

    def groups(self, x: Tensor) -> Tensor:
        if self.ids is not None:
            return self.ids
        assert self.index is not None
        return torch.full((len(x),), self.index, device=x.device)

    def spread(self, table: Tensor, x: Tensor) -> Tensor:
        """(D, C) -> what broadcasts against ``x``."""
        rows = table[self.index][None] if self.ids is None else table.index_select(0, self.ids)
        return rows.reshape(*rows.shape, *[1] * (x.ndim - 2))

    def moments(self, x: Tensor, whole: Partition, num_domains: int) -> Moments:
        """Moments of each domain over the ranks that ``whole`` spans."""
        groups = Partition(self.groups(x), num_domains, whole.across_ranks, whole.process_group)
        return group_moments(x, groups)

    def same_as(self, other: Rows) -> bool:
        if self.ids is None or other.ids is None:
            return self.index == other.index and self.ids is other.ids
        return torch.equal(self.ids, other.ids)


NO_ROWS = Rows(0)  # of any domain; always the same, as empty inputs cannot be told apart in a recomputation


@dataclass(frozen=True, eq=False)
class Levels:
    """The domains of the positions of a tensor (N, C, S, 1...): the first ``sizes[0]`` are of ``domains[0]``, ..."""

    domains: tuple[int, ...]
    sizes: tuple[int, ...]

    def spread(self, table: Tensor, x: Tensor) -> Tensor:
        of_position = torch.repeat_interleave(torch.tensor(self.domains), torch.tensor(self.sizes)).to(x.device)
        return table.index_select(0, of_position).t().reshape(1, x.shape[1], -1, *[1] * (x.ndim - 3))

    def moments(self, x: Tensor, whole: Partition, num_domains: int) -> Moments:
        # Each rank goes through all domains, those that it has no level of too: the exchanges stay in step.
        levels = dict(zip(self.domains, x.split(list(self.sizes), 2), strict=True))
        one = Partition(across_ranks=whole.across_ranks, process_group=whole.process_group)
        each = [group_moments(levels.get(index, x[:, :, :0]), one) for index in range(num_domains)]
        count, mean, var = (torch.cat([getattr(of, name) for of in each]) for name in ("count", "mean", "var"))
        return Moments(count, mean, var)


class Given:
    """What a context says, checked and moved once for all layers inside."""

    def __init__(self, key: Key | Tensor | Levels) -> None:
        self.key: Key | Levels | None = None
        self.ids: Tensor | None = None
        if isinstance(key, Tensor) and key.dtype == torch.int64 and key.ndim == 1:
            self.ids = key.detach().clone()  # a backward will need it as it is now
        elif isinstance(key, (str, Levels)):
            self.key = key
        else:
            self.key = _index(key)
        self.in_backward = recomputing()
        self._bounds: tuple[int, int] | None = None
        self._copies: dict[torch.device, Tensor] = {}

    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest of ``ids``, (0, 0) if there are none. The first call waits for the device."""
        assert self.ids is not None
        if self._bounds is None:
            low, high = self.ids.aminmax() if len(self.ids) else (0, 0)
            self._bounds = (int(low), int(high))
        return self._bounds

    def on(self, device: torch.device) -> Tensor:
        assert self.ids is not None
        if device not in self._copies:
            self._copies[device] = self.ids.to(device)
        return self._copies[device]


def _index(key: object) -> int:
    if isinstance(key, SupportsIndex) and not isinstance(key, (bool, Tensor)):
        return operator.index(key)
    got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
    raise LeakfreeError(
        f"domain: expected an index, a name, or an int64 tensor (N,) with the index of each row; got {got}"
    )


_GIVEN: ContextVar[Given | None] = ContextVar("leakfree_domain", default=None)


def current_domain() -> Given | None:
    """What the innermost open context says, or None."""
    return _GIVEN.get()


@contextmanager
def given_domain(given: Given) -> Iterator[None]:
    """As :func:`domain`, also for levels side by side in one tensor."""
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


@contextmanager
def domain(key: Key | Tensor) -> Iterator[None]:
    """Say which domain the rows are from that :class:`leakfree.norms.DomainBatchNorm` layers normalize inside.

    Holds for every layer in the forward, for this thread, until a context inside says otherwise. A layer
    that runs again in a backward (activation checkpointing) finds the domains of its first forward by its
    input, wherever the backward runs; a context opened inside the checkpointed function comes first.

    Args:
        key: the index of the domain of all rows, or its name where the layer knows names; or int64 (N,),
            the index of each row of a mixed batch, on any device. The tensor is tied to the order of the
            rows: where rows are moved or picked inside (``Shuffled``, RoIs), open another context there.

    Raises:
        LeakfreeError: ``key`` is none of these. Whether it fits is told by the layer.

    Example:
        >>> with domain("p3"):                                               # doctest: +SKIP
        ...     y = head(features["p3"])
        >>> with domain(batch["domain"]):                                    # doctest: +SKIP
        ...     loss = model(batch["image"])
    """
    with given_domain(Given(key)):
        yield
