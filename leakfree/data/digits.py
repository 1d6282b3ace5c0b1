"""scikit-learn's bundled digits (``load_digits``: 1,797 of 8 x 8 pixels, UCI), split once for every use of them.

Legend: ink is 1, paper 0.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

__all__ = ["SPLITS", "Split", "digit_images", "digits_by_class", "digits_of", "resize_bilinear"]

Split = Literal["train", "val"]
SPLITS = ("train", "val")
TRAIN_DIGITS = 1200  # of 1797


@functools.cache
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Ink in [0, 1], float64 (1797, 8, 8), and classes (1797,)."""
    from sklearn.datasets import load_digits  # slow to import, and only needed where there are digits

    bunch = load_digits()
    return bunch.images / 16.0, bunch.target


@functools.cache
def digits_of(split: Split) -> np.ndarray:
    """The rows of :func:`digit_images` in a split: one fixed permutation, the same for every seed and every use."""
    order = np.random.default_rng(0).permutation(len(digit_images()[1]))
    return order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]


@functools.cache
def digits_by_class(split: Split) -> list[np.ndarray]:
    """The rows of a split, by class."""
    part = digits_of(split)
    return [part[digit_images()[1][part] == value] for value in range(10)]


def resize_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Resize a square image bilinearly (half-pixel centres, edges held): torch's ``align_corners=False``.

    Element by element instead of a matrix product, whose last bits differ between machines.
    """
    n = len(image)
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(at.astype(np.int64), n - 2)
    share = at - low
    rows = image[low] * (1 - share)[:, None] + image[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share
