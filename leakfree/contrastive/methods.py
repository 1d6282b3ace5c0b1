"""MoCo and SimCLR: two encoders, or two passes of one, and what they compare."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakfree.contrastive.losses import Contrast, nt_xent, queue_info_nce, queue_logits
from leakfree.contrastive.mitigation import Mitigation
from leakfree.contrastive.shared_statistics import SharedStatistics
from leakfree.norms import batch_statistics

__all__ = ["ContrastiveMethod", "Encoder", "MoCo", "SimCLR", "Views"]


class Views(NamedTuple):
    """A training batch of this rank.

    ``query``, ``key``: (N, 3, S, S), two views of the same images; under ``loader_shuffle`` ``key`` holds the images
    that meet here, (M, 3, S, S). ``labels``, ``indices``: int64 (N,), of the queries. ``step`` selects the
    shuffle; it stays on the host.
    """

    query: Tensor
    key: Tensor
    labels: Tensor
    indices: Tensor
    step: int


class Encoder(nn.Module):
    """A backbone and a projection head: images (N, 3, H, W) -> features (N, D) of length 1."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(images).flatten(1)), dim=1)


class ContrastiveMethod(nn.Module, ABC):
    """What SimCLR and MoCo have in common.

    Args:
        encoder: of the queries; its backbone is what a run is for.
        query, key: who shares statistics in the forwards of the two views.
        temperature: of the similarities.
    """

    def __init__(self, encoder: Encoder, query: Mitigation, key: Mitigation, temperature: float) -> None:
        super().__init__()
        if query.norm != key.norm:
            raise ValueError(f"{query.name} and {key.name} are different networks: both encoders need the same")
        if query.name == "eman" or (key.name == "eman" and not isinstance(self, MoCo)):
            raise ValueError("eman is of the momentum encoder of MoCo")
        self.query = encoder
        self.query_mitigation, self.key_mitigation = query, key
        self.temperature = temperature

    @property
    def key_has_own_statistics(self) -> bool:
        """Whether the running statistics behind the keys are averages of the batches that they were encoded in."""
        return True

    def encode_queries(self, images: Tensor, index: int) -> Tensor:
        """(N, D) of length 1, in the mode the module is in; ``index``: of the draw, where there is a shuffle."""
        return self.query_mitigation.encode(self.query, images, index)

    @abstractmethod
    def encode_keys(self, images: Tensor, index: int, num_images: int | None = None) -> Tensor:
        """As :meth:`encode_queries`; under ``loader_shuffle`` ``images`` are those that meet on this rank, and
        ``num_images`` is how many are its own (by default as many)."""

    @abstractmethod
    def forward(self, views: Views) -> Contrast:
        """The loss of one training step."""

    def after_step(self) -> None:
        """After the optimizer's step."""

    def weights_loaded(self, parts: Sequence[str]) -> None:
        """After weights were loaded into the submodules ``parts``, and none into the others."""

    @abstractmethod
    def judge(self, queries: Tensor, keys: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and hit (1 where the own key is the most similar) of each query: both (N,).

        Args:
            queries: (N, D); keys: (N, D) their positives, perhaps encoded among others; batch: (N, D), the keys of the
                whole batch as training would encode them.
        """


class SimCLR(ContrastiveMethod):
    """SimCLR: one encoder, both views with gradient, the other images of the batch are the negatives.

    The views are encoded in two forwards, so with "bn" each is normalized by itself.
    Reference: Chen et al. 2020.
    """

    def encode_keys(self, images: Tensor, index: int, num_images: int | None = None) -> Tensor:
        return self.key_mitigation.encode(self.query, images, index, num_images)

    def forward(self, views: Views) -> Contrast:
        index = views.step
        queries, keys = self.encode_queries(views.query, index), self.encode_keys(views.key, index, len(views.query))
        return nt_xent(queries, keys, self.temperature)

    def judge(self, queries: Tensor, keys: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = queries @ torch.cat([batch, queries]).T / self.temperature
        count = len(queries)
        rows = torch.arange(count, device=logits.device)
        logits[rows, rows] = (queries * keys).sum(1) / self.temperature
        logits[rows, rows + count] = float("-inf")  # itself
        return F.cross_entropy(logits, rows, reduction="none"), (logits.argmax(1) == rows).double()


class MoCo(ContrastiveMethod):
    """MoCo v2: keys from a momentum encoder, compared with a queue of earlier keys.

    Order of a step: queries, update of the key encoder, keys, loss; the keys enter the queue after the optimizer's
    step (:meth:`after_step`), since the backward still needs the queue as it was.

    Args:
        queue_size: K. The queue starts with random directions, the same on every rank under one seed of torch.
        momentum: of the key encoder's weights; with ``momentum_end`` it follows half a cosine there over
            ``max_steps`` (Grill et al. 2020, section 3.2).
        teacher_statistics: running statistics of the key encoder: "own" averages of its own batches (MoCo), "copy" of
            the query encoder's, "ema" a moving average of them at the weights' momentum (EMAN, Cai et al. 2021,
            equation 4). Counters are copied by the last two.

    Reference: He et al. 2020, algorithm 1; Chen et al. 2020 (MoCo v2).
    """

    queue: Tensor
    queue_pointer: Tensor

    def __init__(
        self,
        encoder: Encoder,
        query: Mitigation,
        key: Mitigation,
        temperature: float,
        *,
        feature_dim: int,
        queue_size: int,
        momentum: float = 0.999,
        momentum_end: float | None = None,
        max_steps: int = 1,
        teacher_statistics: str = "own",
    ) -> None:
        super().__init__(encoder, query, key, temperature)
        if key.name == "eman" and teacher_statistics == "own":
            raise ValueError('eman never sees a batch: it needs teacher_statistics "ema" or "copy"')
        self.key = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum, self.momentum_end, self.max_steps = momentum, momentum_end, max_steps
        self.teacher_statistics = teacher_statistics
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, feature_dim), dim=1))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))
        self._waiting: Tensor | None = None  # keys of this step
        self._shared = None if self.key_has_own_statistics else SharedStatistics(encoder)
        self.train()  # the key encoder's mode is not always this module's

    @property
    def key_has_own_statistics(self) -> bool:
        return self.teacher_statistics == "own"

    def train(self, mode: bool = True) -> MoCo:
        super().train(mode)
        if not self.key_has_own_statistics:
            self.key.eval()  # it never writes its statistics
        return self

    def encode_keys(self, images: Tensor, index: int, num_images: int | None = None) -> Tensor:
        # An encoder in eval mode, since its statistics are not its own, may still have to share those of a batch.
        measured = self.training and self.key_mitigation.shares and not self.key.training
        with torch.no_grad(), batch_statistics(self.key) if measured else nullcontext():
            return self.key_mitigation.encode(self.key, images, index, num_images)

    def forward(self, views: Views) -> Contrast:
        index = views.step
        if self._shared is not None:
            self._shared.remember()
        queries = self.encode_queries(views.query, index)
        if self._shared is not None:
            self._shared.merge()
        self.update_teacher(self.momentum_at(index))
        keys = self.encode_keys(views.key, index, len(views.query))
        found = queue_info_nce(queries, keys, self.queue, self.temperature)
        self._waiting = found.keys
        return found

    def momentum_at(self, step: int) -> float:
        """The momentum of the key encoder in a step."""
        if self.momentum_end is None:
            return self.momentum
        share = (math.cos(math.pi * min(step / self.max_steps, 1.0)) + 1) / 2
        return self.momentum_end - (self.momentum_end - self.momentum) * share

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the key encoder's weights, and its statistics as ``teacher_statistics`` says, towards the query's."""
        mine, theirs = _pairs(self.key.parameters(), self.query.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        if self.key_has_own_statistics:
            return
        mine, theirs = _pairs(self.key.buffers(), self.query.buffers())
        averaged = [item.is_floating_point() and self.teacher_statistics == "ema" for item in mine]
        for target, source, average in zip(mine, theirs, averaged, strict=True):
            if average:
                target.lerp_(source, 1 - momentum)
            else:
                target.copy_(source)

    @torch.no_grad()
    def weights_loaded(self, parts: Sequence[str]) -> None:
        """Start the key encoder as the query encoder (algorithm 1) in ``parts`` of that, where it was given none."""
        queries, keys = self.query.state_dict(), self.key.state_dict()
        for name, value in keys.items():
            given, mine = (
                any(f"{encoder}.{name}".startswith(f"{part}.") or f"{encoder}.{name}" == part for part in parts)
                for encoder in ("query", "key")
            )
            if given and not mine:
                value.copy_(queries[name])

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the step's keys take the place of the oldest in the queue."""
        if self._waiting is None:
            return
        size = len(self.queue)
        keys = self._waiting[-size:].to(self.queue.dtype)
        rows = (self.queue_pointer + torch.arange(len(keys), device=self.queue.device)) % size
        self.queue[rows] = keys
        self.queue_pointer.add_(len(keys)).remainder_(size)
        self._waiting = None

    def judge(self, queries: Tensor, keys: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = queue_logits(queries, keys, self.queue.to(queries.dtype)) / self.temperature
        positive = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return F.cross_entropy(logits, positive, reduction="none"), (logits.argmax(1) == 0).double()


def _pairs(mine: Any, theirs: Any) -> tuple[list[Tensor], list[Tensor]]:
    one, two = list(mine), list(theirs)
    assert len(one) == len(two), "the encoders differ"
    return one, [item.detach() for item in two]
