"""The nearest rows of a bank by cosine similarity, exact or by inverted lists, through faiss or torch.

Queries are treated in chunks and the bank in tiles, so that nothing of size queries x bank is ever held.

Exact search on CPUs multiplies with torch in both backends: faiss's own exact index uses the BLAS it is shipped with,
which does not know every processor (on one it took SSE kernels, and four times as long). Faiss keeps the best in its
heaps; the torch backend selects in two levels. Neither copies a large bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leakfree.errors import ConfigError, DataError, choices

__all__ = ["InvertedLists", "check_directions", "nearest", "search"]

BACKENDS = ("faiss", "torch")
_CHUNK = 1024  # queries at a time, at most
_NUMBERS = 2**23  # similarities held at a time
_HEAP_TILE = 1024  # rows of the bank that are multiplied at a time: what comes of them stays in the cache
_SAMPLE = 1024  # rows of the bank by which the heaps' bound is guessed
_TILE = 2**16  # of the torch backend, whose selection gains from long rows
_GROUP = 16  # similarities of which the first level looks at the largest
_COPIED_BYTES = 2**30  # a bank up to here is normalized once, a larger one whenever its rows are used
_GPU_NEIGHBOURS = 2048  # as many as faiss can select on a GPU

_Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # queries, k -> similarity, index


@dataclass(frozen=True)
class InvertedLists:
    """Approximate search for large banks (faiss ``IndexIVFFlat``): visit ``num_probes`` of ``num_lists`` clusters.

    Up to ``num_lists`` equal to about the root of the bank's size is usual; all probes make it exact.
    """

    num_lists: int
    num_probes: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_probes <= self.num_lists:
            raise ConfigError(f"num_probes must be from 1 to num_lists={self.num_lists}, got {self.num_probes}")


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    backend: str = "faiss",
    approximate: InvertedLists | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """The ``k`` most similar rows of ``bank`` for each query, the most similar first.

    Args:
        bank: (N, D) features, any real dtype; they are normalized here, and may be mapped from a file.
        queries: (M, D).
        backend: "faiss" (CPU, or GPU where faiss is built for it and the bank is there) or "torch" (anywhere).
        approximate: inverted lists instead of exact search; faiss only.
        exclude_self: query i is row i of the bank and not its own neighbour.

    Returns:
        (similarity (M, k) float32, index (M, k) int64), on the device of ``queries``. Between equal similarities
        the choice is the backend's.

    Raises:
        DataError: a feature that is zero or not finite, named by its row; shapes that do not fit.
        ConfigError: an unknown backend, a ``k`` beyond the bank.
    """
    found = list(search(bank, queries, k, backend, approximate, exclude_self))
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


def search(
    bank: Tensor, queries: Tensor, k: int, backend: str, approximate: InvertedLists | None, exclude_self: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """:func:`nearest`, chunk by chunk of the queries."""
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; choose from {choices(backend, BACKENDS)}")
    if approximate is not None and backend != "faiss":
        raise ConfigError("inverted lists are faiss's: backend='torch' searches exactly")
    place, faiss = _place(bank, queries, backend)
    rows, asked = _Directions(bank.to(place), "bank"), _Directions(queries, "queries")
    if not len(asked):
        raise DataError("there are no queries")
    if bank.shape[1] != queries.shape[1]:
        raise DataError(f"the bank has {bank.shape[1]} features a row, the queries {queries.shape[1]}")
    available = len(rows) - int(exclude_self)
    if not 1 <= k <= available:
        raise ConfigError(f"k must be from 1 to {available}, the rows to choose from, got {k}")
    if exclude_self and len(rows) != len(asked):
        raise DataError(f"exclude_self: {len(asked)} queries are not the {len(rows)} rows of the bank")
    wanted = k + int(exclude_self)
    find, tile = _make_search(rows, wanted, faiss, approximate)
    chunk = max(1, min(_CHUNK, _NUMBERS // max(min(tile, len(rows)), 8 * wanted)))
    for start in range(0, len(asked), chunk):
        part = asked[start : start + chunk]
        similarity, index = (found.to(queries.device) for found in find(part.to(place), wanted))
        if exclude_self:
            own = torch.arange(start, start + len(part), device=index.device)[:, None]
            similarity, index = _without(similarity, index, own)
        yield similarity, index


def _without(similarity: Tensor, index: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Drop ``own`` from each row or, where a duplicate pushed it out, the last."""
    drop = index == own
    drop[:, -1] |= ~drop.any(1)
    keep = ~drop
    return similarity[keep].view(len(index), -1), index[keep].view(len(index), -1)


