import pytest
import torch
import torchvision
from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms import GroupNorm, InstanceNorm, LayerNorm, substitute_block_norms


def _norms(model, kind):
    return [path for path, module in model.named_modules() if isinstance(module, kind)]


def test_a_bottlenecks_second_norm_becomes_group_norm_with_64_groups():
    model = torchvision.models.resnet50(num_classes=3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    weight = model.layer4[2].bn2.weight
    paths = substitute_block_norms(model)
    blocks = [
        f"layer{stage}.{block}"
        for stage, count in zip(range(1, 5), (3, 4, 6, 3), strict=True)
        for block in range(count)
    ]
    assert paths == [f"{block}.bn2" for block in blocks]
    assert _norms(model, GroupNorm) == paths
    assert {model.get_submodule(path).num_groups for path in paths} == {64}
    assert model.layer4[2].bn2.weight is weight
    assert type(model.bn1) is nn.BatchNorm2d  # the stem
    assert type(model.layer1[0].downsample[1]) is nn.BatchNorm2d
    assert len(_norms(model, nn.BatchNorm2d)) == 53 - 16
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_a_basic_blocks_first_norm_and_groups_of_no_more_than_the_channels():
    model = torchvision.models.resnet18()
    assert substitute_block_norms(model, num_groups=128)[:3] == ["layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"]
    assert [model.get_submodule(f"layer{n}.0.bn1").num_groups for n in (1, 2, 3)] == [64, 128, 128]
    assert type(model.layer1[0].bn2) is nn.BatchNorm2d


@pytest.mark.parametrize("position", [1, 2, 3])
def test_the_position_is_that_of_the_bottleneck(position):
    model = torchvision.models.resnet50()
    paths = substitute_block_norms(model, "LN", position)
    assert {path.rpartition(".")[2] for path in paths} == {f"bn{position}"}
    assert _norms(model, LayerNorm) == paths


def test_the_basic_position_is_that_of_the_basic_block():
    model = torchvision.models.resnet18()
    paths = substitute_block_norms(model, "IN", 3, basic_position=2, affine=True)
    assert {path.rpartition(".")[2] for path in paths} == {"bn2"}
    assert _norms(model, InstanceNorm) == paths


class _TimmBottleneck(nn.Module):
    """The children of timm's ``Bottleneck``, with its drop and activation modules between them."""

    def __init__(self, width=48):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(96, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop_block, self.act2, self.aa = nn.Identity(), nn.ReLU(), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, 96, 1), nn.BatchNorm2d(96)
        self.se, self.act3, self.downsample = None, nn.ReLU(), None


def test_timms_blocks_are_found_and_a_block_may_be_the_model():
    assert substitute_block_norms(nn.Sequential(_TimmBottleneck(), _TimmBottleneck())) == ["0.bn2", "1.bn2"]
    block = _TimmBottleneck()
    assert substitute_block_norms(block) == ["bn2"]
    assert block.bn2.num_groups == 48


def test_a_shared_block_is_replaced_once():
    block = _TimmBottleneck()
    model = nn.Sequential(block, block)
    assert substitute_block_norms(model) == ["0.bn2"]
    assert isinstance(model[1].bn2, GroupNorm)


def test_mistakes_are_named_and_change_nothing():
    with pytest.raises(ConfigError, match="MobileNetV2 has no residual block"):
        substitute_block_norms(torchvision.models.mobilenet_v2())
    model = nn.Sequential(_TimmBottleneck(64), _TimmBottleneck(96))
    with pytest.raises(ConfigError, match=r"^1\.bn2: GN: num_groups=64 does not divide 96 channels; use one of 1, 2"):
        substitute_block_norms(model)
    with pytest.raises(ConfigError, match="unknown norm 'GM'; choose from GN"):
        substitute_block_norms(model, "GM")
    with pytest.raises(ConfigError, match="norm LN has no option 'num_groups'"):
        substitute_block_norms(model, "LN", num_groups=2)
    for options, message in [({"position": 4}, "position: .* 1 to 3, got 4"), ({"basic_position": 3}, "1 to 2, got 3")]:
        with pytest.raises(ConfigError, match=message):
            substitute_block_norms(model, **options)
    assert len(_norms(model, nn.BatchNorm2d)) == 6
    substitute_block_norms(model, num_groups=32)
    with pytest.raises(ConfigError, match="no batch norms in all 2 blocks: nothing to replace"):
        substitute_block_norms(model)


class _Fused(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_norm_that_may_do_more_is_refused_by_path():
    block = _TimmBottleneck()
    block.bn2 = _Fused(48)
    with pytest.raises(ConfigError, match=r"^0\.bn2: .*_Fused: it may do more"):
        substitute_block_norms(nn.Sequential(block))
