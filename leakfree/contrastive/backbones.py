"""Backbones by name: a small one for CPUs, torchvision's and timm's models, with chosen norms."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn

from leakfree.errors import ConfigError
from leakfree.norms import convert_norms, norm_layer

__all__ = ["SmallBackbone", "build_backbone", "convert_batch_norms"]

_HEADS = ("fc", "classifier", "head", "heads")  # where torchvision's models keep their classifier


class _SmallBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class SmallBackbone(nn.Module):
    """A 3x3 convolution of 16 channels, then a residual block each of 16, 32 (stride 2) and 64 (stride 2) channels,
    and the mean over positions: (N, 3, S, S) -> (N, 64). About 75,000 weights."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _SmallBlock(16, 16, 1, norm)
        self.layer2 = _SmallBlock(16, 32, 2, norm)
        self.layer3 = _SmallBlock(32, 64, 2, norm)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def build_backbone(name: str, norm: str, options: dict[str, Any], *, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """A network without its last linear layer, images (N, 3, H, W) -> features (N, D), or (N, D, 1, 1), and D.

    Names of parameters and buffers are those of the library it comes from, so that weights go back there.

    Args:
        name: "small", a classification model of torchvision ("resnet50"), or "timm/NAME" of timm.
        norm, options: of :data:`leakfree.norms.NORMS`; they take the place of the model's batch norms.
        stem: "small_images" gives a ResNet of torchvision the stem for 32 x 32 pixels: a 3x3 convolution of
            stride 1, and no pooling (He et al. 2016, section 4.2).

    Raises:
        ConfigError: a name that nobody knows, timm missing, a stem for what is not a ResNet; names the key.
    """
    if stem == "small_images" and not (name.startswith("resnet") and name in torchvision.models.list_models()):
        raise ConfigError(f"model.stem: small_images is for the ResNets of torchvision, and model.backbone is {name}")
    if name == "small":
        layer = norm_layer(norm, options, "model")
        assert layer is not None
        return SmallBackbone(layer), 64
    model, width = _from_timm(name) if name.startswith("timm/") else _from_torchvision(name)
    if stem == "small_images":
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    convert_batch_norms(model, norm, options)
    return model, width


def convert_batch_norms(model: nn.Module, norm: str, options: dict[str, Any]) -> None:
    """Put the norm of the config in the place of the model's batch norms, if it has any.

    Raises:
        ConfigError: an option that the norm does not take.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        try:
            convert_norms(model, norm, **options)
        except ConfigError as error:
            raise ConfigError(f"model.norm_options: {error}") from None


def _from_torchvision(name: str) -> tuple[nn.Module, int]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"model.backbone: unknown {name!r}; use small, timm/NAME, or a model of torchvision; "
            f"near: {_near(name, known)}"
        )
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if extra:
        extra["aux_logits"] = False
    model = torchvision.models.get_model(name, weights=None, **extra)
    for head in _HEADS:
        inside = [(path, item) for path, item in model.named_modules() if path.partition(".")[0] == head]
        linear = [(path, item) for path, item in inside if isinstance(item, nn.Linear)]
        if linear:
            path, last = linear[-1]
            model.set_submodule(path, nn.Identity())
            for _, item in inside:
                if isinstance(item, nn.Dropout):
                    item.p = 0.0  # it regularized the classifier
            return model, last.in_features
    raise ConfigError(f"model.backbone: {name} ends in no linear layer, so its features are not known; use another")


def _from_timm(name: str) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"model.backbone: {name} needs the package timm: pip install timm") from error
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        raise ConfigError(f"model.backbone: timm has no {short!r}; near: {_near(short, timm.list_models())}")
    model: Any = timm.create_model(short, pretrained=False, num_classes=0)
    return model, int(getattr(model, "head_hidden_size", None) or model.num_features)


def _near(name: str, known: list[str]) -> str:
    """The few names of a long list that are likely meant."""
    return ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.3)) or "its list of models"
