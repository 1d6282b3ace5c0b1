"""Mask R-CNN on torchvision: chosen norms, heads and RoI shuffling, and its evaluation.

``build_detector`` makes the model of a config; ``evaluate_detector`` gives its AP under every kind of
statistics and the leakage numbers of its RoI heads (all a training room needs to record).
"""

from leakfree.detection.backbones import SmallBackbone, build_backbone
from leakfree.detection.batches import evaluation_batches, training_batches
from leakfree.detection.groups import RoiGroups
from leakfree.detection.inference import precise_forward, sample_rois
from leakfree.detection.measure import (
    average_precision,
    estimate_statistics,
    evaluate_detector,
)
from leakfree.detection.model import (
    build_detector,
    describe_batch,
    has_batch_statistics,
    roi_groups,
    statistics_mode,
    training_targets,
)

__all__ = [
    "RoiGroups",
    "SmallBackbone",
    "average_precision",
    "build_backbone",
    "build_detector",
    "describe_batch",
    "estimate_statistics",
    "evaluate_detector",
    "evaluation_batches",
    "has_batch_statistics",
    "precise_forward",
    "roi_groups",
    "sample_rois",
    "statistics_mode",
    "training_batches",
    "training_targets",
]
