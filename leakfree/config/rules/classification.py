"""Rules of image classifiers."""

from __future__ import annotations

from leakfree.config.rules import labelled
from leakfree.config.rules.every_task import (
    Problems,
    changed,
    image_groups_fill_the_batch,
    nearest_divisors,
    ramps_without_effect,
)
from leakfree.config.schema import ClassificationRunConfig

__all__ = ["problems", "without_effect"]


def problems(config: ClassificationRunConfig) -> Problems:
    data, model, total = config.data, config.model, config.trainer.total_batch_size
    yield from labelled.problems(data)
    unknown = [name for name in data.val.corruptions if name not in data.train.corruptions]
    if model.norm == "DomainBN" and unknown:
        yield (
            "data.val.corruptions",
            f"DomainBN has no statistics for {unknown[0]}: it is none of data.train.corruptions "
            f"({', '.join(data.train.corruptions)})",
        )
    if data.composition != "random" and total % data.group_size:
        yield (
            "data.group_size",
            f"{total} images (trainer.total_batch_size) cannot be split into groups of {data.group_size} of one class; "
            "nearest that can: " + nearest_divisors(total, data.group_size),
        )
    yield from image_groups_fill_the_batch(total, model.images_per_group)
    if model.norm == "none" and model.name != "small":
        yield "model.norm", f"none is only for model.name=small, and the model is {model.name}"


def without_effect(config: ClassificationRunConfig) -> Problems:
    yield from ramps_without_effect(config.schedule, [("model", config.model.norm, config.model.norm_options)])
    if config.data.composition == "random" and changed(config.data, "group_size"):
        yield "data.group_size", "has no effect with data.composition=random: it is for same_class"
    yield from labelled.without_effect(config.data)
