"""One checkpoint under several statistics: AP, RoI accuracy, same-class pairs, influence.

The backbone, the proposals and the sampled RoIs are the same for every kind of statistics; only what
the RoI heads normalize with differs. Nothing here changes the model: modes, buffers and random state
are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leakfree.config.schema import DetectionRunConfig
from leakfree.data import CocoInstances, build_eval_loader, build_train_loader
from leakfree.detection.model import has_batch_statistics, roi_groups, statistics_mode, training_targets
from leakfree.distributed import get_rank, get_world_size, is_distributed
from leakfree.evaluation import CocoAp
from leakfree.leakage import cross_sample_influence
from leakfree.population import precise_bn

__all__ = ["DetectorEvaluation", "average_precision", "evaluate_detector", "precise_forward"]

Detector = Any  # torchvision's FasterRCNN, whose parts have no types
Images = list[Tensor]
Targets = list[dict[str, Any]]
Track = Callable[[Iterable[Any], str], Iterable[Any]]  # a progress bar: (batches, what) -> batches
_PRECISE_SEED = 2**31 - 1  # the training stream, but not the batches that training saw


@dataclass
class DetectorEvaluation:
    """What ``record.json`` holds of an evaluation; see :class:`leakfree.records.RunRecord`."""

    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    leakage: dict[str, dict[str, float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_detector(
    model: Detector,
    config: DetectionRunConfig,
    datasets: dict[str, CocoInstances],
    *,
    track: Track = lambda batches, what: batches,
) -> DetectorEvaluation:
    """AP under each of ``config.evaluation.statistics``, and the leakage numbers of the RoI heads.

    Across ranks: every rank calls it; batches (not images) are dealt to ranks, so results do not
    depend on the number of ranks, and every rank returns the same numbers.

    Args:
        datasets: "train" and "val".
        track: shows progress over batches, on the ranks that should.
    """
    evaluation = DetectorEvaluation()
    modes = list(config.evaluation.statistics)
    if not has_batch_statistics(model):
        dropped = [mode for mode in modes if mode in ("image", "random", "precise")]
        modes = [mode for mode in modes if mode not in dropped]
        if dropped:
            evaluation.notes.append(
                f"{', '.join(dropped)}: n.a., the RoI heads have no batch statistics: population is their one answer"
            )
        evaluation.results = {mode: {} for mode in dropped}
    stored = [mode for mode in modes if mode != "precise"]
    measured = config.leakage.enabled
    val = build_eval_loader(
        datasets["val"],
        config.data,
        images_per_batch=config.evaluation.images_per_batch,
        rank=get_rank(),
        world_size=get_world_size(),
        max_images=config.evaluation.max_images,
    )
    evaluation.results |= average_precision(model, val, stored, config.leakage.seed, track)
    accuracy = _roi_accuracies(model, config, datasets, stored, track) if measured else {}
    if measured:
        evaluation.leakage["influence"] = _influence(model, config, datasets["train"], track)
        evaluation.leakage["pairs"] = _pairs(model, config, datasets["val"], track)
    if "precise" in modes:
        with _precise_statistics(model, config, datasets["train"]):
            evaluation.results |= average_precision(model, val, ["precise"], config.leakage.seed, track)
            for split, values in (
                _roi_accuracies(model, config, datasets, ["precise"], track) if measured else {}
            ).items():
                accuracy[split] |= values
    evaluation.leakage |= accuracy
    evaluation.results = {mode: evaluation.results[mode] for mode in config.evaluation.statistics}
    return evaluation


# --------------------------------------------------------------------------------------------- AP


def average_precision(
    model: Detector,
    loader: Iterable[tuple[Images, Targets]],
    modes: list[str],
    seed: int = 0,
    track: Track = lambda batches, what: batches,
) -> dict[str, dict[str, float | None]]:
    """COCO box and mask AP of ``model`` on ``loader`` under each kind of statistics."""
    with_masks = model.roi_heads.has_mask()
    metrics = {mode: CocoAp(with_masks=with_masks) for mode in modes}
    with _evaluating(model):
        for images, targets in track(loader, f"AP under {', '.join(modes)} statistics"):
            sizes = [tuple(image.shape[-2:]) for image in images]
            resized, features, proposals = _proposals(model, _to_model(images, model))
            for mode, metric in metrics.items():
                with statistics_mode(model, mode, seed=_image_seed(seed, int(targets[0]["image_id"]))):
                    detections, _ = model.roi_heads(features, [p.clone() for p in proposals], resized.image_sizes)
                detections = model.transform.postprocess(detections, resized.image_sizes, sizes)
                metric.update([{key: value.cpu() for key, value in item.items()} for item in detections], targets)
    return {mode: metric.compute() for mode, metric in metrics.items()}


def _proposals(
    model: Detector, images: Images, targets: Targets | None = None
) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    resized, targets = model.transform(images, targets)
    features = model.backbone(resized.tensors)
    proposals, _ = model.rpn(resized, features, targets)
    return resized, features, proposals


# ------------------------------------------------------------------------------------ RoI accuracy


@dataclass
class _Rois:
    """RoIs of a batch as the training sampler draws them: features (N, C, 7, 7), labels (N,)."""

    features: Tensor
    labels: Tensor
    rows_per_image: list[int]


def _sample_rois(model: Detector, images: Images, targets: Targets, seed: int) -> _Rois:
    """Each image draws from its own seed, so its RoIs depend on nothing else in the batch."""
    ids = [int(target["image_id"]) for target in targets]
    images = _to_model(images, model)
    wanted = [_to_device(target, images[0].device) for target in training_targets(targets)]
    heads, rpn = model.roi_heads, model.rpn
    resized, resized_targets = model.transform(images, wanted)
    features = model.backbone(resized.tensors)
    sampled, labels = [], []
    with torch.random.fork_rng(devices=_devices(images[0])):
        rpn.training = True  # the attribute alone: proposals in training numbers (its losses draw anchors)
        try:
            proposals, _ = rpn(resized, features, resized_targets)
        finally:
            rpn.training = False
        for image_id, boxes, target in zip(ids, proposals, resized_targets, strict=True):
            torch.manual_seed(_image_seed(seed, image_id))
            (chosen,), _, (classes,), _ = heads.select_training_samples([boxes], [target])
            sampled.append(chosen)
            labels.append(classes)
    pooled = heads.box_roi_pool(features, sampled, resized.image_sizes)
    return _Rois(pooled, torch.cat(labels), [len(boxes) for boxes in sampled])


def _hits(model: Detector, features: Tensor, labels: Tensor) -> Tensor:
    """(right, foreground) of the 1 + classes way classification of foreground RoIs."""
    logits, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(features))
    foreground = labels > 0
    right = (logits.argmax(1) == labels) & foreground
    return torch.stack([right.sum(), foreground.sum()]).double().cpu()


def _roi_accuracies(
    model: Detector, config: DetectionRunConfig, datasets: dict[str, CocoInstances], modes: list[str], track: Track
) -> dict[str, dict[str, float | None]]:
    accuracies: dict[str, dict[str, float | None]] = {}
    for split in ("train", "val"):
        counts = {mode: torch.zeros(2, dtype=torch.float64) for mode in modes}
        with _evaluating(model):
            loader = _leakage_loader(config, datasets[split])
            for images, targets in track(loader, f"RoI accuracy on {split} under {', '.join(modes)} statistics"):
                rois = _sample_rois(model, images, targets, config.leakage.seed)
                for mode in modes:
                    draw = _image_seed(config.leakage.seed, int(targets[0]["image_id"]))
                    with statistics_mode(model, mode, seed=draw):
                        counts[mode] += _hits(model, rois.features, rois.labels)
        accuracies[f"roi_accuracy/{split}"] = {mode: _ratio(_summed(count, model)) for mode, count in counts.items()}
    return accuracies


def _pairs(
    model: Detector, config: DetectionRunConfig, dataset: CocoInstances, track: Track
) -> dict[str, float | None]:
    """RoI accuracy when two images share statistics: two of the same class, or any two.

    Both use the same images and group sizes, so the difference is what the class of the companion
    tells. The class of an image is its most frequent one. Images without a partner are left out of
    the same-class number.
    """
    if not has_batch_statistics(model):
        return {"same_class": None, "random_pair": None}
    counts = {"same_class": torch.zeros(2, dtype=torch.float64), "random_pair": torch.zeros(2, dtype=torch.float64)}
    waiting: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    groups = roi_groups(model)[0]
    with _evaluating(model), statistics_mode(model, "all"):
        for images, targets in track(_leakage_loader(config, dataset), "same-class and random pairs"):
            rois = _sample_rois(model, images, targets, config.leakage.seed)
            rows = zip(rois.features.split(rois.rows_per_image), rois.labels.split(rois.rows_per_image), strict=True)
            for (features, labels), target in zip(rows, targets, strict=True):
                if not len(target["labels"]):
                    continue
                for kind, slot in (("same_class", int(target["labels"].mode().values)), ("random_pair", 0)):
                    partner = waiting.pop((kind, slot), None)
                    if partner is None:
                        waiting[kind, slot] = (features, labels)
                        continue
                    groups.rows_per_image = [len(partner[1]), len(labels)]
                    counts[kind] += _hits(model, torch.cat([partner[0], features]), torch.cat([partner[1], labels]))
    return {kind: _ratio(_summed(count, model)) for kind, count in counts.items()}


# --------------------------------------------------------------------------------------- influence


def _influence(
    model: Detector, config: DetectionRunConfig, dataset: CocoInstances, track: Track
) -> dict[str, float | None]:
    """Cross-sample influence of the box head in training mode: on RoIs of the same image, and of others."""
    images_per_rank = config.trainer.total_batch_size // get_world_size()
    shares = []
    for images, targets in track(_training_batches(config, dataset, config.leakage.influence_batches), "influence"):
        with _evaluating(model):
            rois = _sample_rois(model, images, targets, config.leakage.seed)
        owners = torch.arange(len(images)) + get_rank() * images_per_rank
        with _head_training(model.roi_heads.box_head):
            result = cross_sample_influence(
                model.roi_heads.box_head,
                rois.features,
                num_probes=config.leakage.influence_probes,
                groups=torch.repeat_interleave(owners, torch.tensor(rois.rows_per_image)),
                seed=config.leakage.seed,
            )
        shares.append((result.within, result.between, result.total))
    within, between, total = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return {"within_image": within, "between_images": between, "total": total}


@contextmanager
def _head_training(head: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in head.modules()}
    try:
        head.train()
        yield
    finally:
        for module, training in before.items():
            module.training = training


# ------------------------------------------------------------------------------ precise statistics


@torch.no_grad()
def precise_forward(model: Detector, batch: tuple[Images, Targets]) -> None:
    """A forward as in training (sampled RoIs, training groups) for :func:`leakfree.population.precise_bn`.

    Norm layers stay in the mode ``precise_bn`` chose; everything else runs as in training.
    """
    images, targets = batch
    before = {
        module: module.training for module in model.modules() if not isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    try:
        for module in before:
            module.training = True
        images = _to_model(images, model)
        wanted = [
            {key: value.to(images[0].device) for key, value in target.items()} for target in training_targets(targets)
        ]
        model(images, wanted)
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _precise_statistics(model: Detector, config: DetectionRunConfig, dataset: CocoInstances) -> Iterator[None]:
    """Inside, batch norm buffers hold precise population statistics of training batches."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    num_batches = math.ceil(config.evaluation.precise_images / config.trainer.total_batch_size)
    try:
        with torch.random.fork_rng(devices=_devices(next(model.parameters()))):
            torch.manual_seed(config.seed)
            precise_bn(model, _training_batches(config, dataset, num_batches), forward=precise_forward, progress=False)
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


