"""Contrastive learning as a training task: MoCo or SimCLR on images, labels for the evaluation only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from leakfree.config.schema import ContrastiveRunConfig
from leakfree.contrastive import (
    Views,
    build_contrastive,
    describe_batch,
    estimate_statistics,
    evaluate_contrastive,
    training_views,
    validate,
)
from leakfree.data import build_images
from leakfree.records import Evaluation
from leakfree.state import load_weights
from leakfree.training.tasks import Track, in_precision

__all__ = ["ContrastiveTask"]


class ContrastiveTask:
    """The method of a config with its data; see :class:`leakfree.training.tasks.Task`.

    Args:
        weights: checkpoint to load; "" = none.
        parts: submodules to load from it; none named = all.
    """

    def __init__(self, config: ContrastiveRunConfig, weights: str = "", parts: Sequence[str] = ()) -> None:
        self.config = config
        self.images = {"train": build_images(config.data, "train"), "val": build_images(config.data, "val")}
        self.method = build_contrastive(config)
        self.model = in_precision(self.method, config)
        if weights:
            load_weights(self.model, weights, parts)
            self.method.weights_loaded(parts)
        self._accuracy: Tensor | None = None

    def num_train_images(self) -> int:
        return len(self.images["train"])

    def faults(self) -> list[str]:
        return []  # an image that cannot be read ends the run

    def describe_batch(self, world_size: int) -> dict[str, Any]:
        return describe_batch(self.config, world_size)

    def train_batches(self, start_step: int) -> Iterable[Any]:
        return training_views(
            self.config,
            self.images["train"],
            self.method.key_mitigation,
            max_steps=self.config.schedule.max_steps,
            start_step=start_step,
        )

    def losses(self, batch: Views) -> dict[str, Tensor]:
        dtype = next(self.model.parameters()).dtype
        layout = torch.channels_last if self.config.model.channels_last else torch.contiguous_format
        query, key = (images.to(dtype=dtype, memory_format=layout) for images in (batch.query, batch.key))
        found = self.method(batch._replace(query=query, key=key))
        self._accuracy = found.accuracy
        return {"loss_contrast": found.loss}

    def monitors(self) -> dict[str, Tensor]:
        assert self._accuracy is not None
        return {"pretext": self._accuracy}

    def after_step(self) -> None:
        self.method.after_step()

    def estimate_statistics(self) -> None:
        estimate_statistics(self.method, self.config, self.images["train"])

    def validate(self, track: Track) -> dict[str, float | None]:
        return validate(self.method, self.config, self.images, track=track)

    def evaluate(self, track: Track) -> Evaluation:
        return evaluate_contrastive(self.method, self.config, self.images, track=track)
