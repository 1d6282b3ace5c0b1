"""Rules of image classifiers."""

from __future__ import annotations

from leakfree.config.rules import labelled
from leakfree.config.rules.every_task import (
    ALONE,
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
    if model.norm == "DomainBN" and unknown and set(config.evaluation.statistics) != {"embeddings"}:
        yield (
            "data.val.corruptions",
            f"DomainBN has no statistics for {unknown[0]}: it is none of data.train.corruptions "
            f"({', '.join(data.train.corruptions)}); only evaluation.statistics=[embeddings] takes others",
        )
    yield from _statistics_can_be_adapted(config)
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
    yield from _adaptation_without_effect(config)


def _statistics_can_be_adapted(config: ClassificationRunConfig) -> Problems:
    model, evaluation = config.model, config.evaluation
    if evaluation.source_share == 1:
        yield (
            "evaluation.source_share",
            "must be below 1: with no share for the target nothing is re-estimated; that is statistics: population",
        )
    if "embeddings" in evaluation.statistics and model.norm != "DomainBN":
        yield (
            "evaluation.statistics",
            f"embeddings mixes the domains of a DomainBN, and model.norm is {model.norm}; use model.norm=DomainBN, or "
            "target for statistics of an unknown domain",
        )
    elif "embeddings" in evaluation.statistics:
        for option, wanted in (("running_statistics", "domain"), ("track_running_stats", True)):
            value = model.norm_options.get(option, wanted)
            if value != wanted:
                yield (
                    f"model.norm_options.{option}",
                    f"is {value}, but embeddings (evaluation.statistics) needs running statistics of each domain",
                )


def _adaptation_without_effect(config: ClassificationRunConfig) -> Problems:
    evaluation, norm = config.evaluation, config.model.norm
    if "target" not in evaluation.statistics:
        for name in changed(evaluation, "target_images", "source_share"):
            yield f"evaluation.{name}", "has no effect without target in evaluation.statistics"
    elif norm == "BatchStatBN":
        yield "evaluation.statistics", "target has no effect: BatchStatBN takes the statistics of the test batch"
    elif norm in ALONE and config.model.block_norm in ALONE:
        yield "evaluation.statistics", f"target has no effect: norm {norm} has no statistics to re-estimate"
    if "embeddings" in evaluation.statistics and len(set(config.data.train.corruptions)) == 1:
        yield "evaluation.statistics", "embeddings has no effect: data.train.corruptions is one domain, nothing to mix"