# ---------------------------------------------------------------------------------------- plumbing


def _training_batches(config: DetectionRunConfig, dataset: CocoInstances, num_batches: int) -> Iterable[Any]:
    """Batches drawn as in training, the same number on every rank (heads may synchronize)."""
    world_size = get_world_size()
    return build_train_loader(
        dataset,
        config.data,
        images_per_rank=config.trainer.total_batch_size // world_size,
        rank=get_rank(),
        world_size=world_size,
        seed=config.seed + _PRECISE_SEED,
        start_step=0,
        max_steps=num_batches,
    )


def _leakage_loader(config: DetectionRunConfig, dataset: CocoInstances) -> Iterable[Any]:
    return build_eval_loader(
        dataset,
        config.data,
        images_per_batch=config.evaluation.images_per_batch,
        rank=get_rank(),
        world_size=get_world_size(),
        max_images=config.leakage.max_images,
    )


@contextmanager
def _evaluating(model: Detector) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode is put back."""
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training


def _to_model(images: Images, model: Detector) -> Images:
    parameter = next(model.parameters())
    return [image.to(parameter.device, parameter.dtype) for image in images]


def _devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.is_cuda else []


def _image_seed(seed: int, image_id: int) -> int:
    """Depends on the image alone: the same on any number of ranks."""
    return (seed * 1_000_003 + image_id * 8_191 + 1) % (2**62)


def _to_device(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in target.items()}


def _summed(count: Tensor, model: Detector) -> Tensor:
    if not is_distributed():
        return count
    total = count.to(next(model.parameters()).device)
    dist.all_reduce(total)
    return total.cpu()


def _ratio(count: Tensor) -> float | None:
    return float(count[0] / count[1]) if count[1] else None
