"""From the ``data`` section of a config to batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_dtype

from leakfree.config.schema import DetectionDataConfig
from leakfree.data.coco import CocoInstances, Sample
from leakfree.data.digit_scenes import digit_scenes_path, write_digit_scenes
from leakfree.data.problems import Problem
from leakfree.data.samplers import EvaluationBatchSampler, TrainingBatchSampler
from leakfree.data.transforms import DetectionTransform, sample_generator
from leakfree.data.workers import Loader
from leakfree.errors import DataError, choices

__all__ = ["InstanceLoader", "build_dataset", "build_eval_loader", "build_train_loader", "coco_paths"]

NAMES = ("coco", "digit_scenes")


def build_dataset(config: DetectionDataConfig, split: Literal["train", "val"], *, masks: bool = True) -> CocoInstances:
    """Open one split; digit scenes are written first where they are not there yet.

    Training leaves out images without objects unless ``keep_empty``; validation keeps them, since a detection
    there is a false positive. Every rank may call it at once.

    Args:
        config: ``data`` of the run; relative paths start at ``root``.
        split: "train" or "val".
        masks: false for a model without a mask head: segmentations are not needed.

    Raises:
        DataError: a folder or file that is missing, a faulty data set, or no image left.
        ConfigError: digit scenes that cannot be composed.
    """
    part = getattr(config, split)
    if part.name not in NAMES:
        raise DataError(f"data.{split}.name is {part.name!r}; valid: {choices(str(part.name), NAMES)}")
    if part.name == "digit_scenes":
        folder = write_digit_scenes(digit_scenes_path(config.root, part.digits, split), part.digits, split)
        images, annotations = folder / "images", folder / "instances.json"
    else:
        images, annotations = coco_paths(config, split)
    dataset = CocoInstances(
        images, annotations, on_error=config.on_error, masks=masks, keep_empty=split == "val" or config.keep_empty
    )
    if not len(dataset):
        wanted = "image" if split == "val" or config.keep_empty else "image with an object (see data.keep_empty)"
        raise DataError(f"data.{split}: {annotations} leaves no {wanted}; {dataset.problems}")
    return dataset


def coco_paths(config: DetectionDataConfig, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """The folder of the images and the instances JSON of a split on disk; nothing in them is read.

    Raises:
        DataError: one is not named, or not there.
    """
    part = getattr(config, split)
    images = _path(config, part.images, f"data.{split}.images", "the folder of the images")
    annotations = _path(config, part.annotations, f"data.{split}.annotations", "the instances JSON")
    _require(images.is_dir(), images, f"data.{split}.images", "folder")
    _require(annotations.is_file(), annotations, f"data.{split}.annotations", "file")
    return images, annotations


def build_train_loader(
    dataset: CocoInstances,
    config: DetectionDataConfig,
    *,
    images_per_rank: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    max_steps: int,
) -> InstanceLoader:
    """Return the training batches of one rank, from ``start_step`` on.

    A batch is a function of (seed, step) and the total batch size: the same for any number of ranks and of loader
    processes, and after a resume. ``len`` is ``max_steps``. Under ``on_error="skip"`` the next readable image stands
    in for one that is not, so that every rank always has its full batch.
    """
    transform = DetectionTransform(config.min_size, config.max_size, config.flip, train=True)
    sampler = TrainingBatchSampler(len(dataset), images_per_rank, rank, world_size, seed, start_step, max_steps)
    return _loader(_Samples(dataset, transform, seed), sampler, config.num_workers)


def build_eval_loader(
    dataset: CocoInstances,
    config: DetectionDataConfig,
    *,
    images_per_batch: int,
    rank: int = 0,
    world_size: int = 1,
    max_images: int = 0,
) -> InstanceLoader:
    """Return the evaluation batches of one rank, of the first ``max_images`` images (0 = all).

    Consecutive images, nothing padded or repeated over ranks. Images and targets are as in the files: the detector
    resizes by itself and maps its results back, so that AP is exact in the pixels of the annotations.
    """
    num_images = min(max_images or len(dataset), len(dataset))
    sampler = EvaluationBatchSampler(num_images, images_per_batch, rank, world_size)
    return _loader(_Samples(dataset, None, 0), sampler, config.num_workers)


class InstanceLoader(Loader):
    """A loader of (images, targets): lists of float32 (3, H, W) and of dicts.

    Faults of image files arrive here as values, from whichever process met them, so that the user gets the same
    one line with any ``num_workers``. Under ``on_error="raise"`` it is raised; under "skip" it is counted in this
    process's ``dataset.problems``; an evaluation batch is then smaller by that image, or left out.
    """

    @property
    def training(self) -> bool:
        return isinstance(self.batch_sampler, TrainingBatchSampler)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:  # type: ignore[override]
        problems = self.dataset.problems  # type: ignore[attr-defined]
        for images, targets, faults in super().__iter__():
            for kind, message in faults:
                problems.found(Problem(kind, message))
            if not images and not self.training:
                continue
            if not images:
                raise DataError(f"{self.dataset.source.folder}: not one image can be read; {problems}")  # type: ignore[attr-defined]
            yield images, [_with_tensors(target) for target in targets]


class _Samples(Dataset[tuple[Sample | None, list[Problem]]]):
    """Samples and the faults met on the way; a key is an index, or (index, position in the stream) in training."""

    def __init__(self, dataset: CocoInstances, transform: DetectionTransform | None, seed: int) -> None:
        self.source = dataset
        self.problems = dataset.problems
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Sample | None, list[Problem]]:
        if not isinstance(key, tuple):
            loaded = self.source.load(key)
            if isinstance(loaded, Problem):
                return None, [loaded]
            image, target = loaded
            return (to_dtype(image, torch.float32, scale=True), target), []
        index, draw = key
        faults: list[Problem] = []
        for candidate in range(index, index + len(self.source)):
            loaded = self.source.load(candidate % len(self.source))
            if not isinstance(loaded, Problem):
                assert self.transform is not None
                return self.transform(*loaded, sample_generator(self.seed, draw, index)), faults
            faults.append(loaded)
        return None, faults


def _collate(
    items: list[tuple[Sample | None, list[Problem]]],
) -> tuple[list[Tensor], list[dict[str, Any]], list[Problem]]:
    """Images, targets without small tensors, faults.

    Each tensor from another process costs an open file until it is read, and 1024 are a usual limit; arrays travel
    inside the message.
    """
    samples = [sample for sample, _ in items if sample is not None]
    targets = [
        {key: value.numpy() if isinstance(value, Tensor) and key != "masks" else value for key, value in target.items()}
        for _, target in samples
    ]
    return [image for image, _ in samples], targets, [fault for _, faults in items for fault in faults]


def _with_tensors(target: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in target.items()}


def _loader(
    samples: _Samples, sampler: TrainingBatchSampler | EvaluationBatchSampler, num_workers: int
) -> InstanceLoader:
    return InstanceLoader(
        samples,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        persistent_workers=num_workers > 0,
    )


def _path(config: DetectionDataConfig, value: str, key: str, meaning: str) -> Path:
    if not value:
        raise DataError(f"{key} is empty; give {meaning}, absolute or relative to data.root ({config.root})")
    return Path(config.root) / value


def _require(found: bool, path: Path, key: str, kind: str) -> None:
    if not found:
        there = "it is not a " + kind if path.exists() else "it does not exist"
        raise DataError(f"{key}: {path}: {there}; put the data there, or set {key} or data.root")
