"""Feature extractors for the detector: a small one for CPUs, and torchvision's ResNet-FPN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from leakfree.config.schema import BackboneConfig
from leakfree.errors import ConfigError
from leakfree.norms import PartitionedBatchNorm, norm_layer

__all__ = ["SmallBackbone", "build_backbone"]


class SmallBackbone(nn.Module):
    """Three 3x3 convolutions, stride 4, receptive field 15 pixels: an RoI cannot see its neighbours.

    Output: one feature map "0" of shape (N, 64, H/4, W/4).
    """

    out_channels = 64
    feature_names = ("0",)

    def __init__(self, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((24, 2), (48, 2), (self.out_channels, 1)):
            layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=norm is None))
            layers += [norm(width)] if norm is not None else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.body = nn.Sequential(*layers)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return OrderedDict([("0", self.body(images))])


def build_backbone(config: BackboneConfig) -> nn.Module:
    """Build the backbone of ``config``; frozen stages keep their statistics as well as their weights."""
    if config.name == "small":
        if config.freeze_at:
            raise ConfigError(
                "model.backbone.freeze_at: the small backbone has no stages; freeze it whole: model.freeze=[backbone]"
            )
        return SmallBackbone(norm_layer(config.norm, config.norm_options, "model.backbone"))
    norm = norm_layer(config.norm, config.norm_options, "model.backbone")
    if norm is None:
        raise ConfigError(
            "model.backbone.norm: 'none' is only for the small backbone; a ResNet needs BN, FrozenBN, GN, ..."
        )
    backbone = resnet_fpn_backbone(
        backbone_name=config.name.removesuffix("_fpn"),
        weights=None,
        norm_layer=norm,
        trainable_layers=5 - config.freeze_at,
    )
    stages = ["bn1", "layer1", "layer2", "layer3", "layer4"][: config.freeze_at]
    for stage in stages:
        for module in getattr(backbone.body, stage).modules():
            if isinstance(module, PartitionedBatchNorm):
                module.frozen = True
    return backbone
