"""Views of images: distortions of small digits, drawn for a whole batch at once, and lightly's for photographs.

A view is a function of (image, seed, position in the training stream, which of the two): not of the rank, loader
process or batch that makes it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from leakfree.config.schema import ContrastiveDataConfig
from leakfree.errors import DataError
from leakfree.keeping import random_states_kept

__all__ = ["DigitViews", "PhotoViews", "ViewMaker", "build_views"]


class ViewMaker(Protocol):
    """Makes the tensors that an encoder sees, (N, 3, S, S) standardized."""

    def plain(self, images: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
        """The images as they are, squared to the size.

        Args:
            images: float32 (3, H, W) in [0, 1], of any sizes.
            indices: of the images in their split.
        """

    def distorted(self, images: Sequence[Tensor], indices: Sequence[int], draws: Sequence[tuple[int, int]]) -> Tensor:
        """One view of each image; ``draws``: (position in the stream, which view) of each."""


def build_views(config: ContrastiveDataConfig, seed: int, split: str) -> ViewMaker:
    """The views of ``config.views``.

    Args:
        seed: of the views.
        split: "train" or "val": their images have illuminations of their own.
    """
    return (DigitViews if config.views.name == "digits" else PhotoViews)(config, seed, split)


class _Standardized:
    def __init__(self, config: ContrastiveDataConfig, seed: int, split: str) -> None:
        self.settings = config.views
        self.size = config.image_size
        self.seed = seed
        self.split = 0 if split == "train" else 1
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def standardized(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class DigitViews(_Standardized):
    """Small images under random affine maps, contrast and brightness, noise, and a hole.

    Half-widths at ``strength`` s: rotation 25 s degrees, log of the scale 0.3 s, of the aspect 0.15 s, shear 0.25 s,
    shift 0.35 s of half an image, log of the contrast 0.5 s, brightness 0.25 s; Gaussian noise of standard deviation
    0.15 s; with probability s / 2 a hole of 30% of the side. The image is shown at 1 / 1.15 of its size.

    With ``style`` above 0 an illumination takes the place of contrast and brightness:
    ``style * sum_d a_d F_d``, F = 1, cos(pi x), cos(pi y) with x, y in [0, 1]. a of a view is
    ``(A + style_noise * e) / sqrt(1 + style_noise^2)``, where A ~ N(0, 1) belongs to the image and e ~ N(0, 1) to the
    view. It survives the views and tells nothing of the class, as colours of photographs do. All images must have one
    size.
    """

    NUM_STYLES = 3

    def plain(self, images: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
        pixels = self._warped(self._stacked(images, indices), torch.zeros(len(images), 7))
        if self.settings.style:
            pixels = pixels + self._illumination(self._styles(indices))
        return self.standardized(pixels)

    def distorted(self, images: Sequence[Tensor], indices: Sequence[int], draws: Sequence[tuple[int, int]]) -> Tensor:
        s, count, size = self.settings.strength, len(images), self.size
        uniform = np.empty((count, 12), np.float32)
        normal = np.empty((count, self.NUM_STYLES + size * size), np.float32)
        for row, (position, which) in enumerate(draws):
            # A generator for each view, so that a view depends on nothing else.
            generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, 2 * position + which]))
            generator.random(dtype=np.float32, out=uniform[row])
            generator.standard_normal(dtype=np.float32, out=normal[row])
        u, noise = torch.from_numpy(2 * uniform - 1) * s, torch.from_numpy(normal)
        pixels = self._warped(self._stacked(images, indices), u[:, :7])
        if self.settings.style:
            share = self.settings.style_noise
            styles = (self._styles(indices) + share * noise[:, : self.NUM_STYLES]) / (1 + share**2) ** 0.5
            pixels = pixels + self._illumination(styles)
        else:
            pixels = pixels * torch.exp(0.5 * u[:, 7, None, None, None]) + 0.25 * u[:, 8, None, None, None]
        pixels = pixels + 0.15 * s * noise[:, None, self.NUM_STYLES :].view(count, 1, size, size)
        return self.standardized(self._with_holes(pixels, torch.from_numpy(uniform[:, 9:])))

    @staticmethod
    def _stacked(images: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
        for image, index in zip(images, indices, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"views of digits (data.views.name) need images of one size, and image {indices[0]} is "
                    f"{tuple(images[0].shape[1:])}, image {index} {tuple(image.shape[1:])}; use simclr or moco_v2"
                )
        return torch.stack(list(images))

    def _warped(self, images: Tensor, u: Tensor) -> Tensor:
        """Affine maps of whole images; ``u`` (N, 7) in units of the half-widths."""
        angle = u[:, 0] * np.deg2rad(25)
        aspect, scale = 0.15 * u[:, 2], 1.15 * torch.exp(-0.3 * u[:, 1])
        cos, sin = angle.cos(), angle.sin()
        shear = 0.25 * u[:, 3]
        x, y = scale * torch.exp(aspect), scale * torch.exp(-aspect)
        maps = (
            (x * cos, x * (shear * cos - sin), 0.35 * u[:, 4]),
            (y * sin, y * (shear * sin + cos), 0.35 * u[:, 5]),
        )
        across = (2 * torch.arange(self.size) + 1) / self.size - 1  # the centres of pixels, in [-1, 1]
        # Not by F.affine_grid: a matrix product may round a row otherwise for another number of rows beside it.
        parts = [[factor[:, None, None] for factor in line] for line in maps]
        grid = torch.stack([a * across + b * across[:, None] + shift for a, b, shift in parts], 3)
        return F.grid_sample(images, grid, align_corners=False)

    def _styles(self, indices: Sequence[int]) -> Tensor:
        """(N, 3) what belongs to the images: of the split and the index alone, so alike for every seed."""
        return torch.from_numpy(np.array([_style(self.split, index) for index in indices], dtype=np.float32))

    def _illumination(self, styles: Tensor) -> Tensor:
        wave = torch.cos(torch.pi * (torch.arange(self.size) + 0.5) / self.size)
        level, across, down = (styles[:, each, None, None] for each in range(self.NUM_STYLES))
        # Term by term: a matrix product may round a row otherwise for another number of rows beside it.
        return self.settings.style * (level + across * wave + down * wave[:, None])[:, None]

    def _with_holes(self, pixels: Tensor, uniform: Tensor) -> Tensor:
        side = max(1, round(0.3 * self.size))
        at = (uniform[:, 1:] * (self.size - side + 1)).floor()
        place = torch.arange(self.size)
        rows, columns = ((place >= at[:, axis, None]) & (place < at[:, axis, None] + side) for axis in (0, 1))
        hole = (
            rows[:, None, :, None]
            & columns[:, None, None, :]
            & (uniform[:, 0] < self.settings.strength / 2)[:, None, None, None]
        )
        return pixels.masked_fill(hole, 0.0)


@functools.cache  # a digit comes again in every epoch
def _style(split: int, index: int) -> np.ndarray:
    return np.random.default_rng([6, split, index]).standard_normal(DigitViews.NUM_STYLES)


class PhotoViews(_Standardized):
    """lightly's views of SimCLR (Chen et al. 2020, appendix A) or MoCo v2 (Chen et al. 2020b), one image at a time."""

    def __init__(self, config: ContrastiveDataConfig, seed: int, split: str) -> None:
        from lightly.transforms import MoCoV2Transform, SimCLRTransform

        super().__init__(config, seed, split)
        settings = config.views
        make = SimCLRTransform if settings.name == "simclr" else MoCoV2Transform
        self.transform = make(
            input_size=config.image_size,
            cj_strength=settings.strength,
            min_scale=settings.min_crop,
            hf_prob=settings.flip,
            gaussian_blur=settings.blur,
            normalize={"mean": list(config.mean), "std": list(config.std)},
        ).transforms[0]

    def plain(self, images: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
        return self.standardized(torch.stack([self._squared(image) for image in images]))

    def _squared(self, image: Tensor) -> Tensor:
        side = min(image.shape[-2:])
        image = functional.center_crop(image, [side, side])
        if side == self.size:
            return image
        return functional.resize(image, [self.size, self.size], InterpolationMode.BILINEAR, antialias=True)

    def distorted(self, images: Sequence[Tensor], indices: Sequence[int], draws: Sequence[tuple[int, int]]) -> Tensor:
        views = []
        with random_states_kept():  # lightly draws from the global generators
            for image, (position, which) in zip(images, draws, strict=True):
                words = np.random.SeedSequence([self.seed, position, which]).generate_state(3)
                torch.default_generator.manual_seed(int(words[0]))
                np.random.seed(words[1])
                random.seed(int(words[2]))
                views.append(self.transform(functional.to_pil_image(image)))
        return torch.stack(views)
