"""The losses of SimCLR and MoCo over all ranks, and how often the positive wins.

Both equal lightly's ``NTXentLoss`` in one process. These are ours since ranks may hold different numbers of images
(lightly gathers equal shares), and since the pretext accuracy comes with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leakfree.distributed import Group, all_gather_rows, get_rank, get_world_size

__all__ = ["Contrast", "nt_xent", "queue_info_nce"]


class Contrast(NamedTuple):
    """``loss``: () whose mean over ranks, and so whose gradient under DDP, is that of the joint batch.
    ``accuracy``: (), share of this rank's queries that are most similar to their own key; no gradient.
    ``keys``: (N over all ranks, D) the keys of the step; no gradient."""

    loss: Tensor
    accuracy: Tensor
    keys: Tensor


def nt_xent(queries: Tensor, keys: Tensor, temperature: float, *, group: Group = None) -> Contrast:
    """SimCLR's loss: each of the 2N views finds its other view among the 2N - 1 others of all ranks.

    Args:
        queries, keys: (n, D) of this rank, of length 1: two views of n images. n may differ between ranks.
        temperature: the similarity is divided by it.

    Reference: Chen et al. 2020, equation 1 and algorithm 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        count = len(queries)
        # One collective for both, so that its backward is one too, ahead of all gradients of weights.
        both, sizes = all_gather_rows(torch.stack([_full(queries), _full(keys)], 1), group)
        total, first = sum(sizes), sum(sizes[: get_rank(group)])
        views = torch.cat([both[:, 0], both[:, 1]])  # all first views, then all second views
        own = torch.arange(first, first + count, device=views.device)
        rows = torch.cat([own, own + total])
        logits = views[rows] @ views.T / temperature
        logits = logits.scatter(1, rows[:, None], float("-inf"))
        positive = (rows + total) % (2 * total)
        losses = F.cross_entropy(logits, positive, reduction="sum") / (2 * total)
        accuracy = (logits[:count].argmax(1) == positive[:count]).double().mean()
    return Contrast(losses * get_world_size(group), accuracy.detach(), both[:, 1].detach())


def queue_info_nce(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, *, group: Group = None
) -> Contrast:
    """MoCo's loss: each query finds its key among the queue's.

    Args:
        queries, keys: (n, D) of this rank, of length 1; keys without gradient. n may differ between ranks.
        queue: (K, D), the same on every rank. Must not change before the backward.

    Reference: He et al. 2020, equation 1 and algorithm 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = _full(queries), _full(keys).detach()
        everyone, sizes = all_gather_rows(keys, group)
        logits = queue_logits(queries, keys, queue) / temperature
        positive = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        losses = F.cross_entropy(logits, positive, reduction="sum") / sum(sizes)
        accuracy = (logits.argmax(1) == 0).double().mean()
    return Contrast(losses * get_world_size(group), accuracy.detach(), everyone)


def queue_logits(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """(n, 1 + K) similarities: of the own key, then of the queue's."""
    return torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1)


def _full(features: Tensor) -> Tensor:
    """At least float32: exponentials of similarities need the digits."""
    return features if features.dtype == torch.float64 else features.float()
