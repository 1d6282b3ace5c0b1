import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, convert_splitbn_model
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms import (
    NORMS,
    BatchNorm,
    DomainBatchNorm,
    FrozenBatchNorm,
    GroupNorm,
    PartitionedBatchNorm,
    convert_norms,
    domain,
    plan_conversion,
)
from leakfree.norms.fused import ACTIVATION_MODULES, activation_name
from leakfree.norms.proxy import ACTIVATIONS


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


# ------------------------------------------------------------------------------- fused activations


def _fused(act=nn.PReLU, **options):
    """conv, timm's norm with a fused activation, conv; the norm has seen data."""
    torch.manual_seed(0)
    norm = BatchNormAct2d(6, act_layer=act, act_kwargs={"inplace": True} if act is nn.ReLU else {}, **options)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        model(torch.randn(8, 3, 7, 7) * 2 + 1)
    return model


FUSED = {
    "BatchNormAct2d": lambda: _fused(),
    "SyncBatchNormAct": lambda: convert_sync_batchnorm(_fused()),
    "FrozenBatchNormAct2d": lambda: timm.layers.freeze_batch_norm_2d(_fused()),
}


@pytest.mark.parametrize("source", FUSED)
@pytest.mark.parametrize("target", ["BN", "SyncBN", "BatchRenorm", "FrozenBN"])
def test_a_fused_activation_stays_behind_the_new_norm(source, target):
    model = FUSED[source]().eval()
    assert type(model[1]).__name__ == source
    x = torch.randn(2, 3, 9, 9)
    act, before, keys = model[1].act, model(x), set(model.state_dict())
    convert_norms(model, target)
    assert isinstance(model[1], NORMS.get(target))
    assert model[1].act is act
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) - {"1.num_batches_tracked"} == keys - {"1.num_batches_tracked"}
    assert "1.act.weight" in keys
    convert_norms(model, "BN")
    assert type(model[1]).__mro__[2] is BatchNorm
    assert model[1].act is act
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_a_fused_norm_trains_as_before(act):
    model = _fused(act, drop_layer=lambda: nn.Dropout(0.5)).train()
    ours = convert_norms(copy.deepcopy(model), "BN")
    x = torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)
    for net in (model, ours):
        torch.manual_seed(3)
        net(x).square().sum().backward()
    for (key, ours_grad), theirs in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours_grad.grad, theirs.grad, rtol=0, atol=0, msg=key)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_fused_norm_without_rows_gives_none_and_stays():
    model = convert_norms(_fused(nn.ReLU), "SyncBN").train()
    before = {key: value.clone() for key, value in model[1].state_dict().items()}
    y = model[1](torch.randn(0, 6, 3, 3, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 6, 3, 3)
    assert model[1].weight.grad.count_nonzero() == 0
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())


def test_a_fused_norm_in_half_precision():
    model = convert_norms(_fused(nn.ReLU), "SyncBN").train()
    x = torch.randn(4, 6, 5, 5)
    expected = torch.relu(nn.functional.batch_norm(x, None, None, model[1].weight, model[1].bias, True))
    y = model[1](x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model[1](x).float(), expected, rtol=0.05, atol=0.05)


def test_a_fused_norm_pickles_copies_and_compiles():
    model = convert_norms(_fused(), "GhostBN", group_size=2).eval()
    x = torch.randn(2, 3, 9, 9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is type(model[1])
        assert other[1].act is not model[1].act
        assert other[1].group_size == 2
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
    compiled = torch.compile(copy.deepcopy(model).train(), backend="aot_eager")
    torch.testing.assert_close(compiled(x), copy.deepcopy(model).train()(x))


def test_a_fused_domain_norm_activates_every_level():
    model = convert_norms(_fused(nn.ReLU), "DomainBN", num_domains=2)
    assert isinstance(model[1], DomainBatchNorm)
    levels = model[1]({0: torch.randn(2, 6, 4, 4), 1: torch.randn(2, 6, 2, 2)})
    assert all(level.min() == 0 < level.max() for level in levels.values())
    with domain(1):
        assert model(torch.randn(2, 3, 5, 5)).shape == (2, 2, 3, 3)
    assert isinstance(convert_norms(model, "BN", domain=1)[1].act, nn.ReLU)


def test_a_fused_activation_follows_a_group_norm_too():
    model = convert_norms(_fused(nn.ReLU), "GN", num_groups=2)
    x = torch.randn(2, 6, 4, 4)
    expected = nn.functional.group_norm(x, 2, model[1].weight, model[1].bias).relu()
    torch.testing.assert_close(model[1](x), expected)


def test_a_proxy_norm_takes_the_fused_activation_as_its_own():
    model = convert_norms(_fused(nn.SiLU), "ProxyNorm")
    assert (model[1].activation, model[1].eps, model[1].norm_eps) == ("silu", 0.03, 1e-5)
    assert not hasattr(model[1], "act")
    with pytest.raises(ConfigError, match=r"^1: has PReLU fused behind it, but ProxyNorm takes an activation by name"):
        convert_norms(_fused(nn.PReLU), "ProxyNorm")
    with pytest.raises(ConfigError, match=r"^0: ProxyNorm takes the place .* use replace_norm_activation_pairs"):
        convert_norms(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), "ProxyNorm")


