"""A folded model is the same function: to the last digits in float64, to rounding in float32, and after export."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import nn

from leakfree.errors import LeakfreeError
from leakfree.folding import Fold, fold_norms
from leakfree.norms import ProxyNorm, build_norm, convert_norms, replace_norm_activation_pairs
from leakfree.norms.fused import ACTIVATION_MODULES

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@torch.no_grad()
def trained(model, seed=0):
    """Random weights and statistics, far from those at the start; eval."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            for name in ("weight", "bias"):
                if getattr(module, name, None) is not None:
                    tensor = getattr(module, name)
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) + 0.5)
    return model.eval()


@torch.no_grad()
def check(model, *inputs, where=None, pairs=None, num_folded=None):
    """Fold in float64, compare, and see that the model given stays as it is; returns the folded model and report."""
    model = model.double()
    inputs = [x.double() for x in inputs]
    before, state = model(*inputs), {key: value.clone() for key, value in model.state_dict().items()}
    folded, report = fold_norms(model, where, pairs=pairs)
    if num_folded is not None:
        assert len(report.folded) == num_folded, str(report)
    torch.testing.assert_close(folded(*inputs), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(*inputs), before, rtol=0, atol=0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return folded, report


# ------------------------------------------------------------------------------- the arithmetic


@given(
    dim=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    seed=st.integers(0, 99),
)
def test_the_convolution_before_takes_the_norm_with_any_padding(
    dim, groups, per_group, bias, affine, padding, mode, seed
):
    torch.manual_seed(seed)
    conv = CONVS[dim](groups, groups * per_group, 3, padding=padding, padding_mode=mode, groups=groups, bias=bias)
    model = trained(nn.Sequential(conv, NORMS[dim](groups * per_group, affine=affine), nn.ReLU()), seed)
    folded, report = check(model, torch.randn(2, groups, *[5] * dim), num_folded=1)
    assert report.folded == (Fold("1", ("0",), "before"),)
    assert type(folded[1]) is nn.Identity


@given(
    dim=st.integers(1, 3),
    groups=st.integers(1, 3),
    stride=st.integers(1, 3),
    output_padding=st.integers(0, 1),
    padding=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_the_transposed_convolution_before_takes_the_norm(dim, groups, stride, output_padding, padding, seed):
    torch.manual_seed(seed)
    output_padding = min(output_padding, stride - 1)
    conv = TRANSPOSED[dim](
        2 * groups, 3 * groups, 3, stride, padding, output_padding=output_padding, groups=groups, bias=seed % 2 == 0
    )
    model = trained(nn.Sequential(conv, NORMS[dim](3 * groups)), seed)
    check(model, torch.randn(2, 2 * groups, *[4] * dim), num_folded=1)


@given(
    dim=st.integers(1, 3),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    stride=st.integers(1, 2),
    padded=st.sampled_from([(0, "zeros"), ("valid", "zeros"), (1, "reflect"), ("same", "circular"), (1, "replicate")]),
    seed=st.integers(0, 99),
)
def test_the_convolution_after_takes_the_norm_where_no_zeros_are_padded(dim, groups, bias, stride, padded, seed):
    torch.manual_seed(seed)
    padding, mode = padded
    stride = 1 if padding == "same" else stride
    conv = CONVS[dim](2 * groups, 3 * groups, 3, stride, padding, groups=groups, bias=bias, padding_mode=mode)
    model = trained(nn.Sequential(nn.ReLU(), NORMS[dim](2 * groups), conv), seed)
    _, report = check(model, torch.randn(2, 2 * groups, *[5] * dim), num_folded=1)
    assert report.folded == (Fold("1", ("2",), "after"),)


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_norm_before_padded_zeros_is_left_unless_it_shifts_nothing(padding):
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=padding)))
    _, report = check(model, torch.randn(2, 2, 5, 5), num_folded=0)
    assert report.left == {"1": "before it: ReLU; after it: 2: it pads with zeros, which the norm does not see"}
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.zero_()
    check(model, torch.randn(2, 2, 5, 5), num_folded=1)


