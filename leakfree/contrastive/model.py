"""The method of a config: encoders with chosen norms, heads of lightly, who shares statistics with whom."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from torch import nn

from leakfree.config.schema import ContrastiveRunConfig
from leakfree.contrastive.backbones import build_backbone, convert_batch_norms
from leakfree.contrastive.methods import ContrastiveMethod, Encoder, MoCo, SimCLR
from leakfree.contrastive.mitigation import Mitigation
from leakfree.errors import ConfigError
from leakfree.norms import PartitionedBatchNorm
from leakfree.shuffle.plan import mix_seed
from leakfree.state import evaluating, freeze_parts

__all__ = ["build_contrastive", "describe_batch", "mitigations"]

LOG = logging.getLogger("leakfree.contrastive")


def mitigations(config: ContrastiveRunConfig) -> tuple[Mitigation, Mitigation]:
    """Who shares statistics in the forwards of queries and keys."""
    settings = config.model
    ghost_size = settings.norm_options.get("group_size", 0)
    names = settings.query, settings.query if settings.key == "same" else settings.key
    query, key = (
        Mitigation(name, settings.images_per_group, ghost_size, mix_seed(config.seed, salt))
        for salt, name in enumerate(names)  # two shuffles of one seed would deal both into the same groups
    )
    return query, key


def build_contrastive(config: ContrastiveRunConfig) -> ContrastiveMethod:
    """Build the method of ``config.model``. ``query.backbone`` has the names of the library it comes from.

    Checkpoints are not loaded here: see :func:`leakfree.state.load_weights`.

    Raises:
        ConfigError: a backbone, option or submodule that does not exist, freezing random weights, or images of a size
            that the backbone does not take.
    """
    settings = config.model
    if settings.freeze and not settings.weights:
        raise ConfigError(
            "model.freeze: freezing random weights trains nothing useful; set model.weights to a checkpoint"
        )
    query, key = mitigations(config)
    options = {name: value for name, value in settings.norm_options.items() if name != "group_size"}
    backbone, width = build_backbone(settings.backbone, query.norm, options, stem=settings.stem)
    head = _head(config, width)
    convert_batch_norms(head, query.norm, options)
    _check_features(backbone, width, config)
    encoder = Encoder(backbone, head)
    if settings.method == "simclr":
        model: ContrastiveMethod = SimCLR(encoder, query, key, settings.temperature)
    else:
        statistics = settings.teacher_statistics
        if statistics == "auto":
            statistics = "ema" if key.name == "eman" else "own"
        model = MoCo(
            encoder,
            query,
            key,
            settings.temperature,
            feature_dim=settings.feature_dim,
            queue_size=settings.queue_size,
            momentum=settings.momentum,
            momentum_end=settings.momentum_end or None,
            max_steps=config.schedule.max_steps,
            teacher_statistics=statistics,
        )
    if query.shares and not any(isinstance(module, PartitionedBatchNorm) for module in model.modules()):
        LOG.warning("model.query: %s has no effect: %s has no batch norms", query.name, settings.backbone)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    freeze_parts(model, settings.freeze)
    return model


def _check_features(backbone: nn.Module, width: int, config: ContrastiveRunConfig) -> None:
    """Some networks are built for one image size, others shrink small images to nothing."""
    name, size = config.model.backbone, config.data.image_size
    try:
        with evaluating(backbone):
            found = backbone(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:  # whatever the library says then
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data.image_size: {name} (model.backbone) does not take images of {size} x {size} pixels: {reason}"
        ) from error
    if not isinstance(found, torch.Tensor) or found.flatten(1).shape != (1, width):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(f"model.backbone: {name} gives no {width} features of an image but {shape}; use another")


def _head(config: ContrastiveRunConfig, width: int) -> nn.Module:
    settings = config.model
    if settings.head == "linear":
        return nn.Linear(width, settings.feature_dim)
    make: Any = SimCLRProjectionHead if settings.method == "simclr" else MoCoProjectionHead
    head: nn.Module = make(width, settings.hidden_dim or width, settings.feature_dim)
    return head


def describe_batch(config: ContrastiveRunConfig, world_size: int) -> dict[str, Any]:
    """The three batch sizes: total and per rank in images, and what each encoder normalizes together in training."""
    total = config.trainer.total_batch_size
    per_rank = total // world_size
    query, key = mitigations(config)
    together = {"query": query.describe(total, per_rank), "key": key.describe(total, per_rank)}
    return {"total": total, "per_rank": per_rank, "normalization": together}
