"""COCO box and mask AP of a detector, gathered over ranks.

The arithmetic is faster-coco-eval's (a C++ twin of pycocotools) through torchmetrics. Ours is what
torchmetrics does not do: torchvision's outputs as they come, ranks with uneven or no images, images
that a padding sampler repeats, and None instead of -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from leakfree.distributed import all_gather_objects, broadcast_object, get_rank
from leakfree.errors import LeakfreeError

__all__ = ["CocoAp"]

_METRICS = {
    "map": "AP",
    "map_50": "AP50",
    "map_75": "AP75",
    "map_small": "APs",
    "map_medium": "APm",
    "map_large": "APl",
}
# torchmetrics keeps one entry per image in each of these; masks are already RLE there.
_TENSORS = (
    "detection_box", "detection_scores", "detection_labels",
    "groundtruth_box", "groundtruth_labels", "groundtruth_crowds", "groundtruth_area",
)  # fmt: skip
_MASKS = ("detection_mask", "groundtruth_mask")


class CocoAp:
    """Average precision as the COCO benchmark defines it: 10 IoU thresholds, 101 recall points, 100 detections.

    Detections beyond the 100 best of an image do not count. Sizes go by the target's ``area`` (of the
    mask where none is given, or of the box without masks): small < 32**2 <= medium < 96**2 <= large,
    in pixels. Matches with a crowd are ignored: neither right nor wrong.

    Across ranks: every rank calls :meth:`compute`, with any number of images, none included, and gets
    the same numbers. If every target has an ``image_id``, images are evaluated in the order of their ids
    and an image seen twice counts once, so the result depends neither on the number of ranks nor on a
    sampler that pads.

    Args:
        with_masks: evaluate masks as well as boxes.
    """

    def __init__(self, with_masks: bool) -> None:
        self.with_masks = with_masks
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._metric = self._new_metric()
        self._ids: list[int | None] = []

    def update(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        """Add images; one dict per image in each list, on any device.

        Args:
            predictions: ``boxes`` (D, 4) as x1, y1, x2, y2 in pixels, ``scores`` (D,), ``labels`` (D,), and
                ``masks`` (D, 1, H, W) or (D, H, W): probabilities, set where > 0.5, or 0/1.
            targets: ``boxes``, ``labels``, ``masks`` (T, H, W) of 0/1, and if known ``iscrowd`` (T,),
                ``area`` (T,) in square pixels, ``image_id``.

        Raises:
            LeakfreeError: lists or tensors of different lengths, or a missing key.
        """
        plain_predictions = [self._plain(item, ("boxes", "scores", "labels")) for item in predictions]
        plain_targets = [self._plain(item, ("boxes", "labels")) for item in targets]
        try:
            self._metric.update(plain_predictions, plain_targets)
        except ValueError as error:
            raise LeakfreeError(f"CocoAp: {error}") from None
        self._ids += [int(item["image_id"]) if "image_id" in item else None for item in targets]

    def compute(self) -> dict[str, float | None]:
        """Evaluate all images of all ranks.

        Returns:
            ``bbox/AP``, ``bbox/AP50``, ``bbox/AP75``, ``bbox/APs``, ``bbox/APm``, ``bbox/APl``, and the same for
            ``segm/`` with masks: shares in [0, 1], or None where there is no object (of that size) to find.
        """
        everyone = all_gather_objects(self._pack())
        result: dict[str, float | None] = {}
        error: Exception | None = None
        if get_rank() == 0:
            try:
                result = self._evaluate(everyone)
            except Exception as caught:  # told to the ranks that wait, then raised
                error = caught
        result, told = broadcast_object((result, None if error is None else repr(error)))
        if error is not None:
            raise error
        if told is not None:
            raise RuntimeError(f"CocoAp: rank 0 failed: {told}")
        return result

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("bbox", "segm") if self.with_masks else ("bbox",)

    def _new_metric(self) -> MeanAveragePrecision:
        # torchmetrics' own synchronization loses masks on uneven ranks, hence ours
        metric = MeanAveragePrecision(
            iou_type=self._kinds,  # type: ignore[arg-type]
            backend="faster_coco_eval",
            # torchmetrics' own are float32: its recall 0.6 lies above 3 / 5, so small sets lose up to 0.001 AP
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False
        return metric

    def _plain(self, item: dict[str, Tensor], needed: tuple[str, ...]) -> dict[str, Tensor]:
        """``item`` as torchmetrics wants it, on the CPU; in float64, x2 - x1 of float32 boxes is exact."""
        needed = (*needed, "masks") if self.with_masks else needed
        missing = [key for key in needed if key not in item]
        if missing:
            kind = "a prediction" if "scores" in needed else "a target"
            raise LeakfreeError(f"CocoAp: {kind} lacks {', '.join(missing)}; it has {', '.join(sorted(item))}")
        plain = {"boxes": item["boxes"].detach().double().cpu().reshape(-1, 4)}
        for key, dtype in (
            ("labels", torch.int64),
            ("iscrowd", torch.int64),
            ("scores", torch.float64),
            ("area", torch.float64),
        ):
            if key in item:
                plain[key] = item[key].detach().to("cpu", dtype)
        if self.with_masks:
            plain["masks"] = _binary(item["masks"].detach()).cpu()
        return plain

    def _pack(self) -> dict[str, Any]:
        """This rank's images in few objects: one tensor and its row counts for thousands of small ones."""
        packed: dict[str, Any] = {"ids": self._ids}
        for name in _TENSORS:
            rows = getattr(self._metric, name)
            packed[name] = (torch.cat(rows) if rows else torch.zeros(0), [len(row) for row in rows])
        for name in _MASKS:
            packed[name] = getattr(self._metric, name)
        return packed

    def _evaluate(self, everyone: list[dict[str, Any]]) -> dict[str, float | None]:
        metric = self._new_metric()
        metric.update([], [])  # else it warns that it was never updated
        order = _order([image for packed in everyone for image in packed["ids"]])
        for name in (*_TENSORS, *(_MASKS if self.with_masks else ())):
            parts = [packed[name] if name in _MASKS else _split(*packed[name]) for packed in everyone]
            images = list(chain.from_iterable(parts))
            setattr(metric, name, [images[position] for position in order])
        values = metric.compute()
        result: dict[str, float | None] = {}
        for kind in self._kinds:
            for theirs, ours in _METRICS.items():
                value = float(values[f"{kind}_{theirs}" if self.with_masks else theirs])
                result[f"{kind}/{ours}"] = value if value >= 0 else None  # -1: nothing of that kind to find
        return result


def _split(rows: Tensor, counts: list[int]) -> list[Tensor]:
    return list(rows.split(counts)) if counts else []


def _binary(masks: Tensor) -> Tensor:
    """(D, 1, H, W) or (D, H, W) probabilities or 0/1 -> (D, H, W) bool, on the device they are on."""
    masks = masks[:, 0] if masks.ndim == 4 else masks
    return masks > 0.5 if masks.is_floating_point() else masks.bool()


def _order(ids: list[int | None]) -> list[int]:
    """Positions in the order of the images' ids, each id once; as they come if any has none."""
    known = [image for image in ids if image is not None]
    if len(known) < len(ids):
        return list(range(len(ids)))
    first = {image: position for position, image in reversed(list(enumerate(known)))}
    return [first[image] for image in sorted(first)]
