"""The batches of a classification run on this rank, as its config describes them."""

from __future__ import annotations

import numpy as np

from leakfree.config.schema import ClassificationRunConfig
from leakfree.data import LabelledImages, LabelledLoader, build_image_loader, compose_batches, training_sampler
from leakfree.data.labelled import Composition
from leakfree.distributed import get_rank, get_world_size

__all__ = ["composed_batches", "evaluated_images", "training_batches"]


def training_batches(
    config: ClassificationRunConfig, images: LabelledImages, *, max_steps: int, start_step: int = 0, stream: int = 0
) -> LabelledLoader:
    """Batches drawn and composed as in training, the same number on every rank.

    Args:
        stream: 0 is the one that training sees; another number gives other draws from the same images.
    """
    world_size, seed = get_world_size(), config.seed + stream * 2**32
    sampler = training_sampler(
        images,
        config.data,
        images_per_rank=config.trainer.total_batch_size // world_size,
        rank=get_rank(),
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        max_steps=max_steps,
    )
    return build_image_loader(images, config.data, sampler, seed=seed)


def composed_batches(
    config: ClassificationRunConfig,
    images: LabelledImages,
    composition: Composition,
    max_images: int = 0,
    corruption: str | None = None,
) -> LabelledLoader:
    """Batches of about ``evaluation.images_per_batch`` images, each image once; ranks may get different numbers.

    A class with a single image is left out of "same_class": it has nothing to share statistics with.

    Args:
        max_images, corruption: which images; see :func:`evaluated_images`.
    """
    chosen = evaluated_images(images, max_images, corruption)
    if composition == "same_class":
        counts = np.bincount(images.labels[chosen], minlength=len(images.classes))
        chosen = chosen[counts[images.labels[chosen]] > 1]
    batches = compose_batches(
        images.labels[chosen],
        composition,
        config.evaluation.images_per_batch,
        seed=config.leakage.seed,
        rank=get_rank(),
        world_size=get_world_size(),
    )
    return build_image_loader(images, config.data, [chosen[batch].tolist() for batch in batches])


def evaluated_images(images: LabelledImages, max_images: int = 0, corruption: str | None = None) -> np.ndarray:
    """The indices of the images that an evaluation takes, int64 (n,).

    Args:
        max_images: so many of the data set, spread over it evenly; 0 = all.
        corruption: of these, those with this corruption; None = all.
    """
    count = min(max_images or len(images), len(images))
    chosen = np.arange(count) * len(images) // count  # a folder is sorted by class: its first images are of one
    if corruption is None:
        return chosen
    return chosen[[images.corruption_of(int(index)) == corruption for index in chosen]]
