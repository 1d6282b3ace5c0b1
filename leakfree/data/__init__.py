"""Data sets and batches: any COCO instances, and the embedded DigitScenes."""

from leakfree.data.coco import CocoInstances
from leakfree.data.digit_scenes import IMAGE_MEAN, IMAGE_STD, digit_scenes_path, write_digit_scenes
from leakfree.data.images import read_image
from leakfree.data.loaders import InstanceLoader, build_dataset, build_eval_loader, build_train_loader
from leakfree.data.masks import decode_masks, encode_mask, mask_polygons, segmentation_to_rle
from leakfree.data.problems import Problem, Problems
from leakfree.data.samplers import EvaluationBatchSampler, TrainingBatchSampler
from leakfree.data.transforms import DetectionTransform, sample_generator

__all__ = [
    "CocoInstances",
    "DetectionTransform",
    "EvaluationBatchSampler",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "InstanceLoader",
    "Problem",
    "Problems",
    "TrainingBatchSampler",
    "build_dataset",
    "build_eval_loader",
    "build_train_loader",
    "decode_masks",
    "digit_scenes_path",
    "encode_mask",
    "mask_polygons",
    "read_image",
    "sample_generator",
    "segmentation_to_rle",
    "write_digit_scenes",
]
