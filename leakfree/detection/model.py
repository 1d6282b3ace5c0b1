"""Mask R-CNN from a config: torchvision's model with chosen norms, heads and RoI shuffling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, RPNHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from leakfree.config.schema import BoxHeadConfig, DetectionModelConfig, DetectionRunConfig, MaskHeadConfig
from leakfree.detection.backbones import build_backbone
from leakfree.detection.groups import RoiGroups
from leakfree.detection.roi_heads import GroupedRoIHeads
from leakfree.errors import ConfigError
from leakfree.norms import PartitionedBatchNorm, batch_statistics, norm_layer
from leakfree.shuffle import Shuffled
from leakfree.state import freeze_parts

__all__ = [
    "build_detector",
    "describe_batch",
    "has_batch_statistics",
    "roi_groups",
    "statistics_mode",
    "training_targets",
]

_BOX_SEED, _MASK_SEED = 0, 1  # heads draw their groups apart


def build_detector(config: DetectionRunConfig, num_classes: int) -> FasterRCNN:
    """Build the detector of ``config.model`` for ``num_classes`` classes (background not counted).

    With the schema's defaults it is ``torchvision.models.detection.maskrcnn_resnet50_fpn``, with the
    same parameter names and, from the same random state, the same weights. In training the images
    must come resized from the loader; in eval the model resizes and maps its results back.
    Checkpoints are not loaded here: see :func:`leakfree.state.load_weights`.

    Raises:
        ConfigError: a norm, option or submodule name that does not exist, or freezing random weights.
    """
    model = config.model
    _check_freezing(model)
    backbone: Any = build_backbone(model.backbone)
    names = list(getattr(backbone, "feature_names", ["0", "1", "2", "3"]))
    channels: int = backbone.out_channels
    parts: dict[str, Any] = {"box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)}
    if model.mask_head.enabled:  # before the box head, as torchvision builds them: same draws of weights
        mask = model.mask_head
        parts["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
        parts["mask_head"] = _mask_head(mask, channels, config.seed)
        parts["mask_predictor"] = MaskRCNNPredictor(mask.conv_dim, mask.conv_dim, num_classes + 1)
    parts["rpn_anchor_generator"] = anchors = _anchors(model, names)
    parts["rpn_head"] = RPNHead(channels, anchors.num_anchors_per_location()[0])
    parts["box_head"] = _box_head(model.box_head, channels, config.seed)
    parts["box_predictor"] = FastRCNNPredictor(model.box_head.fc_dim, num_classes + 1)
    detector = (MaskRCNN if model.mask_head.enabled else FasterRCNN)(
        backbone,
        min_size=tuple(config.data.min_size),
        max_size=config.data.max_size,
        _skip_resize=True,
        **_settings(model),
        **parts,
    )
    GroupedRoIHeads.adopt(detector.roi_heads, model.images_per_group)
    freeze_parts(detector, model.freeze)
    return detector


def roi_groups(model: Any) -> list[RoiGroups]:
    """The groupings of the box head and (if there is one) the mask head."""
    return list(model.roi_heads.groups)


def _check_freezing(model: DetectionModelConfig) -> None:
    key = "model.freeze" if model.freeze else "model.backbone.freeze_at" if model.backbone.freeze_at else ""
    if key and not model.weights:
        raise ConfigError(f"{key}: freezing random weights trains nothing useful; set model.weights to a checkpoint")


def _anchors(model: DetectionModelConfig, names: list[str]) -> AnchorGenerator:
    num_maps = len(names) + (1 if len(names) > 1 else 0)  # an FPN adds a pooled map
    sizes = model.rpn.anchor_sizes or [[size] for size in (32, 64, 128, 256, 512)[:num_maps]]
    if len(sizes) != num_maps:
        raise ConfigError(
            f"model.rpn.anchor_sizes: {len(sizes)} lists for the {num_maps} feature maps of "
            f"backbone {model.backbone.name}; give one list of sizes per map"
        )
    return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(model.rpn.aspect_ratios),) * num_maps)


def _settings(model: DetectionModelConfig) -> dict[str, Any]:
    box, rpn = model.box_head, model.rpn
    return {
        "image_mean": list(model.image_mean),
        "image_std": list(model.image_std),
        "rpn_pre_nms_top_n_train": rpn.pre_nms_top_n_train,
        "rpn_pre_nms_top_n_test": rpn.pre_nms_top_n_test,
        "rpn_post_nms_top_n_train": rpn.post_nms_top_n_train,
        "rpn_post_nms_top_n_test": rpn.post_nms_top_n_test,
        "rpn_nms_thresh": rpn.nms_threshold,
        "box_batch_size_per_image": box.batch_size_per_image,
        "box_positive_fraction": box.positive_fraction,
        "box_score_thresh": box.score_threshold,
        "box_nms_thresh": box.nms_threshold,
        "box_detections_per_img": box.detections_per_image,
    }


def _head_norm(config: BoxHeadConfig | MaskHeadConfig, key: str, seed: int) -> tuple[str, dict[str, Any]]:
    """The norm and options of a head, with ``roi_shuffle: statistics`` turned into ShuffleBN."""
    name, options = config.norm, dict(config.norm_options)
    if config.roi_shuffle == "statistics":
        if name not in ("BN", "ShuffleBN"):
            raise ConfigError(
                f"model.{key}.roi_shuffle: 'statistics' shuffles batch norms; model.{key}.norm is {name!r}, not BN"
            )
        name = "ShuffleBN"
    if name == "ShuffleBN":
        options.setdefault("seed", seed)
    return name, options


def _shuffled(head: nn.Module, config: BoxHeadConfig | MaskHeadConfig, seed: int) -> nn.Module:
    return Shuffled(head, seed=seed) if config.roi_shuffle == "features" else head


def _box_head(config: BoxHeadConfig, channels: int, seed: int) -> nn.Module:
    seed = 2 * seed + _BOX_SEED
    if config.name == "2fc":
        return _shuffled(TwoMLPHead(channels * 7 * 7, config.fc_dim), config, seed)
    name, options = _head_norm(config, "box_head", seed)
    head = FastRCNNConvFCHead(
        (channels, 7, 7),
        [config.conv_dim] * config.num_convs,
        [config.fc_dim],
        norm_layer(name, options, "model.box_head"),
    )
    return _shuffled(head, config, seed)


def _mask_head(config: MaskHeadConfig, channels: int, seed: int) -> nn.Module:
    seed = 2 * seed + _MASK_SEED
    name, options = _head_norm(config, "mask_head", seed)
    head = MaskRCNNHeads(
        channels, [config.conv_dim] * config.num_convs, 1, norm_layer(name, options, "model.mask_head")
    )
    return _shuffled(head, config, seed)


def training_targets(targets: Iterable[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Targets for the losses: crowd regions left out (torchvision would train on them as objects)."""
    kept: list[dict[str, Tensor]] = []
    for target in targets:
        keep = target["iscrowd"] == 0
        kept.append({key: value[keep] for key, value in target.items() if key in ("boxes", "labels", "masks")})
    return kept


