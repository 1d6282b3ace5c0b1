"""torchvision's RoI heads, with groups for normalization, and sound where a rank has no RoI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from leakfree.detection.groups import RoiGroups

__all__ = ["GroupedRoIHeads"]


class GroupedRoIHeads(RoIHeads):
    """What :func:`build_detector` turns torchvision's ``roi_heads`` into; parameters and names stay the same.

    Attributes:
        groups: how the box head's and (if there is one) the mask head's rows share statistics.
    """

    groups: list[RoiGroups]
    _labels: list[Tensor]
    _logits: Tensor | None

    @classmethod
    def adopt(cls, heads: RoIHeads, images_per_group: int) -> GroupedRoIHeads:
        """Turn ``heads`` into this class in place."""
        heads.__class__ = cls
        heads.groups = [RoiGroups(heads.box_roi_pool, heads.box_head, images_per_group)]
        if heads.has_mask():
            heads.groups.append(RoiGroups(heads.mask_roi_pool, heads.mask_head, images_per_group))
        heads._labels, heads._logits = [], None
        heads.box_predictor.register_forward_hook(heads._note_logits)
        return heads

    def select_training_samples(self, proposals: list[Tensor], targets: Any) -> Any:
        sampled = super().select_training_samples(proposals, targets)
        self._labels = sampled[2]
        return sampled

    def _note_logits(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._logits = output[0].detach() if self.training else None

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        """As torchvision's; a rank without a single RoI has losses of zero (not 0/0) and stays in the graph."""
        detections, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training and not sum(self.groups[0].rows_per_image):
            losses = {name: torch.nan_to_num(loss, nan=0.0) for name, loss in losses.items()}
        return detections, losses

    def training_accuracy(self) -> Tensor:
        """Share of foreground RoIs of the last training forward that were classified right; 0 without any."""
        if self._logits is None or not len(self._logits):
            return torch.zeros(())
        labels = torch.cat(self._labels)
        foreground = labels > 0
        right = (self._logits.argmax(1) == labels) & foreground
        return right.sum() / foreground.sum().clamp(min=1)
