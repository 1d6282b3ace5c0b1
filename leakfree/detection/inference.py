"""Running parts of a detector outside training: proposals, sampled RoIs, a training-like forward.

Every function leaves the modes of the model and the global random numbers as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakfree.detection.model import training_targets
from leakfree.state import as_in_training, random_numbers_kept

__all__ = [
    "Detector",
    "Images",
    "Rois",
    "Targets",
    "image_seed",
    "precise_forward",
    "propose",
    "sample_rois",
]

Detector = Any  # torchvision's FasterRCNN, whose parts have no types
Images = list[Tensor]
Targets = list[dict[str, Any]]


def image_seed(seed: int, image_id: int) -> int:
    """Depends on the image alone: the same on any number of ranks."""
    return (seed * 1_000_003 + image_id * 8_191 + 1) % (2**62)


def _inputs(model: Detector, images: Images, targets: Targets) -> tuple[Images, list[dict[str, Tensor]]]:
    """Images and training targets on the model's device, images in its dtype."""
    parameter = next(model.parameters())
    placed = [image.to(parameter.device, parameter.dtype) for image in images]
    wanted = [{key: value.to(parameter.device) for key, value in item.items()} for item in training_targets(targets)]
    return placed, wanted


def propose(model: Detector, images: Images) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """(the resized image list, feature maps, proposals of each image) of a model in eval mode."""
    resized, _ = model.transform(_inputs(model, images, [])[0])
    features = model.backbone(resized.tensors)
    proposals, _ = model.rpn(resized, features)
    return resized, features, proposals


@dataclass
class Rois:
    """RoIs of a batch as the training sampler draws them.

    features: (N, C, 7, 7) as the box head takes them; labels: (N,), 0 is background; rows of an image
    stand together, in the order of the images.
    """

    features: Tensor
    labels: Tensor
    rows_per_image: list[int]


def sample_rois(model: Detector, images: Images, targets: Targets, seed: int) -> Rois:
    """Sample RoIs in training proportions (ground truth boxes among them) from a model in eval mode.

    Each image draws from its own seed, so its RoIs depend on nothing else in the batch.
    """
    placed, wanted = _inputs(model, images, targets)
    resized, resized_targets = model.transform(placed, wanted)
    features = model.backbone(resized.tensors)
    sampled, labels = [], []
    with random_numbers_kept(model, seed):
        model.rpn.training = True  # the attribute alone: proposals in training numbers (its losses draw anchors)
        try:
            proposals, _ = model.rpn(resized, features, resized_targets)
        finally:
            model.rpn.training = False
        for original, boxes, target in zip(targets, proposals, resized_targets, strict=True):
            torch.manual_seed(image_seed(seed, int(original["image_id"])))
            (chosen,), _, (classes,), _ = model.roi_heads.select_training_samples([boxes], [target])
            sampled.append(chosen)
            labels.append(classes)
    pooled = model.roi_heads.box_roi_pool(features, sampled, resized.image_sizes)
    return Rois(pooled, torch.cat(labels), [len(boxes) for boxes in sampled])


@torch.no_grad()
def precise_forward(model: Detector, batch: tuple[Images, Targets]) -> None:
    """A forward as in training (sampled RoIs, training groups) for :func:`leakfree.population.precise_bn`.

    Batch norms stay in the mode ``precise_bn`` chose; everything else runs as in training.
    """
    with as_in_training(model):
        model(*_inputs(model, *batch))
