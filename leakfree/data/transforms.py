"""Resize and flip of an image with its target, as a pure function of the sample and its place in the run.

The usual detection recipe (detectron2, torchvision references): shorter side to ``min_size``, longer side at
most ``max_size``, horizontal flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from leakfree.errors import DataError

__all__ = ["DetectionTransform", "mirrored", "sample_generator"]


def sample_generator(seed: int, draw: int, index: int) -> torch.Generator:
    """Return the random numbers of one sample: a function of the run's seed, the sample's place in the stream
    of training images and its index, so that a resumed run and any number of loader processes draw the same."""
    state = np.random.SeedSequence([1, seed, draw, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class DetectionTransform:
    """Resize keeping the aspect ratio, flip in training, and scale pixels to [0, 1].

    Boxes, masks and areas follow. Boxes are scaled, not re-fitted; masks are resized to the nearest pixel, so the
    mask of a very small object may become empty where its box does not.

    Args:
        min_size: pixels of the shorter side; training draws one per image, tests take the last.
        max_size: pixels of the longer side at most; wins over ``min_size``.
        flip: probability of a horizontal flip in training.
        train: draw sizes and flips.
    """

    def __init__(self, min_size: Sequence[int], max_size: int, flip: float = 0.5, train: bool = False) -> None:
        if not min_size or min(min_size) < 1:
            raise DataError(f"data.min_size is {list(min_size)}; valid: one or more sizes in pixels, from 1")
        self.min_size = tuple(min_size)
        self.max_size = max_size
        self.flip = flip
        self.train = train

    def __call__(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the transformed pair; the given one is left as it is.

        Args:
            image: uint8 (3, H, W).
            target: of :class:`leakfree.data.CocoInstances`.
            generator: of the draws; needed in training.

        Returns:
            float32 (3, H', W') in [0, 1], and the target in its pixels.
        """
        min_size, flip = self.min_size[-1], False
        if self.train:
            if generator is None:
                raise TypeError("a training transform needs a generator: see sample_generator")
            # Both are always drawn, so that a flip does not depend on how many sizes there are.
            min_size = self.min_size[int(torch.randint(len(self.min_size), (), generator=generator))]
            flip = bool(torch.rand((), generator=generator) < self.flip)
        image, target = _resize(image, target, min_size, self.max_size)
        if flip:
            image, target = _flip(image, target)
        return functional.to_dtype(image, torch.float32, scale=True), target


def _resize(image: Tensor, target: dict[str, Any], min_size: int, max_size: int) -> tuple[Tensor, dict[str, Any]]:
    height, width = image.shape[-2:]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    if size == [height, width]:
        return image, target
    y, x = size[0] / height, size[1] / width  # after rounding: what the pixels really went through
    target = {**target, "boxes": target["boxes"] * torch.tensor([x, y, x, y]), "area": target["area"] * (x * y)}
    if "masks" in target:
        masks = target["masks"]
        target["masks"] = (
            functional.resize(masks, size, InterpolationMode.NEAREST_EXACT)
            if len(masks)
            else (masks.new_zeros((0, *size)))
        )
    return functional.resize(image, size, InterpolationMode.BILINEAR, antialias=True), target


def _flip(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    width = image.shape[-1]
    target = {**target, "boxes": torch.stack([width - x1, y0, width - x0, y1], dim=1)}
    if "masks" in target:
        target["masks"] = mirrored(target["masks"])
    return mirrored(image), target


def mirrored(pixels: Tensor) -> Tensor:
    """``pixels.flip(-1)``; torch's starts its threads for it, which takes ten times as long on busy cores."""
    return torch.from_numpy(np.ascontiguousarray(pixels.numpy()[..., ::-1]))
