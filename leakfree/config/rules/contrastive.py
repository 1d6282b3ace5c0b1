"""Rules of contrastive methods."""

from __future__ import annotations

from leakfree.config.rules import labelled
from leakfree.config.rules.every_task import Problems, changed, image_groups_fill_the_batch, ramps_without_effect
from leakfree.config.schema import ContrastiveRunConfig

__all__ = ["problems", "without_effect"]

_GROUPED = ("bn", "shuffle_bn", "shuffle_images", "loader_shuffle")  # what model.images_per_group is for
_NETWORKS = ("gn", "frozen_bn")  # words for the network itself; the others are about one network of batch norms


def problems(config: ContrastiveRunConfig) -> Problems:
    yield from labelled.problems(config.data)
    yield from _views_fit_the_images(config)
    yield from image_groups_fill_the_batch(config.trainer.total_batch_size, config.model.images_per_group)
    yield from _encoders_are_alike(config)
    yield from _options_are_given(config)
    if config.model.method == "moco":
        yield from _queue_and_momentum(config)


def without_effect(config: ContrastiveRunConfig) -> Problems:
    model = config.model
    words = _words(config)
    yield from ramps_without_effect(config.schedule, [])
    yield from labelled.without_effect(config.data)
    for split, images in (("train", config.data.train), ("val", config.data.val)):
        for name in changed(images, "corruptions", "noise"):
            yield f"data.{split}.{name}", "has no effect with task=contrastive: views are what distorts images"
    yield from _views_without_effect(config)
    if model.method == "simclr":
        for name in changed(model, "queue_size", "momentum", "momentum_end", "teacher_statistics"):
            yield f"model.{name}", "has no effect with model.method=simclr: it is for moco"
    elif model.query in _NETWORKS and changed(model, "teacher_statistics"):
        yield "model.teacher_statistics", f"has no effect: {model.query} has no running statistics that change"
    if model.head == "linear" and changed(model, "hidden_dim"):
        yield "model.hidden_dim", "has no effect with model.head=linear: it is for mlp"
    if model.images_per_group and not any(word in _GROUPED for word in words):
        yield (
            "model.images_per_group",
            f"has no effect: it is for {', '.join(_GROUPED)} (model.query={words[0]}, model.key={words[1]})",
        )
    if "group_size" in model.norm_options and "ghost_bn" not in words:
        yield "model.norm_options.group_size", "has no effect: it is for ghost_bn (others: model.images_per_group)"
    yield from _measures_without_effect(config)


def _words(config: ContrastiveRunConfig) -> tuple[str, str]:
    """Who shares statistics: of queries, of keys."""
    model = config.model
    return model.query, model.query if model.key == "same" else model.key


def _views_fit_the_images(config: ContrastiveRunConfig) -> Problems:
    data = config.data
    for split, images in (("train", data.train), ("val", data.val)):
        if data.views.name == "digits" and images.name != "digits":
            yield (
                "data.views.name",
                f"digits distorts images of one size, and data.{split}.name is {images.name}; use moco_v2 or simclr",
            )


def _encoders_are_alike(config: ContrastiveRunConfig) -> Problems:
    model = config.model
    query, key = _words(config)
    for word in _NETWORKS:
        if query != key and word in (query, key):
            yield (
                "model.key",
                f"{word} is a network without batch statistics, so both encoders have it: model.query={query} and "
                f"model.key={key} cannot be combined; use model.query={word} model.key=same",
            )
    if key == "eman" and model.method != "moco":
        yield "model.key", f"eman is the momentum encoder of moco, and model.method={model.method} has none"
    if key == "eman" and model.teacher_statistics == "own":
        yield (
            "model.teacher_statistics",
            "own are statistics of key batches, and model.key=eman never uses any: it normalizes with those of the "
            "query encoder; use auto, ema or copy",
        )
    if query == "frozen_bn" and not model.weights:
        yield (
            "model.query",
            "frozen_bn of a network with random weights normalizes nothing; set model.weights to a checkpoint whose "
            "statistics it keeps",
        )


def _options_are_given(config: ContrastiveRunConfig) -> Problems:
    """Names that the norms take are checked where the norms are; here those that belong to a word."""
    options, words = config.model.norm_options, _words(config)
    size = options.get("group_size")
    if ("ghost_bn" in words or size is not None) and not _is_count(size, 2):
        yield (
            "model.norm_options.group_size",
            f"is how many images ghost_bn normalizes together, an integer of at least 2, got {size}",
        )
    groups = options.get("num_groups")
    if groups is not None and "gn" not in words:
        yield "model.norm_options.num_groups", f"is for gn (groups of channels), and model.query is {words[0]}"
    elif groups is not None and not _is_count(groups, 1):
        yield "model.norm_options.num_groups", f"is the groups of channels of gn, an integer above 0, got {groups}"


def _is_count(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _queue_and_momentum(config: ContrastiveRunConfig) -> Problems:
    model, total = config.model, config.trainer.total_batch_size
    if model.queue_size < total:
        yield (
            "model.queue_size",
            f"{model.queue_size} keys do not hold one batch: use at least trainer.total_batch_size={total}",
        )
    if model.momentum_end and model.momentum_end < model.momentum:
        yield (
            "model.momentum_end",
            f"the momentum rises over a run: must be at least model.momentum={model.momentum}, or 0 for a constant "
            f"one, got {model.momentum_end}",
        )


def _views_without_effect(config: ContrastiveRunConfig) -> Problems:
    views = config.data.views
    others = ("min_crop", "flip", "blur") if views.name == "digits" else ("style", "style_noise")
    owner = "moco_v2 and simclr" if views.name == "digits" else "digits"
    for name in changed(views, *others):
        yield f"data.views.{name}", f"has no effect with data.views.name={views.name}: it is for {owner}"
    if views.name == "digits" and not views.style and changed(views, "style_noise"):
        yield "data.views.style_noise", "has no effect with data.views.style=0: it is of the style"


def _measures_without_effect(config: ContrastiveRunConfig) -> Problems:
    evaluation, leakage, total = config.evaluation, config.leakage, config.trainer.total_batch_size
    if not config.trainer.eval_period and changed(evaluation, "online_images"):
        yield "evaluation.online_images", "has no effect with trainer.eval_period=0: it is for kNN during training"
    if config.trainer.eval_period and evaluation.knn_k > evaluation.online_images:
        yield (
            "evaluation.knn_k",
            f"{evaluation.knn_k} neighbours during training among evaluation.online_images={evaluation.online_images}: "
            "all of them vote",
        )
    if leakage.enabled and leakage.max_images < 2 * total:
        yield (
            "leakage.max_images",
            f"{leakage.max_images} images are not two batches of trainer.total_batch_size={total}, which the swap of "
            "batch-mates needs: it is not measured",
        )