def test_activations_have_the_names_that_norms_know():
    assert ACTIVATION_MODULES.keys() == ACTIVATIONS.keys()
    x = torch.linspace(-7, 7, 50)
    for name, make in ACTIVATION_MODULES.items():
        assert activation_name(make()) == name
        assert torch.equal(make()(x), ACTIVATIONS[name].apply(x))
    assert activation_name(nn.LeakyReLU(0.2)) is None
    assert activation_name(nn.ReLU(inplace=True)) == "relu"


def test_a_split_norm_is_refused_by_path():
    with pytest.raises(ConfigError, match=r"^1: cannot convert timm\..*SplitBatchNorm2d.*it also has aux_bn"):
        convert_norms(convert_splitbn_model(nn.Sequential(nn.Identity(), nn.BatchNorm2d(2))), "BN")


# ------------------------------------------------------------------------------- what goes along


def test_hooks_go_along_and_can_still_be_removed():
    norm, seen = nn.BatchNorm2d(3), []
    handles = [
        norm.register_forward_pre_hook(lambda module, args, kwargs: seen.append(("pre", module)), with_kwargs=True),
        norm.register_forward_hook(lambda module, args, output: seen.append(("post", module)), always_call=True),
        norm.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(("back", module))),
    ]
    model = convert_norms(nn.Sequential(norm), "SyncBN")
    assert "3 hooks" in plan_conversion(model, "BN").converted[0].kept
    model(torch.randn(2, 3, 2, 2, requires_grad=True)).sum().backward()
    assert [name for name, _ in seen] == ["pre", "post", "back"]
    assert all(module is model[0] for _, module in seen)
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 2, 2, requires_grad=True)).sum().backward()
    assert len(seen) == 3


def test_hooks_of_the_new_norm_stay_beside_those_of_the_old():
    class Watched(nn.Identity):
        def __init__(self, num_features, dim=2):
            super().__init__()
            self.seen = []
            self.register_forward_hook(lambda module, args, output: module.seen.append("new"))

    NORMS._do_register("Watched", Watched)
    try:
        norm = nn.BatchNorm2d(3)
        norm.register_forward_hook(lambda module, args, output: module.seen.append("old"))
        new = convert_norms(norm, "Watched")
        new(torch.zeros(1, 3, 1, 1))
        assert sorted(new.seen) == ["new", "old"]
    finally:
        NORMS._obj_map.pop("Watched")


def test_hooks_on_the_state_dict_stay_behind_and_the_report_says_so():
    norm = nn.BatchNorm2d(3)
    norm.register_state_dict_post_hook(lambda *args: None)
    assert plan_conversion(nn.Sequential(norm), "BN").converted[0].lost == ("1 state dict hooks",)


def test_a_layer_at_two_paths_stays_one_and_matches_by_either():
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.BatchNorm2d(3)})
    report = plan_conversion(model, "SyncBN", where=r"^b\.")
    assert [row.path for row in report.converted] == ["a.0 = b.0"]
    convert_norms(model, "SyncBN", where=r"^b\.")
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], NORMS.get("SyncBN"))
    assert type(model["c"]) is nn.BatchNorm2d


def test_what_did_not_train_before_the_freeze_does_not_train_after():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].bias.requires_grad_(False)
    convert_norms(convert_norms(model, "FrozenBN"), "FrozenBN", affine_trainable=True)
    assert model[0].bias.requires_grad
    convert_norms(model, "BN")
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)


def test_every_tensor_keeps_its_own_dtype_and_device():
    norm = nn.BatchNorm2d(3, device="meta")
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    new = convert_norms(norm, "SyncBN")
    assert {key: value.dtype for key, value in new.state_dict().items()} == {
        key: value.dtype for key, value in norm.state_dict().items()
    }
    assert all(value.is_meta for value in new.state_dict().values())