def check_directions(features: Tensor, what: str) -> Tensor:
    """The length of each row, float64 (N,).

    Raises:
        DataError: no rows of features, or one that is zero or not finite.
    """
    if features.ndim != 2 or features.is_complex():
        raise DataError(f"{what}: expected features (N, D), got {tuple(features.shape)} {features.dtype}")
    pieces = features.detach().split(max(1, _NUMBERS // max(1, features.shape[1])))
    lengths = torch.cat([torch.linalg.vector_norm(_real(part), dim=1, dtype=torch.float64) for part in pieces])
    bad = ~(lengths.isfinite() & (lengths > 0))
    if bool(bad.any()):
        places = bad.nonzero().view(-1)
        kind = "zero" if float(lengths[places[0]]) == 0 else "not finite"
        raise DataError(
            f"{what}: feature {int(places[0])} is {kind} ({len(places)} of {len(features)} are zero or not finite), so "
            "it has no direction to compare"
        )
    return lengths


class _Directions:
    """Rows of length 1, float32, by slices."""

    def __init__(self, features: Tensor, what: str) -> None:
        self.lengths = check_directions(features, what)
        self.features = features.detach()
        self.copied: Tensor | None = None
        if 4 * features.numel() <= _COPIED_BYTES:
            self.copied = self[:]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, place: slice) -> Tensor:
        if self.copied is not None:
            return self.copied[place]
        part = _real(self.features[place])
        return (part / self.lengths[place, None].to(part.dtype)).float()

    def tiles(self, size: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), size):
            yield start, self[start : start + size]


def _real(features: Tensor) -> Tensor:
    """In a dtype in which lengths neither overflow nor vanish."""
    return features if features.dtype in (torch.float32, torch.float64) else features.float()


# ---------------------------------------------------------------------------------------------------------- backends


def _place(bank: Tensor, queries: Tensor, backend: str) -> tuple[torch.device, ModuleType | None]:
    """Where to search, and faiss if it is to search."""
    if backend == "torch":
        return queries.device, None
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("backend='faiss' needs the package faiss-cpu (or faiss-gpu); or take 'torch'") from error
    on_gpu = bank.device.type == "cuda" and hasattr(faiss, "StandardGpuResources")
    return bank.device if on_gpu else torch.device("cpu"), faiss


def _make_search(
    bank: _Directions, k: int, faiss: ModuleType | None, approximate: InvertedLists | None
) -> tuple[_Search, int]:
    """The search, and how many rows of the bank it compares with at a time."""
    on_gpu = bank.features.device.type == "cuda"
    if faiss is None or (approximate is None and on_gpu and k > _GPU_NEIGHBOURS):
        return _TwoLevels(bank), _TILE
    if approximate is None and not on_gpu:
        return _Heaps(faiss, bank, k), _HEAP_TILE
    return _Index(faiss, bank, approximate), _HEAP_TILE


