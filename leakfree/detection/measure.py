"""One checkpoint under several statistics: AP and the leakage numbers of a detection run.

The backbone, the proposals and the sampled RoIs are the same for every kind of statistics; only what
the RoI heads normalize with differs. Nothing here changes the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from leakfree.config.schema import DetectionRunConfig
from leakfree.data import CocoInstances
from leakfree.detection.batches import evaluation_batches, training_batches
from leakfree.detection.inference import (
    Detector,
    Images,
    Targets,
    image_seed,
    precise_forward,
    propose,
)
from leakfree.detection.model import has_batch_statistics, statistics_mode
from leakfree.detection.roi_leakage import head_influence, pair_accuracies, roi_accuracies
from leakfree.evaluation import CocoAp
from leakfree.norms import BatchStatBatchNorm
from leakfree.population import precise_bn
from leakfree.records import Evaluation
from leakfree.state import buffers_kept, evaluating, has_running_statistics, load_buffers, random_numbers_kept

__all__ = ["average_precision", "estimate_statistics", "evaluate_detector"]

Track = Callable[[Iterable[Any], str], Iterable[Any]]  # a progress bar: (batches, what) -> batches


def evaluate_detector(
    model: Detector,
    config: DetectionRunConfig,
    datasets: dict[str, CocoInstances],
    *,
    track: Track = lambda batches, what: batches,
) -> Evaluation:
    """AP under each of ``config.evaluation.statistics``, and the leakage numbers of the RoI heads.

    Across ranks: every rank calls it; batches (not images) are dealt to ranks, so AP, accuracies and
    influence do not depend on the number of ranks (but precise statistics come from RoIs that each rank
    draws for itself), and every rank returns the same numbers.

    Args:
        datasets: "train" and "val".
        track: shows progress over batches, on the ranks that should.
    """
    evaluation = Evaluation()
    wanted = list(config.evaluation.statistics)
    can_estimate = has_running_statistics(model.roi_heads)
    stored = [mode for mode in wanted if mode in ("image", "random") and has_batch_statistics(model)]
    if "population" in wanted or ("precise" in wanted and not can_estimate):
        stored.insert(0, "population")
    if not has_batch_statistics(model):
        evaluation.notes.append("image, random: n.a., the RoI heads have no batch statistics")
    if any(isinstance(module, BatchStatBatchNorm) for module in model.roi_heads.modules()):
        evaluation.notes.append("population, precise: BatchStatBN normalizes with the test batch's own statistics")
    _measure(evaluation, model, config, datasets, stored, track)
    if config.leakage.enabled:
        _measure_mixing(evaluation, model, config, datasets, track)
    if "precise" in wanted and can_estimate:
        with _precise_statistics(model, config, datasets["train"]):
            _measure(evaluation, model, config, datasets, ["precise"], track)
    elif "precise" in wanted:
        evaluation.notes.append("precise: no statistics to re-estimate (none, or frozen), so it is population")
        for values in evaluation.leakage.values():
            if "population" in values:
                values["precise"] = values["population"]
        evaluation.results["precise"] = dict(evaluation.results["population"])
    evaluation.results = {mode: evaluation.results.get(mode, {}) for mode in wanted}
    return evaluation


def _measure(
    evaluation: Evaluation,
    model: Detector,
    config: DetectionRunConfig,
    datasets: dict[str, CocoInstances],
    modes: list[str],
    track: Track,
) -> None:
    """Add AP and RoI accuracies under ``modes``."""
    names, seed = ", ".join(modes), config.leakage.seed
    batches = track(
        evaluation_batches(config, datasets["val"], config.evaluation.max_images), f"AP under {names} statistics"
    )
    evaluation.results |= average_precision(model, batches, modes, seed)
    for split in ("train", "val") if config.leakage.enabled else ():
        loader = evaluation_batches(config, datasets[split], config.leakage.max_images)
        batches = track(loader, f"RoI accuracy on {split} under {names} statistics")
        evaluation.leakage.setdefault(f"roi_accuracy/{split}", {}).update(roi_accuracies(model, batches, modes, seed))


def _measure_mixing(
    evaluation: Evaluation,
    model: Detector,
    config: DetectionRunConfig,
    datasets: dict[str, CocoInstances],
    track: Track,
) -> None:
    """Add what needs no population statistics: influence, and same-class against random pairs."""
    leakage = config.leakage
    batches = track(
        training_batches(config, datasets["train"], max_steps=leakage.influence_batches, stream=1), "influence"
    )
    evaluation.leakage["influence"] = head_influence(model, batches, leakage.influence_probes, leakage.seed)
    batches = track(evaluation_batches(config, datasets["val"], leakage.max_images), "same-class and random pairs")
    evaluation.leakage["pairs"] = pair_accuracies(model, batches, leakage.seed)


def average_precision(
    model: Detector, batches: Iterable[tuple[Images, Targets]], modes: list[str], seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """COCO box and mask AP on this rank's ``batches`` and all other ranks', under each kind of statistics."""
    metrics = {mode: CocoAp(with_masks=model.roi_heads.has_mask()) for mode in modes}
    with evaluating(model):
        for images, targets in batches:
            sizes = [tuple(image.shape[-2:]) for image in images]
            resized, features, proposals = propose(model, images)
            for mode, metric in metrics.items():
                with statistics_mode(model, mode, seed=image_seed(seed, int(targets[0]["image_id"]))):
                    detections, _ = model.roi_heads(
                        features, [boxes.clone() for boxes in proposals], resized.image_sizes
                    )
                detections = model.transform.postprocess(detections, resized.image_sizes, sizes)
                metric.update([{key: value.cpu() for key, value in item.items()} for item in detections], targets)
    return {mode: metric.compute() for mode, metric in metrics.items()}


def estimate_statistics(model: Detector, config: DetectionRunConfig, dataset: CocoInstances) -> None:
    """Fill the batch norm buffers with precise population statistics of ``evaluation.precise_images`` training images.

    The batches are drawn and grouped as in training, but are not those that training saw. Every rank calls it.
    """
    num_batches = math.ceil(config.evaluation.precise_images / config.trainer.total_batch_size)
    batches = training_batches(config, dataset, max_steps=num_batches, stream=1)
    with random_numbers_kept(model, config.seed):
        precise_bn(model, batches, forward=precise_forward, progress=False)


@contextmanager
def _precise_statistics(model: Detector, config: DetectionRunConfig, dataset: CocoInstances) -> Iterator[None]:
    """Inside, the batch norms of the RoI heads hold precise population statistics; afterwards what they held before.

    Those of the backbone are left alone: proposals and RoI features are the same under all statistics.
    """
    with buffers_kept(model):
        outside = {name: buffer.clone() for name, buffer in model.named_buffers() if not name.startswith("roi_heads.")}
        estimate_statistics(model, config, dataset)
        load_buffers(model, outside)
        yield
