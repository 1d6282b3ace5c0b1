"""What several keys of a config must satisfy together; each key alone is checked in :mod:`leakfree.config.check`.

A rule reads the whole config and yields (key, what is wrong). Add a rule by appending it to ``RULES``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from leakfree.config.check import Origin, schema_kinds
from leakfree.config.schema import (
    BoxHeadConfig,
    ClassificationRunConfig,
    DetectionRunConfig,
    MaskHeadConfig,
    RunConfig,
)
from leakfree.errors import ConfigError

__all__ = ["RULES", "check_rules"]

Problems = Iterator[tuple[str, str]]

_BATCH_NORMS = ("BN", "ShuffleBN")  # the norms whose statistics can be shared by random groups
_ALONE = ("none", "FrozenBN", "GN", "LN", "IN", "PN", "ProxyNorm")  # mix no RoIs: grouping them changes nothing


def check_rules(config: RunConfig, origin: Origin) -> None:
    """Raise on the first rule that ``config`` breaks; log a warning for a setting that does nothing.

    Raises:
        ConfigError: the message names the key and where it was given.
    """
    for rule in RULES:
        for key, problem in rule(config):
            raise ConfigError(f"{origin(key)}: {key}: {problem}")
    for key, problem in _settings_without_effect(config):
        logging.getLogger("leakfree.config").warning("leakfree: warning: %s: %s: %s", origin(key), key, problem)


def _datasets_are_complete(config: RunConfig) -> Problems:
    if not isinstance(config, DetectionRunConfig):
        return
    for split in ("train", "val"):
        dataset = getattr(config.data, split)
        for name in ("images", "annotations"):
            if dataset.name == "coco" and not getattr(dataset, name):
                what = "the folder of the images" if name == "images" else "the instances JSON file"
                yield (
                    f"data.{split}.{name}",
                    f"is empty: data.{split}.name=coco needs {what} (names: coco, digit_scenes)",
                )


def _folders_are_named(config: RunConfig) -> Problems:
    if not isinstance(config, ClassificationRunConfig):
        return
    for split in ("train", "val"):
        images = getattr(config.data, split)
        if images.name == "image_folder" and not images.path:
            yield (
                f"data.{split}.path",
                f"is empty: data.{split}.name=image_folder needs a folder with a subfolder of images for each class "
                "(names: digits, image_folder, cifar10, cifar100)",
            )
        if not images.corruptions:
            yield f"data.{split}.corruptions", "is empty: name at least one of none, blur, contrast, invert"
    unknown = [name for name in config.data.val.corruptions if name not in config.data.train.corruptions]
    if config.model.norm == "DomainBN" and unknown and set(config.evaluation.statistics) != {"embeddings"}:
        yield (
            "data.val.corruptions",
            f"DomainBN has no statistics for {unknown[0]}: it is none of data.train.corruptions "
            f"({', '.join(config.data.train.corruptions)}); only evaluation.statistics=[embeddings] takes others",
        )


def _statistics_can_be_adapted(config: RunConfig) -> Problems:
    if not isinstance(config, ClassificationRunConfig):
        return
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


def _batches_hold_whole_groups(config: RunConfig) -> Problems:
    if not isinstance(config, ClassificationRunConfig) or config.data.composition == "random":
        return
    total, size = config.trainer.total_batch_size, config.data.group_size
    if total % size:
        yield (
            "data.group_size",
            f"{total} images (trainer.total_batch_size) cannot be split into groups of {size} of one class; nearest "
            "that can: " + _nearest_divisors(total, size),
        )


def _nearest_divisors(total: int, given: int) -> str:
    near = sorted((size for size in range(1, total + 1) if total % size == 0), key=lambda size: abs(size - given))
    return ", ".join(map(str, sorted(near[:2])))


def _digits_fit_their_scene(config: RunConfig) -> Problems:
    if not isinstance(config, DetectionRunConfig):
        return
    for split in ("train", "val"):
        dataset = getattr(config.data, split)
        if dataset.name != "digit_scenes":
            continue
        key, digits = f"data.{split}.digits", dataset.digits
        cell = digits.image_size // digits.grid
        if len(digits.digit_size) != 2 or not 1 <= digits.digit_size[0] <= digits.digit_size[-1]:
            yield f"{key}.digit_size", f"must be [smallest, largest] side in pixels, got {digits.digit_size}"
        elif digits.digit_size[1] > cell:
            yield (
                f"{key}.digit_size",
                f"a digit of {digits.digit_size[1]} pixels does not fit its cell: image_size // grid = "
                f"{digits.image_size} // {digits.grid} = {cell} pixels",
            )
        if digits.objects_per_image > digits.grid**2:
            yield (
                f"{key}.objects_per_image",
                f"at most one digit per cell: {digits.grid} x {digits.grid} = {digits.grid**2}, "
                f"got {digits.objects_per_image}",
            )


def _image_sizes_are_positive(config: RunConfig) -> Problems:
    if not isinstance(config, DetectionRunConfig):
        return
    if not config.data.min_size:
        yield "data.min_size", "is empty: needs at least one size in pixels, like [800]"
    elif min(config.data.min_size) < 1:
        yield "data.min_size", f"sizes are pixels, at least 1, got {config.data.min_size}"


def _batch_is_shared_evenly(config: RunConfig) -> Problems:
    trainer = config.trainer
    key, ranks = ("num_gpus", trainer.num_gpus) if trainer.num_gpus else ("num_processes", trainer.num_processes)
    total = trainer.total_batch_size
    if total % ranks:
        near = sorted({max(total // ranks, 1) * ranks, (total // ranks + 1) * ranks})
        yield (
            "trainer.total_batch_size",
            f"{total} images cannot be shared evenly by {ranks} ranks (trainer.{key}); nearest that can: "
            + ", ".join(map(str, near)),
        )
    if trainer.precision == "16-mixed" and not trainer.num_gpus:
        yield "trainer.precision", "16-mixed needs GPUs (trainer.num_gpus); valid on CPU: bf16-mixed, 32-true, 64-true"


def _image_groups_fill_the_batch(config: RunConfig) -> Problems:
    if not isinstance(config, DetectionRunConfig | ClassificationRunConfig) or not config.model.images_per_group:
        return
    total, images = config.trainer.total_batch_size, config.model.images_per_group
    if total % images:
        yield (
            "model.images_per_group",
            f"{total} images (trainer.total_batch_size) cannot be split into groups of {images}; nearest that can: "
            + _nearest_divisors(total, images),
        )


def _milestones_increase(config: RunConfig) -> Problems:
    marks = config.schedule.milestones
    if any(not 0 < mark <= 1 for mark in marks) or marks != sorted(set(marks)):
        yield "schedule.milestones", f"must be increasing shares of max_steps, above 0 and at most 1, got {marks}"


def _freeze_point_is_of_its_unit(config: RunConfig) -> Problems:
    at, unit = config.schedule.freeze_bn_at, config.schedule.freeze_bn_unit
    if unit == "share" and at > 1:
        yield (
            "schedule.freeze_bn_at",
            f"is a share of the run, at most 1, got {at:g}; for steps or epochs set schedule.freeze_bn_unit",
        )
    elif unit == "step" and at != int(at):
        yield (
            "schedule.freeze_bn_at",
            f"with schedule.freeze_bn_unit=step must be a whole number of steps, got {at:g}",
        )


def _something_is_evaluated(config: RunConfig) -> Problems:
    if not config.evaluation.statistics:
        schema: type = type(config)
        known = schema_kinds(schema)["evaluation.statistics"][1]["one_of"]
        yield "evaluation.statistics", f"is empty: name at least one of {', '.join(known)}"


def _output_is_named(config: RunConfig) -> Problems:
    if not config.output_dir.strip():
        yield "output_dir", "is empty: name the folder the run writes to"


def _pixels_are_normalized(config: RunConfig) -> Problems:
    given: dict[str, list[float]] = {}
    if isinstance(config, DetectionRunConfig):
        given = {"model.image_mean": config.model.image_mean, "model.image_std": config.model.image_std}
    elif isinstance(config, ClassificationRunConfig):
        given = {"data.mean": config.data.mean, "data.std": config.data.std}
    for key, values in given.items():
        if len(values) != 3:
            yield key, f"needs 3 numbers (red, green, blue), got {values}"
        elif key.endswith("std") and min(values) <= 0:
            yield key, f"must be above 0, got {values}"


def _anchors_are_positive(config: RunConfig) -> Problems:
    if not isinstance(config, DetectionRunConfig):
        return
    rpn = config.model.rpn
    if any(not level or min(level) < 1 for level in rpn.anchor_sizes):
        yield "model.rpn.anchor_sizes", f"needs a list of sizes in pixels for each feature map, got {rpn.anchor_sizes}"
    if not rpn.aspect_ratios or min(rpn.aspect_ratios) <= 0:
        yield "model.rpn.aspect_ratios", f"needs ratios above 0 (height / width), got {rpn.aspect_ratios}"


def _norms_have_a_place(config: RunConfig) -> Problems:
    if isinstance(config, ClassificationRunConfig) and config.model.norm == "none" and config.model.name != "small":
        yield "model.norm", f"none is only for model.name=small, and the model is {config.model.name}"
    if not isinstance(config, DetectionRunConfig):
        return
    backbone, box_head = config.model.backbone, config.model.box_head
    if backbone.norm == "none" and backbone.name != "small":
        yield "model.backbone.norm", f"none is only for model.backbone.name=small, and the backbone is {backbone.name}"
    if box_head.name == "2fc" and box_head.norm != "none":
        yield (
            "model.box_head.norm",
            f"{box_head.norm} needs convolutions, and a 2fc head has none; use model.box_head.name=4conv1fc, or none",
        )


def _statistics_can_be_shuffled(config: RunConfig) -> Problems:
    for key, head in _heads(config):
        if head.roi_shuffle == "statistics" and head.norm not in _BATCH_NORMS:
            yield (
                f"{key}.roi_shuffle",
                f"statistics needs a batch norm in the head, and {key}.norm is {head.norm}; "
                f"valid: norm {' or '.join(_BATCH_NORMS)}, or roi_shuffle none",
            )


def _settings_without_effect(config: RunConfig) -> Problems:
    yield from _schedule_without_effect(config)
    if isinstance(config, ClassificationRunConfig):
        yield from _images_without_effect(config)
        yield from _adaptation_without_effect(config)
    for key, head in _heads(config):
        if head.roi_shuffle == "features" and head.norm == "none":
            yield f"{key}.roi_shuffle", "features has no effect: no norm in the head, so no RoI sees another"
    if not isinstance(config, DetectionRunConfig):
        return
    model = config.model
    for name in _changed(model.box_head, "num_convs", "conv_dim") if model.box_head.name == "2fc" else ():
        yield f"model.box_head.{name}", "has no effect: a 2fc head has no convolutions (model.box_head.name=4conv1fc)"
    if model.images_per_group and all(head.norm in _ALONE and head.roi_shuffle == "none" for _, head in _heads(config)):
        norms = ", ".join(f"{key}.norm={head.norm}" for key, head in _heads(config))
        yield "model.images_per_group", f"has no effect: no norm of a head shares statistics ({norms})"


def _images_without_effect(config: ClassificationRunConfig) -> Problems:
    data = config.data
    if data.composition == "random" and _changed(data, "group_size"):
        yield "data.group_size", "has no effect with data.composition=random: it is for same_class"
    for split, images in (("train", data.train), ("val", data.val)):
        if images.name == "digits" and images.path:
            yield f"data.{split}.path", f"has no effect with data.{split}.name=digits: it is for files on disk"
        if not images.noise and _changed(images, "seed"):
            yield f"data.{split}.seed", f"has no effect with data.{split}.noise=0: it is of the noise"


def _adaptation_without_effect(config: ClassificationRunConfig) -> Problems:
    evaluation, norm = config.evaluation, config.model.norm
    if "target" not in evaluation.statistics:
        for name in _changed(evaluation, "target_images", "source_share"):
            yield f"evaluation.{name}", "has no effect without target in evaluation.statistics"
    elif norm == "BatchStatBN":
        yield (
            "evaluation.statistics",
            "target has no effect: BatchStatBN takes the statistics of the test batch",
        )
    elif norm in _ALONE and config.model.block_norm in _ALONE:
        yield "evaluation.statistics", f"target has no effect: norm {norm} has no statistics to re-estimate"
    if "embeddings" in evaluation.statistics and len(set(config.data.train.corruptions)) == 1:
        yield "evaluation.statistics", "embeddings has no effect: data.train.corruptions is one domain, nothing to mix"


def _norm_sections(config: RunConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """(key, norm, options) wherever a norm is chosen."""
    sections: list[tuple[str, Any]] = list(_heads(config))
    if isinstance(config, DetectionRunConfig):
        sections.append(("model.backbone", config.model.backbone))
    if isinstance(config, ClassificationRunConfig):
        sections.append(("model", config.model))
    return [(key, section.norm, section.norm_options) for key, section in sections]


def _ramps_without_effect(config: RunConfig) -> Problems:
    schedule, sections = config.schedule, _norm_sections(config)
    norms = {norm for _, norm, _ in sections}
    for key, norm, options in sections:
        for name in ("ramp", "burn_in"):
            if (
                schedule.scale_ramps
                and (norm, name) in (("BatchRenorm", "ramp"), ("CBN", "burn_in"))
                and name in options
            ):
                yield (
                    f"{key}.norm_options.{name}",
                    "has no effect with schedule.scale_ramps=true, which scales it to schedule.max_steps",
                )
    if _changed(schedule, "burn_in") and not (schedule.scale_ramps and "CBN" in norms):
        yield "schedule.burn_in", "has no effect: it is for norm CBN, with schedule.scale_ramps=true"


def _schedule_without_effect(config: RunConfig) -> Problems:
    yield from _ramps_without_effect(config)
    optimizer, schedule = config.optimizer, config.schedule
    if schedule.warmup_steps >= schedule.max_steps:
        yield (
            "schedule.warmup_steps",
            f"{schedule.warmup_steps} steps of warmup in a run of schedule.max_steps={schedule.max_steps}: "
            "the learning rate never gets to optimizer.lr",
        )
    if optimizer.name != "sgd" and _changed(optimizer, "momentum"):
        yield "optimizer.momentum", f"has no effect with optimizer.name={optimizer.name}: it is for sgd"
    for name in _changed(schedule, "milestones", "gamma") if schedule.decay != "step" else ():
        yield f"schedule.{name}", f"has no effect with schedule.decay={schedule.decay}: it is for step"
    never = schedule.freeze_bn_at == 1 and schedule.freeze_bn_unit == "share"
    if never and _changed(schedule, "freeze_bn_statistics"):
        yield "schedule.freeze_bn_statistics", "has no effect with schedule.freeze_bn_at=1: nothing is frozen"
    if schedule.freeze_bn_unit == "step" and schedule.freeze_bn_at >= schedule.max_steps:
        yield (
            "schedule.freeze_bn_at",
            f"has no effect: nothing is frozen at step {schedule.freeze_bn_at:g} of a run of "
            f"schedule.max_steps={schedule.max_steps}",
        )


def _changed(section: Any, *names: str) -> list[str]:
    """Those of the fields ``names`` that differ from the schema's default."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _heads(config: RunConfig) -> list[tuple[str, BoxHeadConfig | MaskHeadConfig]]:
    if not isinstance(config, DetectionRunConfig):
        return []
    heads: list[tuple[str, BoxHeadConfig | MaskHeadConfig]] = [("model.box_head", config.model.box_head)]
    if config.model.mask_head.enabled:
        heads.append(("model.mask_head", config.model.mask_head))
    return heads


RULES: list[Callable[[RunConfig], Problems]] = [
    _datasets_are_complete,
    _folders_are_named,
    _batches_hold_whole_groups,
    _digits_fit_their_scene,
    _image_sizes_are_positive,
    _batch_is_shared_evenly,
    _image_groups_fill_the_batch,
    _something_is_evaluated,
    _freeze_point_is_of_its_unit,
    _statistics_can_be_adapted,
    _milestones_increase,
    _output_is_named,
    _pixels_are_normalized,
    _anchors_are_positive,
    _norms_have_a_place,
    _statistics_can_be_shuffled,
]
