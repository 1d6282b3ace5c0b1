"""Data sets and batches: any COCO instances, labelled images, and what is embedded: digits, and scenes of digits."""

from leakfree.data.coco import CocoInstances
from leakfree.data.digit_scenes import IMAGE_MEAN, IMAGE_STD, digit_scenes_path, write_digit_scenes
from leakfree.data.images import read_image
from leakfree.data.labelled import (
    CORRUPTIONS,
    LabelledImages,
    LabelledLoader,
    build_image_loader,
    build_images,
    compose_batches,
    images_path,
    training_sampler,
)
from leakfree.data.loaders import InstanceLoader, build_dataset, build_eval_loader, build_train_loader, coco_paths
from leakfree.data.masks import decode_masks, encode_mask, mask_polygons, segmentation_to_rle
from leakfree.data.problems import Problem, Problems
from leakfree.data.samplers import EvaluationBatchSampler, SameClassBatchSampler, TrainingBatchSampler
from leakfree.data.transforms import DetectionTransform, sample_generator
from leakfree.data.workers import Loader

__all__ = [
    "CORRUPTIONS",
    "CocoInstances",
    "DetectionTransform",
    "EvaluationBatchSampler",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "InstanceLoader",
    "LabelledImages",
    "LabelledLoader",
    "Loader",
    "Problem",
    "Problems",
    "SameClassBatchSampler",
    "TrainingBatchSampler",
    "build_dataset",
    "build_eval_loader",
    "build_image_loader",
    "build_images",
    "build_train_loader",
    "coco_paths",
    "compose_batches",
    "decode_masks",
    "digit_scenes_path",
    "encode_mask",
    "images_path",
    "mask_polygons",
    "read_image",
    "sample_generator",
    "segmentation_to_rle",
    "training_sampler",
    "write_digit_scenes",
]
