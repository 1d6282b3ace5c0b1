"""Detection as a training task: Mask R-CNN on COCO instances."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from leakfree.config.schema import DetectionRunConfig
from leakfree.data import CocoInstances, build_dataset
from leakfree.detection import (
    average_precision,
    build_detector,
    describe_batch,
    estimate_statistics,
    evaluate_detector,
    evaluation_batches,
    training_batches,
    training_targets,
)
from leakfree.distributed import barrier, get_world_size
from leakfree.errors import ConfigError, DataError
from leakfree.records import Evaluation
from leakfree.state import load_weights
from leakfree.training.tasks import Track, in_precision

__all__ = ["DetectionTask"]


class DetectionTask:
    """The detector of a config with its data; see :class:`leakfree.training.tasks.Task`.

    Args:
        weights: checkpoint to load; "" = none.
        parts: submodules to load from it; none named = all.
    """

    def __init__(self, config: DetectionRunConfig, weights: str = "", parts: Sequence[str] = ()) -> None:
        self.config = config
        self.datasets = _open(config)
        self.model = in_precision(build_detector(config, _num_classes(config, self.datasets)), config)
        if weights:
            load_weights(self.model, weights, parts)

    def num_train_images(self) -> int:
        return len(self.datasets["train"])

    def faults(self) -> list[str]:
        return [f"data.{split}: {data.problems}" for split, data in self.datasets.items() if len(data.problems)]

    def describe_batch(self, world_size: int) -> dict[str, Any]:
        return describe_batch(self.config, world_size)

    def train_batches(self, start_step: int) -> Iterable[Any]:
        max_steps = self.config.schedule.max_steps
        return training_batches(self.config, self.datasets["train"], start_step=start_step, max_steps=max_steps)

    def losses(self, batch: tuple[list[Tensor], list[dict[str, Any]]]) -> dict[str, Tensor]:
        return self.model(batch[0], training_targets(batch[1]))

    def monitors(self) -> dict[str, Tensor]:
        heads: Any = self.model.roi_heads
        return {"roi_accuracy": heads.training_accuracy()}

    def after_step(self) -> None:
        pass

    def estimate_statistics(self) -> None:
        estimate_statistics(self.model, self.config, self.datasets["train"])

    def validate(self, track: Track) -> dict[str, float | None]:
        loader = evaluation_batches(self.config, self.datasets["val"], self.config.evaluation.max_images)
        batches = track(loader, "AP under population statistics")
        return average_precision(self.model, batches, ["population"])["population"]

    def evaluate(self, track: Track) -> Evaluation:
        return evaluate_detector(self.model, self.config, self.datasets, track=track)


def _open(config: DetectionRunConfig) -> dict[str, CocoInstances]:
    """Open both splits; the first rank of each machine goes first, since it may have to write them."""
    masks = config.model.mask_head.enabled
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or get_world_size() == 1
    if not first:
        barrier()
    datasets = {split: build_dataset(config.data, split, masks=masks) for split in ("train", "val")}
    if first:
        barrier()
    train, val = datasets["train"].categories, datasets["val"].categories
    if train != val:
        label = next(label for label in sorted({*train, *val}) if train.get(label) != val.get(label))
        raise DataError(
            f"data.val: its classes are not those of data.train: class {label} is {val.get(label)!r} in val, "
            f"{train.get(label)!r} in train"
        )
    return datasets


def _num_classes(config: DetectionRunConfig, datasets: dict[str, CocoInstances]) -> int:
    found, wanted = datasets["train"].num_classes, config.model.num_classes
    if wanted and wanted < found:
        raise ConfigError(
            f"model.num_classes: is {wanted}, but the training data has {found}; use at least {found}, or 0"
        )
    return wanted or found
