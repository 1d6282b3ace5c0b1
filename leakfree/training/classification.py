"""Classification as a training task: an image classifier on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from leakfree.classification import (
    build_classifier,
    classify,
    describe_batch,
    estimate_statistics,
    evaluate_classifier,
    training_batches,
    validation_accuracies,
)
from leakfree.config.schema import ClassificationRunConfig
from leakfree.data import LabelledImages, build_images
from leakfree.errors import ConfigError, DataError
from leakfree.records import Evaluation
from leakfree.state import load_weights
from leakfree.training.tasks import Track, in_precision

__all__ = ["ClassificationTask"]


class ClassificationTask:
    """The classifier of a config with its data; see :class:`leakfree.training.tasks.Task`.

    Args:
        weights: checkpoint to load; "" = none.
        parts: submodules to load from it; none named = all.
    """

    def __init__(self, config: ClassificationRunConfig, weights: str = "", parts: Sequence[str] = ()) -> None:
        self.config = config
        self.images = {"train": build_images(config.data, "train"), "val": build_images(config.data, "val")}
        domains = list(dict.fromkeys(config.data.train.corruptions))
        self.model = in_precision(build_classifier(config, _num_classes(config, self.images), domains), config)
        if weights:
            load_weights(self.model, weights, parts)
        self._accuracy: Tensor | None = None

    def num_train_images(self) -> int:
        return len(self.images["train"])

    def faults(self) -> list[str]:
        return []  # an image that cannot be read ends the run

    def describe_batch(self, world_size: int) -> dict[str, Any]:
        return describe_batch(self.config, self.model, world_size)

    def train_batches(self, start_step: int) -> Iterable[Any]:
        max_steps = self.config.schedule.max_steps
        return training_batches(self.config, self.images["train"], start_step=start_step, max_steps=max_steps)

    def losses(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        outputs = classify(self.model, batch)
        labels = batch[1].to(outputs.device)
        self._accuracy = (outputs.detach().argmax(1) == labels).double().mean()
        return {"loss_classifier": F.cross_entropy(outputs, labels)}

    def monitors(self) -> dict[str, Tensor]:
        assert self._accuracy is not None
        return {"accuracy": self._accuracy}

    def after_step(self) -> None:
        pass

    def estimate_statistics(self) -> None:
        estimate_statistics(self.model, self.config, self.images["train"])

    def validate(self, track: Track) -> dict[str, float | None]:
        return validation_accuracies(self.model, self.config, self.images, track=track)

    def evaluate(self, track: Track) -> Evaluation:
        return evaluate_classifier(self.model, self.config, self.images, track=track)


def _num_classes(config: ClassificationRunConfig, images: dict[str, LabelledImages]) -> int:
    train, val = images["train"].classes, images["val"].classes
    if train != val:
        different = sorted({*train} ^ {*val})
        where = "val" if different[0] in val else "train"
        raise DataError(
            f"data.val: its classes are not those of data.train: {different[0]!r} is only in data.{where} "
            f"({len(train)} classes in train, {len(val)} in val)"
        )
    wanted = config.model.num_classes
    if wanted and wanted < len(train):
        raise ConfigError(
            f"model.num_classes: is {wanted}, but the training data has {len(train)}; use at least {len(train)}, or 0"
        )
    return wanted or len(train)
