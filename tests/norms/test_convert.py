import pytest
import torch
import torchvision
from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms import NORMS, FrozenBatchNorm, GroupNorm, PartitionedBatchNorm, convert_norms


def _trained():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("name", ["BN", "SyncBN", "ShuffleBN", "GhostBN", "FrozenBN"])
def test_conversion_keeps_eval_outputs_and_state(name):
    model, x = _trained(), torch.randn(2, 3, 32, 32)
    before, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    options = {"group_size": 2} if name == "GhostBN" else {}
    assert convert_norms(model, name, **options) is model
    kind = FrozenBatchNorm if name == "FrozenBN" else PartitionedBatchNorm
    assert sum(isinstance(module, kind) for module in model.modules()) == 20
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    # FrozenBN folds the affine map into one multiply-add: equal up to rounding, the others bit for bit
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5 if name == "FrozenBN" else 0)
    convert_norms(model, "BN")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(not module.training for module in model.modules())


def test_parameters_stay_the_same_objects_for_the_optimizer():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, eps=1e-3, momentum=0.2))
    weight = model[1].weight
    convert_norms(model, "SyncBN")
    assert model[1].weight is weight
    assert (model[1].eps, model[1].momentum, model[1].dim) == (1e-3, 0.2, 2)


def test_where_selects_by_path_and_must_match():
    model = _trained()
    convert_norms(model, "GN", where=r"^layer4\.", num_groups=8)
    assert isinstance(model.layer4[0].bn1, GroupNorm)
    assert type(model.layer3[0].bn1) is nn.BatchNorm2d
    with pytest.raises(ConfigError, match="where='layer9' matches no batch norm"):
        convert_norms(model, "GN", where="layer9")


def test_dtype_and_shared_modules_are_kept():
    shared = nn.BatchNorm1d(4).double()
    model = convert_norms(nn.ModuleDict({"a": shared, "b": shared}), "BN")
    assert model["a"] is model["b"]
    assert model["a"].weight.dtype == torch.float64
    assert model["a"].dim == 1


def test_a_norm_itself_is_returned_converted():
    assert isinstance(convert_norms(nn.BatchNorm3d(2), "SyncBN"), PartitionedBatchNorm)


def test_torchvisions_frozen_norm_converts_back():
    model = convert_norms(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3)), "BN")
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(model.eval()(x), x / (1 + 1e-5) ** 0.5)


class _WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_subclass_that_may_do_more_is_refused_by_path():
    with pytest.raises(ConfigError, match=r"block\.norm: cannot convert .*_WithActivation"):
        convert_norms(nn.ModuleDict({"block": nn.ModuleDict({"norm": _WithActivation(3)})}), "SyncBN")


def test_frozen_layers_stay_frozen():
    model = convert_norms(nn.Sequential(nn.BatchNorm2d(3)), "BN")
    model[0].frozen = True
    convert_norms(model, "SyncBN")
    before = model[0].running_mean.clone()
    model.train()(torch.randn(4, 3, 2, 2))
    assert torch.equal(model[0].running_mean, before)


def test_the_way_through_frozen_and_back_keeps_what_trains():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.01))
    weight = model[0].weight
    convert_norms(model, "FrozenBN")
    assert model[0].weight is weight
    assert not weight.requires_grad
    convert_norms(model, "BN")
    assert model[0].weight is weight
    assert weight.requires_grad
    assert model[0].momentum == 0.01


@pytest.mark.parametrize("name", ["BN", "SyncBN", "FrozenBN"])
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
def test_missing_weights_stay_missing(name, options):
    source = nn.BatchNorm2d(3, **options)
    source(torch.randn(8, 3, 2, 2) * 3 + 1)
    x = torch.randn(2, 3, 2, 2)
    expected = source.eval()(x)
    for target in (name, "BN"):
        source = convert_norms(source, target)
        assert source.bias is None
        assert (source.weight is None) == ("affine" in options)
        torch.testing.assert_close(source(x), expected)


def test_nothing_to_freeze_is_refused_by_path():
    model = nn.ModuleDict({"n": nn.BatchNorm2d(3, track_running_stats=False)})
    with pytest.raises(ConfigError, match=r"^n: has no running statistics to freeze"):
        convert_norms(model, "FrozenBN")


class _Own(nn.Module):
    def __init__(self, num_features, dim=2, gain=1.0):
        super().__init__()
        self.gain = gain


def test_a_users_norm_gets_only_the_options_it_takes():
    NORMS._do_register("Own", _Own)
    try:
        assert convert_norms(nn.Sequential(nn.BatchNorm2d(3)), "Own", gain=2.0)[0].gain == 2.0
        with pytest.raises(ConfigError, match="norm Own has no option 'gian'; it takes gain"):
            convert_norms(nn.Sequential(nn.BatchNorm2d(3)), "Own", gian=2.0)
    finally:
        NORMS._obj_map.pop("Own")
