"""Backbones by name: their features, and names of weights that load back into the library they come from."""

import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from leakfree.contrastive import SmallBackbone, build_backbone, build_contrastive
from leakfree.contrastive.model import _check_features
from leakfree.errors import ConfigError
from leakfree.norms import PartitionedBatchNorm
from tests.contrastive.conftest import MakeConfig

# model -> side of its images, and what of the library's own model is left out
FAMILIES = {
    "resnet18": (32, ("fc.",)),
    "densenet121": (32, ("classifier.",)),
    "efficientnet_b0": (32, ("classifier.1.",)),
    "mobilenet_v3_small": (32, ("classifier.3.",)),
    "convnext_tiny": (32, ("classifier.2.",)),  # its last LayerNorm stays
    "maxvit_t": (224, ("classifier.5.",)),  # its pooling stays
    "regnet_x_400mf": (32, ("fc.",)),
    "shufflenet_v2_x0_5": (32, ("fc.",)),
    "googlenet": (32, ("fc.", "aux1.", "aux2.")),
    "alexnet": (64, ("classifier.6.",)),
    "timm/resnet18": (32, ("fc.",)),
    "timm/efficientnet_b0": (32, ("classifier.",)),  # norms with fused activations
    "timm/mobilenetv3_small_100": (32, ("classifier.",)),
    "timm/vit_tiny_patch16_224": (224, ("head.",)),
}


def library_model(name: str) -> nn.Module:
    if name.startswith("timm/"):
        return timm.create_model(name[5:])
    return torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_go_back_to_the_library(name: str) -> None:
    side, left_out = FAMILIES[name]
    backbone, width = build_backbone(name, "BN", {})
    own = library_model(name)
    missing, unexpected = own.load_state_dict(backbone.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(key.startswith(left_out) for key in missing), missing
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, side, side))
    assert features.flatten(1).shape == (2, width)
    assert features.std() > 0


def test_no_dropout_is_left_of_the_classifier() -> None:
    head = build_backbone("efficientnet_b0", "BN", {})[0].get_submodule("classifier").train()
    x = torch.randn(64, 1280)
    assert torch.equal(head(x), x)


@pytest.mark.parametrize("name", ["resnet18", "timm/efficientnet_b0", "small"])
@pytest.mark.parametrize(("norm", "options"), [("BN", {"momentum": 0.3}), ("GN", {"num_groups": 4})])
def test_all_norms_are_the_chosen_one(name: str, norm: str, options: dict[str, int]) -> None:
    backbone, _ = build_backbone(name, norm, options)
    layers = [item for item in backbone.modules() if isinstance(item, nn.modules.batchnorm._BatchNorm)]
    groups = [item for item in backbone.modules() if isinstance(item, nn.GroupNorm)]
    if norm == "BN":
        assert layers
        assert not groups
        assert all(isinstance(item, PartitionedBatchNorm) and item.momentum == 0.3 for item in layers)
    else:
        assert groups
        assert not layers
        assert all(item.num_groups == 4 for item in groups)


def test_the_small_backbone() -> None:
    backbone, width = build_backbone("small", "BN", {})
    assert isinstance(backbone, SmallBackbone)
    assert width == 64
    assert backbone(torch.randn(3, 3, 16, 16)).shape == (3, 64)
    assert 70_000 < sum(item.numel() for item in backbone.parameters()) < 80_000


def test_the_stem_of_small_images_keeps_their_size() -> None:
    backbone, width = build_backbone("resnet18", "BN", {}, stem="small_images")
    sizes = []
    backbone.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))  # type: ignore[union-attr]
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, width)
    assert sizes == [(2, 64, 32, 32)]
    assert backbone.conv1.weight.shape == (64, 3, 3, 3)  # type: ignore[union-attr]
    own = torchvision.models.resnet18()
    assert backbone.state_dict().keys() == own.state_dict().keys() - {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("name", "norm", "options", "stem", "words"),
    [
        ("resnet51", "BN", {}, "imagenet", r"model\.backbone: unknown 'resnet51'; .*near: .*resnet50"),
        ("", "BN", {}, "imagenet", r"model\.backbone: unknown ''"),
        ("fasterrcnn_resnet50_fpn", "BN", {}, "imagenet", r"model\.backbone: unknown"),
        ("timm/resnet51x", "BN", {}, "imagenet", r"model\.backbone: timm has no 'resnet51x'; near: .*resnet51"),
        ("squeezenet1_0", "BN", {}, "imagenet", r"model\.backbone: squeezenet1_0 ends in no linear layer"),
        ("small", "BN", {}, "small_images", r"model\.stem: small_images is for the ResNets"),
        ("timm/resnet18", "BN", {}, "small_images", r"model\.stem: small_images is for the ResNets"),
        ("densenet121", "BN", {}, "small_images", r"model\.stem: small_images is for the ResNets"),
        ("resnet18", "BN", {"momentun": 0.1}, "imagenet", r"model\.norm_options: .*no option 'momentun'; .*momentum"),
        ("small", "BN", {"momentun": 0.1}, "imagenet", r"model\.norm_options: .*no option 'momentun'"),
        ("resnet18", "GN", {"num_groups": 7}, "imagenet", r"model\.norm_options: "),
    ],
)
def test_mistakes_name_the_key(name: str, norm: str, options: dict[str, float], stem: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_backbone(name, norm, options, stem=stem)


def test_without_timm_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    build_backbone("small", "BN", {})
    with pytest.raises(ConfigError, match=r"model\.backbone: timm/resnet18 needs the package timm: pip install timm"):
        build_backbone("timm/resnet18", "BN", {})


@pytest.mark.parametrize(("name", "size"), [("timm/vit_tiny_patch16_224", 32), ("alexnet", 32)])
def test_images_of_a_size_that_the_backbone_does_not_take_are_told_before_a_run(
    make_config: MakeConfig, name: str, size: int
) -> None:
    with pytest.raises(ConfigError, match=rf"^data.image_size: {name} .* 32 x 32"):
        build_contrastive(make_config("run", f"model.backbone={name}", f"data.image_size={size}"))
    with pytest.raises(ConfigError, match=r"gives no 7 features .* \(1, 64\)"):
        _check_features(build_backbone("small", "BN", {})[0], 7, make_config())
