"""Leakage of the RoI heads: classification under each kind of statistics, class pairs, influence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from leakfree.detection.inference import Detector, Images, Targets, image_seed, sample_rois
from leakfree.detection.model import has_batch_statistics, statistics_mode
from leakfree.distributed import get_rank, is_distributed
from leakfree.leakage import cross_sample_influence
from leakfree.state import evaluating, modes_kept

__all__ = ["head_influence", "pair_accuracies", "roi_accuracies"]

Batches = Iterable[tuple[Images, Targets]]
_Image = tuple[Tensor, Tensor]


def _hits(model: Detector, features: Tensor, labels: Tensor) -> Tensor:
    """(right, foreground) of the 1 + classes way classification of foreground RoIs."""
    logits, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(features))
    foreground = labels > 0
    right = (logits.argmax(1) == labels) & foreground
    return torch.stack([right.sum(), foreground.sum()]).double().cpu()


def _ratio(count: Tensor, model: Detector) -> float | None:
    """right / foreground over all ranks; None without foreground."""
    if is_distributed():
        count = count.to(next(model.parameters()).device)
        dist.all_reduce(count)
    return float(count[0] / count[1]) if count[1] else None


def roi_accuracies(model: Detector, batches: Batches, modes: Iterable[str], seed: int) -> dict[str, float | None]:
    """Share of foreground RoIs classified right, on the same RoIs under each kind of statistics.

    Args:
        batches: of this rank; the images of a batch are those that meet in random groups.
        modes: see :func:`leakfree.detection.statistics_mode`.
        seed: of the RoIs and of the random groups.
    """
    counts = {mode: torch.zeros(2, dtype=torch.float64) for mode in modes}
    with evaluating(model):
        for images, targets in batches:
            rois = sample_rois(model, images, targets, seed)
            for mode in counts:
                with statistics_mode(model, mode, seed=image_seed(seed, int(targets[0]["image_id"]))):
                    counts[mode] += _hits(model, rois.features, rois.labels)
    return {mode: _ratio(count, model) for mode, count in counts.items()}


def pair_accuracies(model: Detector, batches: Batches, seed: int) -> dict[str, float | None]:
    """RoI accuracy when two images share statistics: two of the same class, or two at random.

    Both numbers are of the same images in groups of the same size, so their difference is what the
    companion's class tells: images are paired by class (their most frequent one) as they come, and the
    images of two such pairs are then paired crosswise. Images without partners are left out; each rank
    pairs its own.
    """
    if not has_batch_statistics(model):
        return {"same_class": None, "random_pair": None}
    counts = {"same_class": torch.zeros(2, dtype=torch.float64), "random_pair": torch.zeros(2, dtype=torch.float64)}
    single: dict[int, _Image] = {}
    pair: tuple[_Image, _Image] | None = None
    with evaluating(model), statistics_mode(model, "all"):
        for image, class_ in _images(model, batches, seed):
            if class_ not in single:
                single[class_] = image
                continue
            a, b = single.pop(class_), image
            if pair is None:
                pair = (a, b)
                continue
            for kind, pairs in (("same_class", ((a, b), pair)), ("random_pair", ((a, pair[0]), (b, pair[1])))):
                for left, right in pairs:
                    counts[kind] += _hits(model, torch.cat([left[0], right[0]]), torch.cat([left[1], right[1]]))
            pair = None
    return {kind: _ratio(count, model) for kind, count in counts.items()}


def _images(model: Detector, batches: Batches, seed: int) -> Iterator[tuple[_Image, int]]:
    """The RoIs (features, labels) of each image that has objects, and its most frequent class."""
    for images, targets in batches:
        rois = sample_rois(model, images, targets, seed)
        rows = zip(rois.features.split(rois.rows_per_image), rois.labels.split(rois.rows_per_image), strict=True)
        for image, target in zip(rows, targets, strict=True):
            if len(target["labels"]):
                yield image, int(target["labels"].mode().values)


def head_influence(model: Detector, batches: Batches, num_probes: int, seed: int) -> dict[str, float | None]:
    """Cross-sample influence of the box head in training mode: on RoIs of the same image, and of others.

    Args:
        batches: as in training, the same number and size on every rank (the head may synchronize).
    """
    shares = []
    for images, targets in batches:
        with evaluating(model):
            rois = sample_rois(model, images, targets, seed)
        owners = torch.arange(len(images)) + get_rank() * len(images)
        with modes_kept(model.roi_heads.box_head):
            result = cross_sample_influence(
                model.roi_heads.box_head.train(),
                rois.features,
                num_probes=num_probes,
                groups=torch.repeat_interleave(owners, torch.tensor(rois.rows_per_image)),
                seed=seed,
            )
        shares.append((result.within, result.between, result.total))
    within, between, total = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return {"within_image": within, "between_images": between, "total": total}
