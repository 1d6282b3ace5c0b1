"""Rules of detectors."""

from __future__ import annotations

from leakfree.config.rules.every_task import (
    ALONE,
    Problems,
    changed,
    image_groups_fill_the_batch,
    pixels_are_normalized,
    ramps_without_effect,
)
from leakfree.config.schema import BoxHeadConfig, DetectionRunConfig, MaskHeadConfig

__all__ = ["problems", "without_effect"]

_BATCH_NORMS = ("BN", "ShuffleBN")  # the norms whose statistics can be shared by random groups


def problems(config: DetectionRunConfig) -> Problems:
    yield from _datasets_are_complete(config)
    yield from _digits_fit_their_scene(config)
    if not config.data.min_size:
        yield "data.min_size", "is empty: needs at least one size in pixels, like [800]"
    elif min(config.data.min_size) < 1:
        yield "data.min_size", f"sizes are pixels, at least 1, got {config.data.min_size}"
    yield from image_groups_fill_the_batch(config.trainer.total_batch_size, config.model.images_per_group)
    yield from pixels_are_normalized(
        {"model.image_mean": config.model.image_mean, "model.image_std": config.model.image_std}
    )
    rpn = config.model.rpn
    if any(not level or min(level) < 1 for level in rpn.anchor_sizes):
        yield "model.rpn.anchor_sizes", f"needs a list of sizes in pixels for each feature map, got {rpn.anchor_sizes}"
    if not rpn.aspect_ratios or min(rpn.aspect_ratios) <= 0:
        yield "model.rpn.aspect_ratios", f"needs ratios above 0 (height / width), got {rpn.aspect_ratios}"
    yield from _norms_have_a_place(config)
    for key, head in _heads(config):
        if head.roi_shuffle == "statistics" and head.norm not in _BATCH_NORMS:
            yield (
                f"{key}.roi_shuffle",
                f"statistics needs a batch norm in the head, and {key}.norm is {head.norm}; "
                f"valid: norm {' or '.join(_BATCH_NORMS)}, or roi_shuffle none",
            )


def without_effect(config: DetectionRunConfig) -> Problems:
    model, heads = config.model, _heads(config)
    sections = [(key, head.norm, head.norm_options) for key, head in heads]
    sections.append(("model.backbone", model.backbone.norm, model.backbone.norm_options))
    yield from ramps_without_effect(config.schedule, sections)
    for name in changed(model.box_head, "num_convs", "conv_dim") if model.box_head.name == "2fc" else ():
        yield f"model.box_head.{name}", "has no effect: a 2fc head has no convolutions (model.box_head.name=4conv1fc)"
    if model.images_per_group and all(head.norm in ALONE and head.roi_shuffle == "none" for _, head in heads):
        norms = ", ".join(f"{key}.norm={head.norm}" for key, head in heads)
        yield "model.images_per_group", f"has no effect: no norm of a head shares statistics ({norms})"


def _datasets_are_complete(config: DetectionRunConfig) -> Problems:
    for split in ("train", "val"):
        dataset = getattr(config.data, split)
        for name in ("images", "annotations"):
            if dataset.name == "coco" and not getattr(dataset, name):
                what = "the folder of the images" if name == "images" else "the instances JSON file"
                yield (
                    f"data.{split}.{name}",
                    f"is empty: data.{split}.name=coco needs {what} (names: coco, digit_scenes)",
                )


def _digits_fit_their_scene(config: DetectionRunConfig) -> Problems:
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


def _norms_have_a_place(config: DetectionRunConfig) -> Problems:
    backbone, box_head = config.model.backbone, config.model.box_head
    if backbone.norm == "none" and backbone.name != "small":
        yield "model.backbone.norm", f"none is only for model.backbone.name=small, and the backbone is {backbone.name}"
    if box_head.name == "2fc" and box_head.norm != "none":
        yield (
            "model.box_head.norm",
            f"{box_head.norm} needs convolutions, and a 2fc head has none; use model.box_head.name=4conv1fc, or none",
        )


def _heads(config: DetectionRunConfig) -> list[tuple[str, BoxHeadConfig | MaskHeadConfig]]:
    heads: list[tuple[str, BoxHeadConfig | MaskHeadConfig]] = [("model.box_head", config.model.box_head)]
    if config.model.mask_head.enabled:
        heads.append(("model.mask_head", config.model.mask_head))
    return heads
