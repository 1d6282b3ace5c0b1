"""Features judged by their neighbours: weighted kNN, recall@k, retrieval mAP. Cosine similarity throughout.

Two backends with the same answers up to ties: faiss (exact by default, inverted lists by choice for large banks)
and torch; see :mod:`leakfree.evaluation.search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leakfree.distributed import all_gather_table, get_rank, get_world_size
from leakfree.errors import ConfigError, DataError
from leakfree.evaluation.search import InvertedLists, check_directions, nearest, search

__all__ = ["few_label_knn_accuracy", "knn_accuracy", "knn_predict", "recall_at_k", "retrieval_map"]


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
        backend, approximate, exclude_self: as in :func:`leakfree.evaluation.nearest`.

    Raises:
        DataError: a feature that is zero or not finite, named by its row; shapes or classes that do not fit.
        ConfigError: an unknown backend, a ``k`` beyond the bank, a temperature that is not above 0.
    """
    votes = _votes(train_x, train_y, test_x, k, temperature, num_classes, backend, approximate, exclude_self)
    return torch.cat([part.argsort(dim=1, descending=True, stable=True) for part in votes])


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
    exclude_self: bool = False,
    over_ranks: bool = False,
) -> float:
    """Share of queries whose class their ``k`` nearest neighbours vote for; see :func:`knn_predict`.

    Args:
        over_ranks: every rank gives the same features and answers its share of the queries; a collective. Not with
            ``exclude_self``.
    """
    _check_labels(test_y, test_x)
    if not len(test_x):
        raise DataError("there are no queries")
    mine = torch.arange(len(test_x))
    if over_ranks:
        if exclude_self:
            raise ConfigError("over_ranks does not go with exclude_self, where queries are the rows of the bank")
        check_directions(test_x, "queries")  # all of them on each rank: a fault is to be found by every one
        mine = mine[get_rank() :: get_world_size()]
    mine = mine.to(test_x.device)
    # A rank without a share searches too, for the sake of the checks.
    queries = test_x if len(mine) == len(test_x) else test_x[mine] if len(mine) else test_x[:1]
    wanted = test_y.to(test_x.device)[mine]
    hits, start = 0, 0
    for votes in _votes(train_x, train_y, queries, k, temperature, None, backend, approximate, exclude_self):
        answers = wanted[start : start + len(votes)]
        hits += int((votes.argmax(1)[: len(answers)] == answers).sum())  # argmax: the first of equal votes
        start += len(votes)
    if over_ranks:
        hits = int(all_gather_table([hits]).sum())
    return hits / len(test_x)


def few_label_knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    labels_per_class: int = 10,
    k: int = 5,
    temperature: float = 0.07,
    draws: int = 10,
    seed: int = 0,
    backend: str = "faiss",
) -> float:
    """:func:`knn_accuracy` with a bank of few labels of each class: the mean over ``draws`` of them.

    A draw is a function of (seed, its number, ``train_y``) alone, so it is the same for all features of a data set.

    Raises:
        DataError: a class with fewer rows than ``labels_per_class``; and as in :func:`knn_predict`.
    """
    _check_labels(train_y, train_x)
    if labels_per_class < 1 or draws < 1:
        raise ConfigError(f"labels_per_class and draws must be at least 1, got {labels_per_class} and {draws}")
    labels = train_y.cpu().numpy()
    values, counts = np.unique(labels, return_counts=True)
    if len(counts) and counts.min() < labels_per_class:
        rare = counts.argmin()
        raise DataError(f"class {values[rare]} has {counts[rare]} rows in the bank, fewer than {labels_per_class}")
    pools = [np.flatnonzero(labels == value) for value in values]
    total = 0.0
    for draw in range(draws):
        rng = np.random.default_rng([5, seed, draw])
        chosen = [rng.choice(pool, labels_per_class, replace=False) for pool in pools]
        bank = torch.from_numpy(np.sort(np.concatenate([np.empty(0, np.int64), *chosen])))
        x, y = train_x[bank.to(train_x.device)], train_y[bank.to(train_y.device)]
        total += knn_accuracy(x, y, test_x, test_y, k, temperature, backend)
    return total / draws


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
    k: int | None = None,
    backend: str = "faiss",
    approximate: InvertedLists | None = None,
    exclude_self: bool = False,
) -> float:
    """Mean average precision of ranking the bank for each query; queries without a match in it do not count.

    Args:
        k: rank only the ``k`` nearest (mAP@k): the average is over min(k, matches in the bank), so that 1 is still
            the best. None = the whole bank.
        approximate: inverted lists; needs a ``k``.

    Raises:
        DataError: no query has a match.
    """
    _check_labels(train_y, train_x)
    _check_labels(test_y, test_x)
    if approximate is not None and k is None:
        raise ConfigError("inverted lists do not rank the whole bank: give k")
    size = len(train_x) - int(exclude_self) if k is None else k
    total, count, start = 0.0, 0, 0
    train_y = train_y.to(test_x.device)
    places = torch.arange(1, size + 1, device=test_x.device)
    values, counts = train_y.unique(return_counts=True)
    for _, index in search(train_x, test_x, size, backend, approximate, exclude_self):
        wanted = test_y[start : start + len(index)].to(index.device)
        hits = (train_y[index] == wanted[:, None]).double()
        place = torch.searchsorted(values, wanted).clamp(max=len(values) - 1)
        matches = torch.where(values[place] == wanted, counts[place], 0)
        if exclude_self:
            matches -= (train_y[start : start + len(index)] == wanted).long()
        start += len(index)
        precision = hits.cumsum(1).div_(places).mul_(hits).sum(1)
        known = matches > 0
        total += float((precision[known] / matches[known].clamp(max=size)).sum())
        count += int(known.sum())
    if count == 0:
        raise DataError("retrieval: no query shares its class with a row of the bank")
    return total / count


def _votes(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    k: int,
    temperature: float,
    num_classes: int | None,
    *how: Any,
) -> Iterator[Tensor]:
    """float64 (M, classes), chunk by chunk of the queries."""
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, got {temperature}")
    _check_labels(train_y, train_x)
    if not len(train_y):
        raise DataError("the bank is empty")
    classes = num_classes if num_classes is not None else int(train_y.max()) + 1
    if int(train_y.min()) < 0 or int(train_y.max()) >= classes:
        raise DataError(f"classes must be from 0 to {classes - 1}, got {int(train_y.min())} to {int(train_y.max())}")
    train_y = train_y.to(test_x.device)
    for similarity, index in search(train_x, test_x, k, *how):
        # The largest weight is 1: no overflow, and the order of classes is the same.
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = torch.zeros(len(index), classes, dtype=torch.float64, device=index.device)
        yield votes.scatter_add_(1, train_y[index], weight)


def _check_labels(labels: Tensor, features: Tensor) -> None:
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise DataError(f"expected {len(features)} integer classes, got {tuple(labels.shape)} {labels.dtype}")
