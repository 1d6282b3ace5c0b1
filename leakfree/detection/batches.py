"""The batches of a detection run on this rank, as its config describes them."""

from __future__ import annotations

from leakfree.config.schema import DetectionRunConfig
from leakfree.data import CocoInstances, InstanceLoader, build_eval_loader, build_train_loader
from leakfree.distributed import get_rank, get_world_size

__all__ = ["evaluation_batches", "training_batches"]


def training_batches(
    config: DetectionRunConfig, dataset: CocoInstances, *, max_steps: int, start_step: int = 0, stream: int = 0
) -> InstanceLoader:
    """Batches drawn as in training, the same number on every rank.

    Args:
        stream: 0 is the one that training sees; another number gives other draws from the same images.
    """
    world_size = get_world_size()
    return build_train_loader(
        dataset,
        config.data,
        images_per_rank=config.trainer.total_batch_size // world_size,
        rank=get_rank(),
        world_size=world_size,
        seed=config.seed + stream * 2**32,
        start_step=start_step,
        max_steps=max_steps,
    )


def evaluation_batches(config: DetectionRunConfig, dataset: CocoInstances, max_images: int = 0) -> InstanceLoader:
    """Batches of ``evaluation.images_per_batch`` consecutive images; ranks may get different numbers of them.

    Args:
        max_images: the first so many of the data set; 0 = all.
    """
    return build_eval_loader(
        dataset,
        config.data,
        images_per_batch=config.evaluation.images_per_batch,
        rank=get_rank(),
        world_size=get_world_size(),
        max_images=max_images,
    )
