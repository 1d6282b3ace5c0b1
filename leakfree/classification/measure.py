"""One checkpoint under several statistics: accuracy, the composition gap and influence of a classifier.

Weights and images are the same for every kind of statistics. Nothing here changes the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.classification.adaptation import has_unknown_domains, mixture_accuracy, target_accuracy
from leakfree.classification.batches import composed_batches, training_batches
from leakfree.classification.model import classify
from leakfree.config.schema import ClassificationRunConfig
from leakfree.data import LabelledImages
from leakfree.leakage import CompositionGap, composition_gap, cross_sample_influence, error_rates
from leakfree.norms import BatchStatBatchNorm, PartitionedBatchNorm, domain
from leakfree.population import precise_bn
from leakfree.records import Evaluation
from leakfree.state import as_in_training, buffers_kept, has_running_statistics, modes_kept, random_numbers_kept

__all__ = ["estimate_statistics", "evaluate_classifier", "validation_accuracies"]

Track = Callable[[Iterable[Any], str], Iterable[Any]]  # a progress bar: (batches, what) -> batches
Batch = tuple[Tensor, Tensor, Tensor]


def evaluate_classifier(
    model: nn.Module,
    config: ClassificationRunConfig,
    images: dict[str, LabelledImages],
    *,
    track: Track = lambda batches, what: batches,
) -> Evaluation:
    """Accuracy under each of ``config.evaluation.statistics``, the composition gap, and influence.

    Under "random" and "same_class" a batch of ``evaluation.images_per_batch`` images, at random or of one class, is
    normalized with its own statistics. The gap's (c) is of precise population statistics where there are any.
    Across ranks: every rank calls it; batches are dealt to ranks, so the numbers do not depend on how many there are
    (but (a) and influence may, as training does), and every rank returns the same.
    A DomainBN that does not know a corruption of the validation images has neither (b), (c) nor (d) there.

    Args:
        images: "train" and "val".
        track: shows progress over batches, on the ranks that should.
    """
    evaluation = Evaluation(notes=_notes(model))
    wanted, measures = config.evaluation.statistics, config.leakage.enabled
    precise = has_running_statistics(model)
    known = not has_unknown_domains(model, images["val"])
    found: dict[str, float | None] = dict.fromkeys(wanted)
    if known and ("population" in wanted or not precise):
        batches = track(_composed(config, images, "random"), "accuracy under population statistics")
        found["population"] = _accuracy(error_rates(model, batches, forward=classify)["stored"])
    with _precise_statistics(model, config, images["train"], precise and ("precise" in wanted or measures)):
        if known and (measures or {"precise", "random", "same_class"} & set(wanted)):
            gap = _gap(model, config, images, track, with_training=measures)
            found |= {"random": _accuracy(gap.random), "same_class": _accuracy(gap.same_class)}
            found["precise"] = _accuracy(gap.population)
            if measures:
                evaluation.leakage["composition"] = {**asdict(gap), "leak": gap.leak}
    if measures:
        evaluation.leakage["influence"] = _influence(model, config, images["train"], track)
    if "target" in wanted and known and precise:
        found["target"] = target_accuracy(model, config, images["val"], track)
    if "embeddings" in wanted:
        found["embeddings"] = mixture_accuracy(model, config, images["val"], track)
    for kind in ("precise", "target"):
        if kind in wanted and known and not precise:
            evaluation.notes.append(f"{kind}: no statistics to re-estimate (none, or frozen), so it is population")
            found[kind] = found["population"]
    if not known:
        evaluation.notes.append("composition: n.a., DomainBN does not know a corruption of the validation images")
    if not _has_batch_statistics(model):
        found |= {"random": None, "same_class": None}
    evaluation.results = {mode: {} if found[mode] is None else {"accuracy": found[mode]} for mode in wanted}
    return evaluation


def validation_accuracies(
    model: nn.Module,
    config: ClassificationRunConfig,
    images: dict[str, LabelledImages],
    *,
    track: Track = lambda batches, what: batches,
) -> dict[str, float | None]:
    """The curves (b), (c) and (d) at one point of training, as accuracies; (c) under the stored statistics.

    The curve (a) is the training accuracy, which every step gives. Where a DomainBN does not know a corruption of the
    validation images, the one curve is that of BN embeddings.
    """
    if has_unknown_domains(model, images["val"]):
        return {"val_accuracy/embeddings": mixture_accuracy(model, config, images["val"], track)}
    gap = _gap(model, config, images, track, with_training=False)
    errors = {"population": gap.population, "random": gap.random, "same_class": gap.same_class}
    return {f"val_accuracy/{name}": _accuracy(error) for name, error in errors.items()}


def estimate_statistics(model: nn.Module, config: ClassificationRunConfig, images: LabelledImages) -> None:
    """Fill the batch norm buffers with precise population statistics of ``evaluation.precise_images`` training images.

    The batches are drawn and composed as in training, but are not those that training saw. Every rank calls it.
    """
    with random_numbers_kept(model, config.seed):
        precise_bn(model, _extra_batches(config, images), forward=_precise_forward, progress=False)


@torch.no_grad()
def _precise_forward(model: nn.Module, batch: Batch) -> None:
    with as_in_training(model):
        classify(model, batch)


@contextmanager
def _precise_statistics(
    model: nn.Module, config: ClassificationRunConfig, images: LabelledImages, wanted: bool
) -> Iterator[None]:
    """Inside, the batch norms hold precise population statistics if ``wanted``; afterwards what they held before."""
    with buffers_kept(model):
        if wanted:
            estimate_statistics(model, config, images)
        yield


def _extra_batches(config: ClassificationRunConfig, images: LabelledImages) -> Iterable[Batch]:
    num_batches = math.ceil(config.evaluation.precise_images / config.trainer.total_batch_size)
    return training_batches(config, images, max_steps=num_batches, stream=1)


def _composed(config: ClassificationRunConfig, images: dict[str, LabelledImages], composition: Any) -> Iterable[Batch]:
    return composed_batches(config, images["val"], composition, config.evaluation.max_images)


def _gap(
    model: nn.Module,
    config: ClassificationRunConfig,
    images: dict[str, LabelledImages],
    track: Track,
    *,
    with_training: bool,
) -> CompositionGap:
    with random_numbers_kept(model, config.leakage.seed):
        train = track(_extra_batches(config, images["train"]), "training batches") if with_training else None
        return composition_gap(
            model,
            random=track(_composed(config, images, "random"), "random batches"),
            same_class=track(_composed(config, images, "same_class"), "batches of one class"),
            train=train,
            forward=classify,
        )


def _influence(
    model: nn.Module, config: ClassificationRunConfig, images: LabelledImages, track: Track
) -> dict[str, float | None]:
    """Cross-sample influence in training mode: on images of the same class, and of others."""
    leakage, parameter = config.leakage, next(model.parameters())
    shares = []
    batches = training_batches(config, images, max_steps=leakage.influence_batches, stream=1)
    with modes_kept(model), random_numbers_kept(model, leakage.seed):
        model.train()
        for batch in track(batches, "influence"):
            with domain(batch[2]):
                result = cross_sample_influence(
                    model,
                    batch[0].to(parameter.device, parameter.dtype),
                    num_probes=leakage.influence_probes,
                    groups=batch[1],
                    seed=leakage.seed,
                )
            shares.append((result.within, result.between, result.total))
    within, between, total = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return {"within_class": within, "between_classes": between, "total": total}


def _has_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(module, PartitionedBatchNorm) for module in model.modules())


def _notes(model: nn.Module) -> list[str]:
    notes = []
    if not _has_batch_statistics(model):
        notes.append("random, same_class: n.a., the model has no batch statistics")
    if any(isinstance(module, BatchStatBatchNorm) for module in model.modules()):
        notes.append("population, precise: BatchStatBN normalizes with the test batch's own statistics")
    return notes


def _accuracy(error: float | None) -> float | None:
    return None if error is None else 1 - error