def has_batch_statistics(model: Any) -> bool:
    """Whether a RoI head normalizes with batch statistics, at least until frozen by a schedule."""
    return any(isinstance(module, PartitionedBatchNorm) for module in model.roi_heads.modules())


@contextmanager
def statistics_mode(model: Any, mode: str, *, seed: int = 0) -> Iterator[None]:
    """Evaluate the RoI heads under one kind of statistics; the same weights otherwise.

    Args:
        mode: "population" or "precise" (the model as it is: stored buffers, whatever filled them; a BatchStatBN
            head uses the batch's own), "image"
            (mini-batch statistics of the images a training group holds, at least one), "random" (of
            as many random groups over the rank's images), "all" (of all of them).
        seed: of the random groups.
    """
    groups = roi_groups(model)
    if mode in ("population", "precise"):
        yield
        return
    before = [item.grouping for item in groups]
    try:
        for item in groups:
            item.measure(mode, seed)  # type: ignore[arg-type]
        with batch_statistics(model.roi_heads):
            yield
    finally:
        for item, grouping in zip(groups, before, strict=True):
            item.measure(grouping, seed)


def describe_batch(config: DetectionRunConfig, world_size: int) -> dict[str, Any]:
    """The three batch sizes: total and per rank in images, and what each part normalizes together."""
    total = config.trainer.total_batch_size
    per_rank = total // world_size
    model = config.model
    images = min(model.images_per_group or per_rank, total)

    def head(part: BoxHeadConfig | MaskHeadConfig) -> str:
        given = part.norm_options.get("num_groups") if part.norm == "ShuffleBN" else None
        num_groups = given or (-(-total // images) if model.images_per_group else max(2, world_size))
        if part.norm == "SyncBN":
            return f"{total} images"
        if part.norm == "ShuffleBN" or (part.norm == "BN" and part.roi_shuffle != "none"):
            return f"RoIs dealt at random into {num_groups} groups over {total} images"
        if part.norm in ("BN", "BatchStatBN"):
            return f"{images} image{'s' if images > 1 else ''}"
        return {"GhostBN": f"{part.norm_options.get('group_size')} RoIs"}.get(part.norm, "each RoI alone")

    normalization = {"box head": head(model.box_head)}
    if model.mask_head.enabled:
        normalization["mask head"] = head(model.mask_head)
    return {"total": total, "per_rank": per_rank, "normalization": normalization}
