"""Rules of the sections that every task has, and the questions that rules of several tasks ask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from leakfree.config.check import schema_kinds
from leakfree.config.schema import RunConfig, ScheduleConfig

__all__ = [
    "ALONE",
    "Problems",
    "changed",
    "image_groups_fill_the_batch",
    "nearest_divisors",
    "pixels_are_normalized",
    "problems",
    "ramps_without_effect",
    "without_effect",
]

Problems = Iterator[tuple[str, str]]

ALONE = ("none", "FrozenBN", "GN", "LN", "IN", "PN", "ProxyNorm")  # norms that mix no samples


def problems(config: RunConfig) -> Problems:
    yield from _batch_is_shared_evenly(config)
    if not config.evaluation.statistics:
        schema: type = type(config)
        known = schema_kinds(schema)["evaluation.statistics"][1]["one_of"]
        yield "evaluation.statistics", f"is empty: name at least one of {', '.join(known)}"
    marks = config.schedule.milestones
    if any(not 0 < mark <= 1 for mark in marks) or marks != sorted(set(marks)):
        yield "schedule.milestones", f"must be increasing shares of max_steps, above 0 and at most 1, got {marks}"
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
    if not config.output_dir.strip():
        yield "output_dir", "is empty: name the folder the run writes to"


def without_effect(config: RunConfig) -> Problems:
    optimizer, schedule = config.optimizer, config.schedule
    if schedule.warmup_steps >= schedule.max_steps:
        yield (
            "schedule.warmup_steps",
            f"{schedule.warmup_steps} steps of warmup in a run of schedule.max_steps={schedule.max_steps}: "
            "the learning rate never gets to optimizer.lr",
        )
    if optimizer.name == "adamw" and changed(optimizer, "momentum"):
        yield "optimizer.momentum", "has no effect with optimizer.name=adamw: it is for sgd and lars"
    for name in changed(schedule, "milestones", "gamma") if schedule.decay != "step" else ():
        yield f"schedule.{name}", f"has no effect with schedule.decay={schedule.decay}: it is for step"
    never = schedule.freeze_bn_at == 1 and schedule.freeze_bn_unit == "share"
    if never and changed(schedule, "freeze_bn_statistics"):
        yield "schedule.freeze_bn_statistics", "has no effect with schedule.freeze_bn_at=1: nothing is frozen"
    if schedule.freeze_bn_unit == "step" and schedule.freeze_bn_at >= schedule.max_steps:
        yield (
            "schedule.freeze_bn_at",
            f"has no effect: nothing is frozen at step {schedule.freeze_bn_at:g} of a run of "
            f"schedule.max_steps={schedule.max_steps}",
        )


def _batch_is_shared_evenly(config: RunConfig) -> Problems:
    trainer = config.trainer
    key = "num_gpus" if trainer.num_gpus else "num_processes"
    of = f"trainer.{key}" + (" x trainer.num_machines" if trainer.num_machines > 1 else "")
    total, ranks = trainer.total_batch_size, trainer.num_ranks
    if total % ranks:
        near = sorted({max(total // ranks, 1) * ranks, (total // ranks + 1) * ranks})
        yield (
            "trainer.total_batch_size",
            f"{total} images cannot be shared evenly by {ranks} ranks ({of}); nearest that can: "
            + ", ".join(map(str, near)),
        )
    if trainer.precision == "16-mixed" and not trainer.num_gpus:
        yield "trainer.precision", "16-mixed needs GPUs (trainer.num_gpus); valid on CPU: bf16-mixed, 32-true, 64-true"


# --------------------------------------------------------------------------------- for several tasks


def changed(section: Any, *names: str) -> list[str]:
    """Those of the fields ``names`` that differ from the schema's default."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def nearest_divisors(total: int, given: int) -> str:
    small = [size for size in range(1, math.isqrt(total) + 1) if total % size == 0]
    near = sorted({*small, *(total // size for size in small)}, key=lambda size: (abs(size - given), size))
    return ", ".join(map(str, sorted(near[:2])))


def image_groups_fill_the_batch(total: int, images_per_group: int) -> Problems:
    """``total``: of ``trainer.total_batch_size``; ``images_per_group``: of ``model``."""
    if images_per_group and total % images_per_group:
        yield (
            "model.images_per_group",
            f"{total} images (trainer.total_batch_size) cannot be split into groups of {images_per_group}; nearest "
            "that can: " + nearest_divisors(total, images_per_group),
        )


def pixels_are_normalized(given: dict[str, list[float]]) -> Problems:
    """``given``: means and standard deviations under their keys."""
    for key, values in given.items():
        if len(values) != 3:
            yield key, f"needs 3 numbers (red, green, blue), got {values}"
        elif key.endswith("std") and min(values) <= 0:
            yield key, f"must be above 0, got {values}"


def ramps_without_effect(schedule: ScheduleConfig, sections: Iterable[tuple[str, str, dict[str, Any]]]) -> Problems:
    """``sections``: (key, norm, options) wherever a norm is chosen."""
    sections = list(sections)
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
    if changed(schedule, "burn_in") and not (schedule.scale_ramps and "CBN" in {norm for _, norm, _ in sections}):
        yield "schedule.burn_in", "has no effect: it is for norm CBN, with schedule.scale_ramps=true"