def test_linear_maps_take_norms_on_both_sides():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
    _, report = check(trained(model), torch.randn(4, 3), num_folded=2)
    assert [(fold.norm, fold.layers, fold.side) for fold in report.folded] == [
        ("0", ("2",), "after"),
        ("3", ("2",), "before"),
    ]


def test_a_linear_map_of_the_last_of_several_dimensions_takes_none():
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4)))
    _, report = check(model, torch.randn(2, 4, 4, 4), num_folded=0)
    assert "linear map of the last dimension" in report.left["1"]


def test_a_transposed_convolution_takes_no_norm_before_it():
    model = trained(nn.Sequential(nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 2, 3, stride=2)))
    _, report = check(model, torch.randn(2, 2, 4, 4), num_folded=0)
    assert "transposed" in report.left["0"]


def test_a_layer_takes_named_norms_on_both_sides():
    model = trained(nn.Sequential(norm(), conv(), norm()))
    check(model, X, pairs=[("0", "1"), ("1", "2")], num_folded=2)


def test_norms_one_behind_the_other_go_into_the_same_layer():
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Identity(), nn.BatchNorm2d(3), nn.ReLU()))
    check(model, torch.randn(2, 2, 5, 5), num_folded=2)
    model = Forward(lambda self, x: self.a(self.b(self.conv(x))).relu(), a=norm(), b=norm(), conv=conv())
    check(trained(model), X, num_folded=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_round_once(dtype):
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))).to(dtype)
    exact, _ = fold_norms(copy.deepcopy(model).double())
    folded, _ = fold_norms(model)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(folded[0], name), getattr(exact[0], name).to(dtype))


# ------------------------------------------------------------------------------- which norms


FOLDABLE = {
    "BN": {},
    "SyncBN": {},
    "GhostBN": {"group_size": 2},
    "ShuffleBN": {},
    "BatchRenorm": {},
    "MBN": {},
    "CBN": {},
    "BGN": {"num_groups": 2},
    "FrozenBN": {},
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_leakfrees_norms_fold_in_eval(name):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), build_norm(name, 4, **FOLDABLE[name]), nn.ReLU())
    check(trained(model), torch.randn(2, 2, 5, 5), num_folded=1)


NOT_FOLDABLE = {
    "IEBN": ({}, "does more in eval than to scale and shift channels"),
    "BatchStatBN": ({}, "it normalizes with the statistics of the batch"),
    "DomainBN": ({"num_domains": 2}, "its map depends on more than the channel"),
}


@pytest.mark.parametrize("name", NOT_FOLDABLE)
def test_norms_whose_eval_is_no_map_of_channels_are_left(name):
    options, reason = NOT_FOLDABLE[name]
    model = trained(nn.Sequential(nn.Conv2d(2, 4, 3), build_norm(name, 4, **options)))
    folded, report = fold_norms(model)
    assert not report.folded
    assert reason in report.left["1"]
    assert type(folded[1]) is type(model[1])


def test_a_norm_without_statistics_and_one_in_training_mode_are_left():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert "no running statistics" in fold_norms(model.eval())[1].left["1"]
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    model[1].train()
    assert fold_norms(model)[1].left == {"1": "it is in training mode"}
    frozen = trained(convert_norms(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), "SyncBN"))
    frozen[1].train().frozen = True
    check(frozen, torch.randn(2, 2, 3, 3), num_folded=1)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_fused_activation_stays_under_its_keys(freeze):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNormAct2d(3, act_layer=nn.PReLU), nn.Conv2d(3, 2, 1))
    model = trained(timm.layers.freeze_batch_norm_2d(model) if freeze else model)
    for source in (model, convert_norms(copy.deepcopy(model), "SyncBN")):
        folded, _ = check(source, torch.randn(2, 2, 5, 5), num_folded=1)
        assert set(folded.state_dict()) == {"0.weight", "0.bias", "1.act.weight", "2.weight", "2.bias"}


