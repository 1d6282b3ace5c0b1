"""Features judged by their neighbours: weighted kNN, recall@k, retrieval mAP. Cosine similarity throughout.

Two backends with the same answers up to ties: faiss (exact by default, inverted lists by choice for large banks)
and torch. Queries are treated in chunks, so that nothing of size queries x bank is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakfree.errors import ConfigError, DataError, choices

__all__ = ["InvertedLists", "knn_accuracy", "knn_predict", "nearest", "recall_at_k", "retrieval_map"]

_CHUNK = 1024  # queries at a time
_TILE = 8192  # rows of the bank that the torch backend compares at a time


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
        bank: (N, D) features, any floating dtype; they are normalized here.
        queries: (M, D).
        backend: "faiss" (CPU, or GPU where faiss is built for it and the features are there) or "torch" (anywhere).
        approximate: inverted lists instead of exact search; faiss only.
        exclude_self: query i is row i of the bank and not its own neighbour.

    Returns:
        (similarity (M, k) float32, index (M, k) int64), on the device of ``queries``.

    Raises:
        DataError: a feature that is zero or not finite, named by its row; shapes that do not fit.
        ConfigError: an unknown backend, a ``k`` beyond the bank.
    """
    found = list(_search(bank, queries, k, backend, approximate, exclude_self))
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    backend: str = "faiss",
    approximate: InvertedLists | None = None,
    exclude_self: bool = False,
) -> Tensor:
    """Classes of each query, the likeliest first: int64 (M, num_classes).

    Each of the ``k`` neighbours votes for its class with weight exp(similarity / temperature) (Wu et al. 2018,
    "Instance discrimination", section 3.4). Equal votes: the smaller class first.

    Args:
        train_x, train_y: (N, D) features and int64 (N,) classes of the bank; test_x: (M, D).
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, got {temperature}")
    _check_labels(train_y, train_x)
    if not len(train_y):
        raise DataError("the bank is empty")
    classes = num_classes if num_classes is not None else int(train_y.max()) + 1
    if int(train_y.min()) < 0 or int(train_y.max()) >= classes:
        raise DataError(f"classes must be from 0 to {classes - 1}, got {int(train_y.min())} to {int(train_y.max())}")
    train_y = train_y.to(test_x.device)
    ranked = []
    for similarity, index in _search(train_x, test_x, k, backend, approximate, exclude_self):
        # The largest weight is 1: no overflow, and the order of classes is the same.
        weight = ((similarity - similarity[:, :1]) / temperature).double().exp()
        votes = torch.zeros(len(index), classes, dtype=torch.float64, device=index.device)
        votes.scatter_add_(1, train_y[index], weight)
        ranked.append(votes.argsort(dim=1, descending=True, stable=True))
    return torch.cat(ranked)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    backend: str = "faiss",
    *,
    approximate: InvertedLists | None = None,
) -> float:
    """Share of queries whose class their ``k`` nearest neighbours vote for; see :func:`knn_predict`."""
    _check_labels(test_y, test_x)
    options = {"k": k, "temperature": temperature, "backend": backend, "approximate": approximate}
    predicted = knn_predict(train_x, train_y, test_x, **options)[:, 0]  # type: ignore[arg-type]
    return float((predicted == test_y.to(predicted.device)).double().mean())


def recall_at_k(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    backend: str = "faiss",
    approximate: InvertedLists | None = None,
    exclude_self: bool = False,
) -> dict[int, float]:
    """For each k the share of queries with at least one of their class among the k nearest (Jegou et al. 2011)."""
    _check_labels(train_y, train_x)
    _check_labels(test_y, test_x)
    if not ks or min(ks) < 1:
        raise ConfigError(f"ks must be numbers of neighbours, at least 1 each, got {tuple(ks)}")
    _, index = nearest(train_x, test_x, max(ks), backend=backend, approximate=approximate, exclude_self=exclude_self)
    hits = train_y.to(index.device)[index] == test_y.to(index.device)[:, None]
    return {k: float(hits[:, :k].any(1).double().mean()) for k in ks}


def retrieval_map(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    backend: str = "faiss",
    exclude_self: bool = False,
) -> float:
    """Mean average precision of ranking the whole bank for each query; queries without a match in it do not count.

    Raises:
        DataError: no query has a match.
    """
    _check_labels(train_y, train_x)
    _check_labels(test_y, test_x)
    size = len(train_x) - int(exclude_self)
    total, count, start = 0.0, 0, 0
    train_y = train_y.to(test_x.device)
    for _, index in _search(train_x, test_x, size, backend, None, exclude_self):
        wanted = test_y[start : start + len(index)].to(index.device)
        hits = (train_y[index] == wanted[:, None]).double()
        start += len(index)
        precision = hits.cumsum(1) / torch.arange(1, size + 1, device=index.device)
        matches = hits.sum(1)
        known = matches > 0
        total += float(((precision * hits).sum(1)[known] / matches[known]).sum())
        count += int(known.sum())
    if count == 0:
        raise DataError("retrieval: no query shares its class with a row of the bank")
    return total / count


# ------------------------------------------------------------------------------------------------------------ search


def _normalized(features: Tensor, what: str) -> Tensor:
    if features.ndim != 2:
        raise DataError(f"{what}: expected features (N, D), got {tuple(features.shape)}")
    features = features.detach().float()
    length = features.norm(dim=1, keepdim=True)
    bad = ~(length.isfinite() & (length > 0)).squeeze(1)
    if bool(bad.any()):
        rows = bad.nonzero().view(-1)
        kind = "zero" if bool((length[rows[0]] == 0).all()) else "not finite"
        raise DataError(
            f"{what}: feature {int(rows[0])} is {kind} ({len(rows)} of {len(features)} are zero or not finite), so it "
            "has no direction to compare"
        )
    return features / length


def _check_labels(labels: Tensor, features: Tensor) -> None:
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise DataError(f"expected {len(features)} integer classes, got {tuple(labels.shape)} {labels.dtype}")


def _search(
    bank: Tensor, queries: Tensor, k: int, backend: str, approximate: InvertedLists | None, exclude_self: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """(similarity, index) of each chunk of queries."""
    if backend not in ("faiss", "torch"):
        raise ConfigError(f"unknown backend {backend!r}; choose from {choices(backend, ('faiss', 'torch'))}")
    if approximate is not None and backend != "faiss":
        raise ConfigError("inverted lists are faiss's: backend='torch' searches exactly")
    bank, queries = _normalized(bank, "bank"), _normalized(queries, "queries")
    if not len(queries):
        raise DataError("there are no queries")
    if bank.shape[1] != queries.shape[1]:
        raise DataError(f"the bank has {bank.shape[1]} features a row, the queries {queries.shape[1]}")
    available = len(bank) - int(exclude_self)
    if not 1 <= k <= available:
        raise ConfigError(f"k must be from 1 to {available}, the rows to choose from, got {k}")
    if exclude_self and len(bank) != len(queries):
        raise DataError(f"exclude_self: {len(queries)} queries are not the {len(bank)} rows of the bank")
    search = _faiss_index(bank, approximate) if backend == "faiss" else _TorchIndex(bank.to(queries.device))
    for start in range(0, len(queries), _CHUNK):
        part = queries[start : start + _CHUNK]
        similarity, index = search(part, k + int(exclude_self))
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


class _TorchIndex:
    """Exact search by tiles of the bank."""

    def __init__(self, bank: Tensor) -> None:
        self.bank = bank

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, index = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        index = index.to(queries.device)
        for start in range(0, len(self.bank), _TILE):
            tile = queries @ self.bank[start : start + _TILE].T
            values, places = tile.topk(min(k, tile.shape[1]), dim=1)
            best, index = torch.cat([best, values], 1), torch.cat([index, places + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            index = index.gather(1, order)
        return best, index


class _FaissIndex:
    def __init__(self, index: Any, device: torch.device) -> None:
        self.index, self.device = index, device

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        similarity, index = self.index.search(queries.cpu().numpy(), k)
        if (index < 0).any():
            raise ConfigError(f"the inverted lists that were probed hold fewer than k={k} rows; raise num_probes")
        return torch.from_numpy(similarity).to(self.device), torch.from_numpy(index).to(self.device)


def _faiss_index(bank: Tensor, approximate: InvertedLists | None) -> _FaissIndex:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("backend='faiss' needs the package faiss-cpu (or faiss-gpu); or take 'torch'") from error
    index: Any = faiss.IndexFlatIP(bank.shape[1])
    if approximate is not None:
        if approximate.num_lists > len(bank):
            raise ConfigError(f"num_lists={approximate.num_lists} is more than the {len(bank)} rows of the bank")
        index = faiss.IndexIVFFlat(index, bank.shape[1], approximate.num_lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.seed, index.cp.min_points_per_centroid = approximate.num_probes, approximate.seed, 1
    if bank.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), bank.device.index or 0, index)
    rows = bank.cpu().numpy()
    if approximate is not None:
        index.train(rows)
    index.add(rows)
    return _FaissIndex(index, bank.device)
