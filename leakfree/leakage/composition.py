"""The composition gap: one checkpoint on batches composed in different ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leakfree.distributed import is_distributed
from leakfree.errors import DataError, LeakfreeError
from leakfree.norms import PartitionedBatchNorm, batch_statistics
from leakfree.state import buffers_kept, evaluating, modes_kept

__all__ = ["CompositionGap", "Forward", "Statistics", "composition_gap", "error_rates"]

Forward = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> outputs (N, classes)
Statistics = Literal["stored", "batch", "training"]


@dataclass(frozen=True)
class CompositionGap:
    """Error rates in [0, 1]; None where no batches were given (or they were empty).

    Attributes:
        train: (a) training batches, in training mode.
        random: (b) batches composed at random, normalized with their own statistics.
        population: (c) the same images as (b) under the statistics stored in the model.
        same_class: (d) batches of one class, normalized with their own statistics.
    """

    train: float | None
    random: float | None
    population: float | None
    same_class: float | None

    @property
    def leak(self) -> float | None:
        """(c) - (d): what the model is better by when its batch-mates give the class away. Clearly above 0 is a
        leak; a clean model with batch statistics is far below, since batches of one class mislead it."""
        return _minus(self.population, self.same_class)

    @property
    def inconsistency(self) -> float | None:
        """(c) - (b): between training and inference, at equal composition."""
        return _minus(self.population, self.random)

    @property
    def generalization(self) -> float | None:
        """(b) - (a): between unseen and training images, both with mini-batch statistics."""
        return _minus(self.random, self.train)


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def composition_gap(
    model: nn.Module,
    *,
    random: Iterable[Any],
    same_class: Iterable[Any] | None = None,
    train: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> CompositionGap:
    """Measure the four curves of Wu & Johnson on a classifier, at one point of its training.

    Each batch of ``random`` and ``same_class`` is one normalization batch: every batch norm normalizes it with its
    own statistics, whatever the layer shares in training. The batches of ``train`` are run in training mode, so the
    norms share what they share there. No gradients; modes and buffers are put back.

    Across ranks: every rank calls it with its own share. Numbers of batches may differ and be zero, but not those of
    ``train`` where the model communicates in training. Every rank returns the same numbers.

    Args:
        random: validation batches composed at random: (b) and (c).
        same_class: the same images (or others of their kind) in batches of one class each: (d).
        train: training batches, composed as in training: (a).
        forward: called as ``forward(model, batch)`` for outputs (N, classes). By default the model gets the first
            item of the batch, on its own device. The second item is always the labels, int64 (N,).

    Raises:
        LeakfreeError: a torch batch norm, which mini-batch statistics would pass by.

    Reference: Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 6.
    """
    unstructured = error_rates(model, random, ("batch", "stored"), forward=forward)
    structured = None if same_class is None else error_rates(model, same_class, ("batch",), forward=forward)["batch"]
    training = None if train is None else error_rates(model, train, ("training",), forward=forward)["training"]
    return CompositionGap(training, unstructured["batch"], unstructured["stored"], structured)


def error_rates(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Iterable[Statistics] = ("stored",),
    *,
    forward: Forward | None = None,
) -> dict[Statistics, float | None]:
    """The share of samples whose largest output is not their label, under each kind of statistics.

    Args:
        batches: gone through once; see :func:`composition_gap`.
        statistics: "stored" (eval mode), "batch" (eval mode, but each batch with its own statistics) or "training"
            (training mode; buffers are put back at the end).

    Returns:
        Over all ranks; None where there was no sample.
    """
    run = forward or _default_forward
    kinds = list(statistics)
    if "batch" in kinds:
        _check_norms(model)
    wrong = torch.zeros(len(kinds), dtype=torch.float64)
    seen = 0
    with evaluating(model), buffers_kept(model):
        for batch in batches:
            for place, kind in enumerate(kinds):
                outputs = _outputs(model, batch, kind, run)
                labels = batch[1].to(outputs.device)
                if outputs.ndim != 2 or labels.shape != (len(outputs),):
                    raise DataError(
                        f"composition_gap: outputs must be (N, classes) and labels (N,), got {tuple(outputs.shape)} "
                        f"and {tuple(labels.shape)}"
                    )
                wrong[place] += int((outputs.argmax(1) != labels).sum())
            seen += len(batch[1])
    wrong, total = _over_ranks(wrong, seen, model)
    return {kind: float(count / total) if total else None for kind, count in zip(kinds, wrong, strict=True)}


def _outputs(model: nn.Module, batch: Any, kind: Statistics, forward: Forward) -> Tensor:
    if kind == "stored":
        return forward(model, batch)
    if kind == "batch":
        with batch_statistics(model):
            return forward(model, batch)
    with modes_kept(model):
        model.train()
        return forward(model, batch)


def _default_forward(model: nn.Module, batch: Any) -> Tensor:
    parameter = next(model.parameters())
    return model(batch[0].to(parameter.device))


def _check_norms(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, PartitionedBatchNorm):
            raise LeakfreeError(
                f"{path or 'model'}: a torch {type(module).__name__} cannot be measured under mini-batch statistics; "
                'convert the model first: leakfree.norms.convert_norms(model, "BN")'
            )


def _over_ranks(wrong: Tensor, seen: int, model: nn.Module) -> tuple[Tensor, int]:
    if not is_distributed():
        return wrong, seen
    counts = torch.cat([wrong, torch.tensor([float(seen)], dtype=torch.float64)])
    counts = counts.to(next(model.parameters()).device)
    dist.all_reduce(counts)
    return counts[:-1].cpu(), int(counts[-1])