class _TwoLevels:
    """Exact search with torch."""

    def __init__(self, bank: _Directions) -> None:
        self.bank = bank

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, index = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
        for start, tile in self.bank.tiles(_TILE):
            values, places = _largest(_similarity(queries, tile), k)
            if not start:
                best, index = values, places
                continue
            best, index = torch.cat([best, values], 1), torch.cat([index, places + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            index = index.gather(1, order)
        return best, index


def _similarity(queries: Tensor, rows: Tensor) -> Tensor:
    with torch.autocast(queries.device.type, enabled=False):  # of a training loop that we may be called from
        return queries @ rows.T


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values.topk(k, dim=1)``, or all of fewer.

    Columns form groups. No value outside the ``k`` groups of the largest maxima is needed: these maxima are at least
    as large. So two short selections and a pass for the maxima take the place of a long selection.
    """
    rows, columns = values.shape
    groups = columns // _GROUP
    if groups < 2 * k:
        return values.topk(min(k, columns), dim=1)
    table = values[:, : groups * _GROUP].view(rows, _GROUP, groups)  # column c is in group c % groups
    chosen = table.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = table.gather(2, chosen[:, None].expand(-1, _GROUP, -1)).reshape(rows, -1)
    left = values[:, groups * _GROUP :]
    best, place = torch.cat([candidates, left], 1).topk(k, dim=1)
    inside = place < _GROUP * k
    column = place // k * groups + chosen.gather(1, place % k)
    return best, torch.where(inside, column, place - _GROUP * k + groups * _GROUP)


class _Heaps:
    """Exact search on CPUs: torch multiplies, faiss keeps the best.

    A heap spends most of its time on rows that enter early and leave again. So it starts from a bound: the similarity
    that, by a sample of the bank, a few times ``k`` rows should exceed. Queries of which fewer than ``k`` do are
    searched again without one.
    """

    def __init__(self, faiss: ModuleType, bank: _Directions, k: int) -> None:
        self.faiss, self.bank = faiss, bank
        expected = k * _SAMPLE / max(1, len(bank))  # of the nearest rows, in the sample
        self.rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
        self.sample = _sample(bank, _SAMPLE) if len(bank) >= 8 * _SAMPLE and self.rank <= _SAMPLE // 8 else None

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.sample is None:
            return self._find(queries, k, None)
        bound = _similarity(queries, self.sample).topk(self.rank, dim=1).values[:, -1:]
        similarity, index = self._find(queries, k, bound)
        short = (index < 0).any(1)
        if bool(short.any()):
            similarity[short], index[short] = self._find(queries[short], k, None)
        return similarity, index

    def _find(self, queries: Tensor, k: int, bound: Tensor | None) -> tuple[Tensor, Tensor]:
        found = self.faiss.ResultHeap(len(queries), k, keep_max=True)
        if bound is not None:
            found.D[:] = bound.numpy()
        with _threads_of_torch(self.faiss):
            for start, tile in self.bank.tiles(_HEAP_TILE):
                similarity = _similarity(queries, tile).numpy()
                found.heaps.addn(len(tile), self.faiss.swig_ptr(similarity), start)
            found.finalize()
        return torch.from_numpy(found.D), torch.from_numpy(found.I)


class _Index:
    """An index of faiss, on the GPU if the bank is there."""

    def __init__(self, faiss: ModuleType, bank: _Directions, approximate: InvertedLists | None) -> None:
        self.faiss = faiss
        width, device = bank.features.shape[1], bank.features.device
        index: Any = faiss.IndexFlatIP(width)
        if approximate is not None:
            if approximate.num_lists > len(bank):
                raise ConfigError(f"num_lists={approximate.num_lists} is more than the {len(bank)} rows of the bank")
            index = faiss.IndexIVFFlat(index, width, approximate.num_lists, faiss.METRIC_INNER_PRODUCT)
            index.nprobe, index.cp.seed, index.cp.min_points_per_centroid = approximate.num_probes, approximate.seed, 1
        if device.type == "cuda":
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
        with _threads_of_torch(faiss):
            if approximate is not None:
                index.train(_sample(bank, 256 * approximate.num_lists, approximate.seed).cpu().numpy())
            for _, tile in bank.tiles(_TILE):
                index.add(tile.cpu().numpy())
        self.index = index

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with _threads_of_torch(self.faiss):
            similarity, index = self.index.search(queries.cpu().numpy(), k)
        if (index < 0).any():
            raise ConfigError(f"the inverted lists that were probed hold fewer than k={k} rows; raise num_probes")
        return torch.from_numpy(similarity), torch.from_numpy(index)


@contextmanager
def _threads_of_torch(faiss: ModuleType) -> Iterator[None]:
    """As many as torch has: ranks that share a machine set it for torch, and faiss would take all cores."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _sample(bank: _Directions, count: int, seed: int = 0) -> Tensor:
    """That many rows at random, or all of fewer."""
    if len(bank) <= count:
        return bank[:]
    chosen = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.cat([tile[chosen[(chosen >= at) & (chosen < at + len(tile))] - at] for at, tile in bank.tiles(_TILE)])