def test_a_fused_activation_keeps_the_norm_from_the_layer_after_it():
    model = trained(nn.Sequential(nn.ReLU(), BatchNormAct2d(3), nn.Conv2d(3, 2, 1)))
    _, report = check(model, torch.randn(2, 3, 4, 4), num_folded=0)
    assert "after it: its activation comes between" in report.left["1"]


def test_torchvisions_frozen_norm_folds():
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 3), torchvision.ops.FrozenBatchNorm2d(3)))
    check(model, torch.randn(2, 2, 5, 5), num_folded=1)


@pytest.mark.parametrize("norm", [{"norm": "LN"}, {"norm": "GN", "num_groups": 2}])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_the_last_step_of_a_proxy_norm_goes_into_the_convolution_after_it(norm, activation):
    torch.manual_seed(0)
    proxy = build_norm("ProxyNorm", 4, activation=activation, **norm)
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.add_(torch.randn(4) * 0.3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), proxy, nn.Conv2d(4, 5, 3)).eval()
    folded, report = check(model, torch.randn(2, 3, 6, 6), num_folded=1)
    assert report.folded == (Fold("1", ("2",), "after"),)
    x = torch.randn(2, 4, 3, 3).double()
    inside = F.group_norm(x, model[1].num_groups, model[1].weight, model[1].bias, 1e-5)
    torch.testing.assert_close(folded[1](x), getattr(F, activation)(inside))
    model[2].padding = (1, 1)
    cached, report = check(model, torch.randn(2, 3, 6, 6), num_folded=0)
    assert "pads with zeros" in report.cached["1"]
    assert not report.left
    assert "0 of 1 norms folded, 1 cached" in str(report)
    assert not isinstance(cached[1], ProxyNorm)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.randn(2, 4, 3, 3, dtype=dtype), model.to(dtype)[1]
        torch.testing.assert_close(fold_norms(model)[0][1](x), y(x))


@pytest.mark.parametrize("activation", ["leaky_relu", "relu6", "elu", "silu", "gelu", "hardswish", "mish"])
def test_each_activation_of_a_proxy_norm_behind_one_that_is_shared(activation):
    def forward(self, x):
        return self.act(self.c2(self.act(self.n(self.c1(x)))) + x)

    torch.manual_seed(0)
    model = Forward(forward, c1=conv(), n=norm(), c2=conv(), act=ACTIVATION_MODULES[activation]())
    replace_norm_activation_pairs(trained(model))
    _, report = check(model, torch.randn(2, 3, 4, 4), num_folded=1)
    assert report.folded == (Fold("n", ("c2",), "after"),)
    model.c2 = nn.Conv2d(3, 3, 3, padding=1).double()
    assert list(check(model, torch.randn(2, 3, 4, 4), num_folded=0)[1].cached) == ["n"]