@pytest.mark.parametrize(("norm", "dim"), [(nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3)])
def test_the_way_back_takes_inputs_of_the_same_dimensions(norm, dim):
    back = convert_norms(convert_norms(convert_norms(norm(3), "ShuffleBN"), "FrozenBN"), "BN")
    assert type(back) is BatchNorm
    assert back(torch.randn(2, 3, *[2] * dim)).shape == (2, 3, *[2] * dim)
    with pytest.raises(ValueError, match=f"dim={dim}"):
        back(torch.randn(2, 3, *[2] * (dim % 3 + 1 if dim != 1 else 2)))


def test_torchs_sync_norm_takes_any_dimensions_and_so_does_its_way_back():
    back = convert_norms(nn.SyncBatchNorm(3), "BN").eval()
    for dim in range(4):
        assert back(torch.randn(2, 3, *[2] * dim)).ndim == 2 + dim


def test_options_win_over_what_the_old_norm_has():
    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-3))
    row = plan_conversion(model, "BN", affine=False, eps=1e-4).converted[0]
    assert {"weight", "bias", "eps"} == set(row.lost)
    convert_norms(model, "BN", affine=False, eps=1e-4)
    assert (model[0].weight, model[0].eps) == (None, 1e-4)


# ------------------------------------------------------------------------------- refusals, and the report


def test_a_lazy_norm_is_told_to_run_first():
    model = nn.ModuleDict({"norm": nn.LazyBatchNorm2d()})
    with pytest.raises(ConfigError, match=r"^norm: is a LazyBatchNorm2d that does not know its channels yet; run one"):
        convert_norms(model, "SyncBN")
    model["norm"](torch.randn(2, 3, 2, 2))
    assert convert_norms(model, "SyncBN")["norm"].num_features == 3


@pytest.mark.parametrize("name", ["FrozenBN", "SyncBN"])
def test_one_layer_that_cannot_be_converted_leaves_all_as_they_were(name):
    model = nn.Sequential(nn.BatchNorm2d(3), _WithActivation(3), nn.BatchNorm2d(3), _WithActivation(4))
    before = list(model)
    with pytest.raises(ConfigError, match=r"^1 and 1 more: cannot convert"):
        convert_norms(model, name)
    assert all(now is then for now, then in zip(model, before, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    class Grouped(nn.Module):
        def __init__(self, num_features, dim=2):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    NORMS._do_register("Grouped", Grouped)
    try:
        with pytest.raises(ConfigError, match=r"^0: its weight \(3,\) does not fit that of the new norm, \(2,\)"):
            convert_norms(nn.Sequential(nn.BatchNorm2d(3)), "Grouped")
    finally:
        NORMS._obj_map.pop("Grouped")


def test_a_model_without_batch_norms_is_an_error_that_names_its_norms():
    model = nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.LayerNorm(2), nn.InstanceNorm2d(2))
    message = "there is no batch norm to convert; the model's norms are 1 GroupNorm, 2 LayerNorm, 1 InstanceNorm2d"
    with pytest.raises(ConfigError, match=message):
        convert_norms(model, "SyncBN")


def test_the_plan_tells_everything_and_changes_nothing():
    model = nn.ModuleDict(
        {
            "stem": _fused(nn.ReLU),
            "head": nn.BatchNorm1d(4),
            "kept": nn.BatchNorm1d(4),
            "other": nn.GroupNorm(2, 4),
            "evo": timm.layers.EvoNorm2dB0(4),
        }
    )
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    report = plan_conversion(model, "GN", where="stem|head", num_groups=2)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(row.path, row.source, row.target) for row in report.converted] == [
        ("stem.1", "BatchNormAct2d(6) + ReLU", "GN"),
        ("head", "BatchNorm1d(4)", "GN"),
    ]
    assert report.converted[0].kept == ("weight", "bias", "eps", "activation ReLU")
    assert report.converted[0].lost == ("running_mean", "running_var", "num_batches_tracked", "momentum")
    assert {row.path: row.note for row in report.left} == {
        "kept": "not matched by `where`",
        "other": "shares nothing between samples",
        "evo": "has running statistics, but is no batch norm known here",
    }
    lines = str(report).splitlines()
    assert lines[0] == "2 layers to GN, num_groups=2"
    assert lines[2].split()[:4] == ["stem.1", "BatchNormAct2d(6)", "+", "ReLU"]
    assert len(lines) == 2 + 2 + 3
    with pytest.raises(ConfigError, match="unknown norm 'GM'"):
        plan_conversion(model, "GM")
