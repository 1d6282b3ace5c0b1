"""Image classifiers from a config: a small one for CPUs, and torchvision's ResNets, with chosen norms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torchvision
from torch import Tensor, nn

from leakfree.config.schema import ClassificationModelConfig, ClassificationRunConfig
from leakfree.errors import ConfigError
from leakfree.norms import (
    DomainBatchNorm,
    GhostBatchNorm,
    PartitionedBatchNorm,
    ShuffleBatchNorm,
    SyncBatchNorm,
    attach_convolutions,
    convert_norms,
    domain,
    image_partition,
    norm_layer,
    normalization_scope,
    replace_norm_activation_pairs,
    substitute_block_norms,
)
from leakfree.norms.registry import check_options
from leakfree.state import freeze_parts

__all__ = ["SmallClassifier", "build_classifier", "classify", "describe_batch"]


class SmallClassifier(nn.Module):
    """Three 3x3 convolutions (32, 32 and 64 channels, strides 1, 2, 2), each with a norm and a ReLU; means over the
    four quarters of the image, where a batch norm cannot hide what a whole group has in common; a linear layer.

    Input (N, 3, S, S) with S >= 5, output (N, num_classes).
    """

    def __init__(self, num_classes: int, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 1), (32, 2), (64, 2)):
            layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=norm is None))
            layers += [norm(width)] if norm is not None else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * channels, num_classes)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(images)).flatten(1))


def build_classifier(config: ClassificationRunConfig, num_classes: int, domains: list[str]) -> nn.Module:
    """Build the classifier of ``config.model``; a ResNet has torchvision's parameter names and initial weights.

    In training, ``model.images_per_group`` consecutive images share statistics, over the ranks if need be.
    Checkpoints are not loaded here: see :func:`leakfree.state.load_weights`.

    Args:
        domains: names of the corruptions of the training images: what a DomainBN tells apart.

    Raises:
        ConfigError: a norm, option or submodule name that does not exist, or freezing random weights.
    """
    settings = config.model
    if settings.freeze and not settings.weights:
        raise ConfigError(
            "model.freeze: freezing random weights trains nothing useful; set model.weights to a checkpoint"
        )
    options = _options(config, domains)
    proxied = settings.norm == "ProxyNorm"  # takes the place of a norm and of the activation behind it
    if proxied:
        check_options(settings.norm, options, "model")
    norm = norm_layer("BN", {}, "model") if proxied else norm_layer(settings.norm, options, "model")
    if settings.name == "small":
        model: nn.Module = SmallClassifier(num_classes, norm)
    else:
        model = getattr(torchvision.models, settings.name)(num_classes=num_classes, norm_layer=norm)
    if settings.block_norm != "none":
        try:
            substitute_block_norms(model, settings.block_norm, **settings.block_norm_options)
        except ConfigError as error:
            raise ConfigError(f"model.block_norm: {error}") from None
    if proxied:
        _replace_by_proxies(model, options)
    if settings.norm == "CBN":
        attach_convolutions(model)
    freeze_parts(model, settings.freeze)
    if settings.images_per_group:
        _ImageGroups(model, settings.images_per_group)
    return model


def _options(config: ClassificationRunConfig, domains: list[str]) -> dict[str, Any]:
    """The options of the norm, with what it can take from the rest of the config."""
    settings: ClassificationModelConfig = config.model
    options = dict(settings.norm_options)
    if settings.norm == "ShuffleBN":
        options.setdefault("seed", config.seed)
    if settings.norm == "DomainBN":
        if options.setdefault("num_domains", len(domains)) != len(domains):
            raise ConfigError(
                f"model.norm_options.num_domains: is {options['num_domains']}, but data.train.corruptions names "
                f"{len(domains)} ({', '.join(domains)}); leave it out, or change one of the two"
            )
        options.setdefault("domain_names", domains)
    return options


def _replace_by_proxies(model: nn.Module, options: dict[str, Any]) -> None:
    """Put ProxyNorms in the place of norms and activations; where no activation follows, their LN or GN alone."""
    kind = options.get("norm", "LN")
    try:
        if "model" in options:  # the name of an argument, beside which any option is passed on
            raise ConfigError("norm ProxyNorm has no option 'model'")
        replace_norm_activation_pairs(model, **options)
        if any(isinstance(module, PartitionedBatchNorm) for module in model.modules()):
            groups = {"num_groups": options["num_groups"]} if kind == "GN" and "num_groups" in options else {}
            convert_norms(model, kind, **groups)
    except ConfigError as error:
        raise ConfigError(f"model.norm_options: {error}") from None


class _ImageGroups:
    """Opens a normalization scope around each training forward of ``model``, without a wrapper module: torchvision's
    state dict keys stay torchvision's. In eval the batch is the group."""

    def __init__(self, model: nn.Module, images_per_group: int) -> None:
        self.images_per_group = images_per_group
        self._scopes = ExitStack()
        model.communicates = images_per_group > 1  # type: ignore[assignment]  # in training; precise_bn asks
        model.register_forward_pre_hook(self._open)
        model.register_forward_hook(self._close, always_call=True)

    def _open(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        base = image_partition([1] * len(inputs[0]), self.images_per_group) if module.training else None
        self._scopes.enter_context(normalization_scope(base))

    def _close(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._scopes.close()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The outputs (N, classes) for a batch of (images, labels, domains), on the model's device and in its dtype."""
    parameter = next(model.parameters())
    with domain(batch[2]):
        return model(batch[0].to(parameter.device, parameter.dtype))


def describe_batch(config: ClassificationRunConfig, model: nn.Module, world_size: int) -> dict[str, Any]:
    """The three batch sizes: total and per rank in images, and what the model normalizes together in training."""
    total = config.trainer.total_batch_size
    per_rank = total // world_size
    images = config.model.images_per_group or per_rank
    norms = [module for module in model.modules() if isinstance(module, PartitionedBatchNorm) and not module.frozen]
    together = f"{images} images"
    if not norms:
        together = "each image alone"
    elif isinstance(norm := norms[0], SyncBatchNorm):
        together = f"{total} images"
    elif isinstance(norm, ShuffleBatchNorm):
        num_groups = norm.num_groups or (-(-total // images) if config.model.images_per_group else max(2, world_size))
        together = f"images dealt at random into {num_groups} groups over {total}"
    elif isinstance(norm, DomainBatchNorm):
        together = f"the images of a domain among {total if norm.across_ranks else per_rank}"
    elif isinstance(norm, GhostBatchNorm):
        together = f"{norm.group_size} images"
    return {"total": total, "per_rank": per_rank, "normalization": {"model": together}}
