"""Which RoIs share statistics in a head: by image, at random, or all of the rank.

The RoI pool is told the proposals of each image; the head that follows sees only rows. The hooks here
carry the number of rows per image from one to the other and open a normalization scope around the
head, without a wrapper module: torchvision's state dict keys stay torchvision's.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from leakfree.partition import Partition, image_partition, normalization_scope
from leakfree.shuffle import GroupDraw

__all__ = ["RoiGroups", "random_partition"]

Grouping = Literal["training", "image", "random", "all"]


class RoiGroups:
    """Opens a normalization scope around each forward of ``head``, grouped by the images of ``pool``.

    Attributes:
        images_per_group: images whose RoIs share statistics in training; 0 = all images of the rank.
        grouping: "training" as ``images_per_group`` says; for measurements "image" (groups of
            ``max(1, images_per_group)`` images), "random" (as many random balanced groups, drawn from
            ``seed`` and a count, over this rank's rows) or "all" (one group).
        rows_per_image: of the last forward of the pool.
    """

    def __init__(self, pool: nn.Module, head: nn.Module, images_per_group: int) -> None:
        self.images_per_group = images_per_group
        self.grouping: Grouping = "training"
        self.seed = 0
        self.rows_per_image: list[int] = []
        self._draws = 0
        self._scopes = ExitStack()
        head.communicates = images_per_group > 1  # type: ignore[assignment]  # in training; precise_bn asks
        pool.register_forward_pre_hook(self._note_rows)
        head.register_forward_pre_hook(self._open)
        head.register_forward_hook(self._close, always_call=True)

    def measure(self, grouping: Grouping, seed: int) -> None:
        """Switch the grouping and restart the count of random draws."""
        self.grouping, self.seed, self._draws = grouping, seed, 0

    def base(self, training: bool) -> Partition | None:
        """The groups of the current rows; None leaves them to the norms (the whole rank).

        Only in training may a group span ranks: evaluations have uneven numbers of batches.
        """
        if self.grouping == "all" or (self.grouping == "training" and not self.images_per_group):
            return None
        by_image = image_partition(self.rows_per_image, max(1, self.images_per_group), across_ranks=training)
        if self.grouping != "random":
            return by_image
        self._draws += 1
        return random_partition(sum(self.rows_per_image), by_image.num_groups, self.seed, self._draws)

    def _note_rows(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.rows_per_image = [len(boxes) for boxes in inputs[1]]  # (features, boxes per image, image shapes)

    def _open(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._scopes.enter_context(normalization_scope(self.base(module.training)))

    def _close(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._scopes.close()


def random_partition(num_rows: int, num_groups: int, seed: int, index: int) -> Partition:
    """Balanced random groups over this rank's rows, from ``seed`` and ``index`` alone."""
    if num_groups < 2:
        return Partition()
    draw = GroupDraw((num_rows,), 0, num_groups, seed, index)
    return Partition(torch.from_numpy(np.ascontiguousarray(draw.groups)), num_groups)