def test_a_proxy_norm_with_a_hook_or_a_forward_of_its_own_is_left():
    model = nn.Sequential(build_norm("ProxyNorm", 3), nn.Conv2d(3, 2, 1)).eval()
    handle = model[0].register_forward_hook(lambda *args: None)
    assert "hooks" in fold_norms(model)[1].left["0"]
    handle.remove()

    class Doubled(ProxyNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    model[0] = Doubled(3).eval()
    assert "Doubled overrides ProxyNorm.forward" in check(model, torch.randn(2, 3, 4, 4))[1].left["0"]


# ------------------------------------------------------------------------------- who feeds whom


class Forward(nn.Module):
    """Modules by name, and a forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def conv(out=3):
    return nn.Conv2d(3, out, 1)


def norm(channels=3):
    return nn.BatchNorm2d(channels)


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_shared_layer_and_its_norm_fold_once():
    model = Forward(lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))), conv=conv(), norm=norm())
    check(trained(model), X, num_folded=1)


def test_a_shared_layer_before_different_norms_is_left():
    model = Forward(
        lambda self, x: self.one(self.conv(x)) + self.two(self.conv(x)), conv=conv(), one=norm(), two=norm()
    )
    _, report = check(trained(model), X, num_folded=0)
    assert report.left["one"] == "before it: a Conv2d that is used elsewhere, too; after it: `add`"


def test_a_shared_norm_goes_into_all_its_layers():
    model = Forward(lambda self, x: self.norm(self.a(x)) + self.norm(self.b(x)), a=conv(), b=conv(), norm=norm())
    _, report = check(trained(model), X, num_folded=1)
    assert report.folded[0].layers == ("a", "b")


def test_a_shared_norm_stays_if_one_of_its_inputs_is_no_layer():
    model = Forward(lambda self, x: self.norm(self.a(x)) + self.norm(x), a=conv(), norm=norm())
    _, report = check(trained(model), X, num_folded=0)
    assert report.left["norm"] == "before it: the module's input; after it: `add`"


def test_tied_weights_are_untied_where_only_one_is_folded():
    model = Forward(lambda self, x: self.b(self.norm(self.a(x)).relu()), a=conv(), b=conv(), norm=norm())
    model.b.weight = model.a.weight
    folded, _ = check(trained(model), X, num_folded=1)
    assert torch.equal(folded.b.weight, model.b.weight)
    assert not torch.equal(folded.a.weight, model.a.weight)


USED_ELSEWHERE = {
    "the output goes on": lambda self, x: (y := self.conv(x)) + self.norm(y),
    "the weight is used": lambda self, x: self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight),
    "the output is the model's": lambda self, x: (y := self.conv(x), self.norm(y))[0] * 2 + self.norm(y),
    "changed between": lambda self, x: self.norm(self.conv(x).relu()),
    "changed in place": lambda self, x: (y := self.conv(x), self.norm(y), y.relu_())[1],
}


@pytest.mark.parametrize("how", USED_ELSEWHERE)
def test_a_layer_that_feeds_something_else_is_left(how):
    check(trained(Forward(USED_ELSEWHERE[how], conv=conv(), norm=norm())), X, num_folded=0)


def test_asking_for_the_shape_is_no_use():
    model = Forward(lambda self, x: self.norm(y := self.conv(x)).view(y.shape[0], -1), conv=conv(), norm=norm())
    check(trained(model), X, num_folded=1)


def test_a_layer_inside_a_module_that_is_called_as_a_whole_is_left():
    class Opaque(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x  # cannot be traced

    shared = conv()
    model = Forward(
        lambda self, x: self.norm(self.conv(x)) + self.gate(x), conv=shared, norm=norm(), gate=Opaque(shared)
    )
    check(trained(model), X.abs(), num_folded=0)


def test_layers_that_change_their_weight_are_left():
    model = nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.utils.parametrizations.weight_norm(model[2])
    _, report = check(trained(model), X, num_folded=0)
    assert "it is a StdConv2d, which may do more" in report.left["1"]
    assert "it is a ParametrizedConv2d, which may do more" in report.left["3"]


def test_timms_convolution_with_the_padding_of_tensorflow_takes_norms_before_zeros_are_its_own():
    model = nn.Sequential(Conv2dSame(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), Conv2dSame(4, 4, 3))
    _, report = check(trained(model), X, num_folded=1)
    assert report.folded[0].norm == "1"


def test_hooks_that_would_see_something_else_keep_a_norm():
    model = trained(nn.Sequential(conv(), norm()))
    handle = model[0].register_forward_hook(lambda *args: None)
    assert "hooks" in fold_norms(model)[1].left["1"]
    handle.remove()
    handle = model[1].register_forward_pre_hook(lambda *args: None)
    assert "hooks" in fold_norms(model)[1].left["1"]
    handle.remove()
    check(model, X, num_folded=1)


def test_what_the_forward_does_not_call_is_left():
    model = Forward(lambda self, x: self.norm(self.conv(x)), conv=conv(), norm=norm(), spare=norm())
    assert fold_norms(trained(model))[1].left == {"spare": "the forward does not call it"}


def test_a_model_that_cannot_be_traced_is_folded_in_its_parts():
    block = nn.Sequential(conv(), norm())

    def forward(self, x):
        for _ in range(int(x.sum() > 0) + 1):
            x = self.block(x)
        return self.norm(self.conv(x))

    model = trained(Forward(forward, block=block, conv=conv(), norm=norm()))
    _, report = check(model, X, num_folded=1)
    assert report.folded[0].norm == "block.1"
    assert report.left["norm"] == "its calls are not known (the model cannot be traced); use `pairs`"
    assert list(report.untraced) == [""]
    _, report = check(model, X, pairs=[("conv", "norm"), ("block.0", "block.1")], num_folded=2)
    assert not report.left


def test_an_error_without_words_stops_only_the_trace():
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError
        return self.block(x)

    _, report = check(trained(Forward(forward, block=nn.Sequential(conv(), norm()))), X, num_folded=1)
    assert report.untraced == {"": "TypeError: "}


def test_default_arguments_lead_the_trace():
    class Optional(Forward):
        def forward(self, x, residual=None):
            y = self.conv(x)
            return self.norm(y) if residual is None else self.norm(y + residual)

    check(trained(Optional(None, conv=conv(), norm=norm())), X, num_folded=1)


def test_what_a_forward_stores_is_not_left_in_the_model():
    def forward(self, x):
        self.seen = self.conv(x)
        return self.norm(self.seen)

    model = trained(Forward(forward, conv=conv(), norm=norm()))
    model.seen = None
    folded, _ = fold_norms(model)
    assert model.seen is None
    assert folded.seen is None


# ------------------------------------------------------------------------------- the interface


def test_where_and_pairs_choose_and_the_report_tells():
    model = trained(nn.Sequential(conv(), norm(), nn.ReLU(), norm(), conv()))
    _, report = check(model, X, where="^1$", num_folded=1)
    assert report.left == {}
    check(model, X, pairs=[("0", "1"), ("3", "4")], num_folded=2)
    _, report = check(model, X, pairs=[("3", "4")], num_folded=1)
    assert report.folded == (Fold("3", ("4",), "after"),)
    assert report.left == {"1": "not among the pairs"}
    assert str(report).splitlines() == ["1 of 2 norms folded", "3  into 4, after it", "1  left: not among the pairs"]


def test_in_place_changes_the_model_itself():
    model = trained(nn.Sequential(conv(), norm()))
    expected = model(X)
    folded, _ = fold_norms(model, inplace=True)
    assert folded is model
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(X), expected)


MISTAKES = [
    ({"where": "head"}, "where='head' matches no batch norm; there are 1, 3"),
    ({"pairs": [("0", "9")]}, "there is no module '9'; choose from"),
    ({"pairs": [("0", "2")]}, "expected a layer and a batch norm"),
    ({"pairs": [("0", "1"), ("0", "3")]}, "the layer is in a pair with another norm on that side, too"),
    ({"pairs": [("0", "1"), ("1", "4")]}, "the norm has pairs on both sides"),
    ({"pairs": [("0", "1"), ("3", "4")]}, "3 cannot be folded: 4: it has 4 channels, the norm 3"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_named_and_nothing_changes(arguments, message):
    model = trained(nn.Sequential(conv(), norm(), nn.ReLU(), norm(), nn.Conv2d(4, 2, 1)))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LeakfreeError, match=message):
        fold_norms(model, **arguments, inplace=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(LeakfreeError, match=r"call model\.eval\(\) first"):
        fold_norms(nn.Sequential(conv(), norm()))


# ------------------------------------------------------------------------------- whole models, and exports


ZOO = {  # norms, of which stay (behind a sum, or a concatenation, or before zeros)
    "resnet18": 0,
    "mobilenet_v3_small": 0,
    "shufflenet_v2_x0_5": 0,
    "regnet_y_400mf": 0,
    "efficientnet_b0": 0,
    "densenet121": 62,
}


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_torchvision_models(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval().double()
    x = torch.randn(2, 3, 64, 64).double()
    folded, report = fold_norms(model)
    assert len(report.left) == ZOO[name]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-8, atol=1e-8)


TIMM_ZOO = {
    "test_byobnet": 0,
    "test_efficientnet": 0,
    "ghostnet_050": 0,
    "cspnext_tiny": 0,
    "efficientvit_b0": 0,
    "tf_efficientnet_b0": 0,
    "fasternet_t0": 0,
    "starnet_s050": 1,
}


@pytest.mark.parametrize("name", TIMM_ZOO)
@torch.no_grad()
def test_timm_models_as_they_are_and_converted(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5).eval().double()
    x = torch.randn(2, 3, 64, 64).double()
    expected = model(x)
    for source in (model, convert_norms(copy.deepcopy(model), "SyncBN")):
        folded, report = fold_norms(source)
        assert len(report.left) == TIMM_ZOO[name]
        torch.testing.assert_close(folded(x), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_detector_is_folded_in_its_parts():
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, box_score_thresh=0.0
    )
    model = trained(model).double()
    folded, report = fold_norms(model)
    assert len(report.folded) == 46
    assert not report.left
    assert "" in report.untraced
    x = torch.rand(1, 3, 64, 64).double()
    for key, expected in model.backbone(x).items():
        torch.testing.assert_close(folded.backbone(x)[key], expected, rtol=1e-8, atol=1e-8)


def small():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=5)
    return convert_norms(trained(model), "SyncBN").eval(), torch.randn(2, 3, 64, 64)


@torch.no_grad()
def test_the_folded_model_goes_through_torch_export():
    model, x = small()
    folded, _ = fold_norms(model)
    program = torch.export.export(folded, (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), folded(x))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_folded_model_goes_through_onnx():
    model, x = small()
    folded, _ = fold_norms(model)
    file = io.BytesIO()
    torch.onnx.export(folded, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, folded(x).numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, model(x).numpy(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_folded_proxy_norm_goes_through_export_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), build_norm("ProxyNorm", 4), nn.Conv2d(4, 2, 1)).eval()
    folded, report = fold_norms(model)
    assert len(report.folded) == 1
    program = torch.export.export(folded, (X,))
    torch.testing.assert_close(program.module()(X), model(X))


PROXIED = {"resnet18": (11, 9), "resnet50": (36, 17)}  # in a layer (with the batch norms that are left), cached


@pytest.mark.parametrize("options", [{"norm": "LN"}, {"norm": "GN", "num_groups": 8}], ids=["LN", "GN"])
@pytest.mark.parametrize("name", PROXIED)
@torch.no_grad()
def test_proxy_norms_in_the_place_of_pairs_fold_and_go_through_exports(name, options):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    replace_norm_activation_pairs(model, **options)
    for module in model.modules():
        if isinstance(module, ProxyNorm):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 3, 33, 33)
    _, report = check(trained(model) if name == "resnet18" else model.eval(), x)
    assert (len(report.folded), len(report.cached)) == PROXIED[name]
    assert not report.left
    model.float()
    folded, _ = fold_norms(model)
    expected = model(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4)
    program = torch.export.export(folded, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("erfinv" in target or "batch_norm" in target for target in targets)
    torch.testing.assert_close(program.module()(x), folded(x), rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.onnx.export(folded, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-3, atol=1e-3)
