import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms import ProxyNorm, build_norm, convert_norms, replace_norm_activation_pairs
from leakfree.norms.pairs import ProxiedActivation


def _proxied(norm, x, activation=F.relu):
    """What a pair becomes, from the equations: LN over the sample, affine, activation, the proxy's standardization."""
    mean, var = norm.proxy_moments()
    z = activation(F.group_norm(x, 1, norm.weight, norm.bias))
    return (z - mean[:, None, None]) / (var[:, None, None] + 0.03).sqrt()


def _resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4)


def test_resnet18_is_what_its_blocks_say():
    model = _resnet18()
    expected = {f"layer{stage}.{block}.bn1": f"layer{stage}.{block}.relu" for stage in range(1, 5) for block in (0, 1)}
    assert replace_norm_activation_pairs(model) == {"bn1": "relu", **expected}
    assert isinstance(model.relu, nn.Identity)  # of the stem alone
    for block in (model.layer1[0], model.layer2[0]):
        assert isinstance(block.bn1, ProxyNorm)
        assert isinstance(block.relu, ProxiedActivation)
        assert type(block.bn2) is nn.BatchNorm2d
        assert block.downsample is None or type(block.downsample[1]) is nn.BatchNorm2d
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        shortcut = x if block.downsample is None else block.downsample(x)
        inner = _proxied(block.bn1, block.conv1(x))
        torch.testing.assert_close(block(x), F.relu(block.bn2(block.conv2(inner)) + shortcut), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 32, 32)
    stem = model.relu(model.bn1(model.conv1(x)))
    torch.testing.assert_close(stem, _proxied(model.bn1, model.conv1(x)), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_bottleneck_has_two_pairs_on_one_relu():
    block = torchvision.models.resnet50().layer1[0]
    assert replace_norm_activation_pairs(block) == {"bn1": "relu", "bn2": "relu"}
    x = torch.randn(2, 64, 8, 8)
    y = _proxied(block.bn2, block.conv2(_proxied(block.bn1, block.conv1(x))))
    expected = F.relu(block.bn3(block.conv3(y)) + block.downsample(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_mobilenet_v3_small_takes_each_pairs_own_activation():
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=4)
    acts = {
        path: type(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ReLU | nn.Hardswish) and path.startswith("features") and ".fc" not in path
    }
    gates = {path: kind for path, kind in acts.items() if path.endswith("activation")}  # of squeeze-excite
    pairs = replace_norm_activation_pairs(model)
    assert set(pairs.values()) == set(acts) - set(gates)
    assert gates
    for norm, activation in pairs.items():
        named = {nn.ReLU: "relu", nn.Hardswish: "hardswish"}[acts[activation]]
        assert model.get_submodule(norm).activation == named
        assert isinstance(model.get_submodule(activation), nn.Identity)
    assert all(type(model.get_submodule(path)) is kind for path, kind in gates.items())
    assert any(type(module) is nn.BatchNorm2d for module in model.modules())  # the projections
    layer = model.features[0]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(layer(x), _proxied(layer[1], layer[0](x), F.hardswish), rtol=1e-4, atol=1e-4)
    model(x).sum().backward()


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "vgg11_bn"])
def test_other_families_run_and_are_independent_of_other_samples_where_no_batch_norm_is_left(name):
    model = getattr(torchvision.models, name)(num_classes=3)
    pairs = replace_norm_activation_pairs(model)
    convert_norms(model, "FrozenBN") if any(type(m) is nn.BatchNorm2d for m in model.modules()) else None
    for module in model.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    assert sum(isinstance(module, ProxyNorm) for module in model.modules()) == len(pairs) >= 8
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0].sum(), x)
    assert gradient[0].any()
    assert not gradient[1].any()


def test_what_is_carried_over():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU()).double().eval()
    weight, bias, calls = model[1].weight, model[1].bias, []
    model[1].register_forward_hook(lambda *args: calls.append(1))
    assert replace_norm_activation_pairs(model, norm="GN", num_groups=2, eps=0.1) == {"1": "2"}
    norm = model[1]
    assert norm.weight is weight
    assert norm.bias is bias
    assert norm.proxy_scale.dtype == torch.float64
    assert not norm.training
    assert (norm.activation, norm.norm, norm.num_groups, norm.eps) == ("silu", "GN", 2, 0.1)
    model(torch.randn(2, 3, 2, 2, dtype=torch.float64))
    assert calls == [1]


def test_where_chooses_and_the_rest_can_follow_later():
    model, whole, x = _resnet18(), _resnet18(), torch.randn(2, 3, 32, 32)
    assert list(replace_norm_activation_pairs(model, where=r"^layer1\.")) == ["layer1.0.bn1", "layer1.1.bn1"]
    assert type(model.bn1) is nn.BatchNorm2d
    assert isinstance(model.relu, nn.ReLU)
    replace_norm_activation_pairs(model)
    replace_norm_activation_pairs(whole)
    assert torch.equal(model.eval()(x), whole.eval()(x))
    with pytest.raises(ConfigError, match="there is no pair of batch norm and activation"):
        replace_norm_activation_pairs(model)


def test_two_pairs_of_a_shared_activation_one_after_the_other():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    model, part = Twice(), Twice()
    replace_norm_activation_pairs(model)
    assert isinstance(model.relu, nn.Identity)
    replace_norm_activation_pairs(part, where="a")
    assert isinstance(part.relu, ProxiedActivation)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(part(x), F.relu(part.b(_proxied(part.a, x))), rtol=1e-4, atol=1e-5)
    replace_norm_activation_pairs(part, where="b")
    torch.testing.assert_close(part(x), model(x))


def test_an_activation_behind_a_proxied_one_still_acts():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(self.bn(x)))

    model, x = Again(), torch.randn(2, 3, 4, 4)
    replace_norm_activation_pairs(model)
    torch.testing.assert_close(model(x), F.relu(_proxied(model.bn, x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_returns_a_tensor_of_its_own_does_not_make_the_activation_act_again(when):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.silu = nn.BatchNorm2d(3), nn.SiLU()

        def forward(self, x):
            return self.silu(self.silu(self.bn(x)) + x)

    model, x = Shared().eval(), torch.randn(2, 3, 4, 4)
    if when == "before":
        model.bn.register_forward_hook(lambda module, args, y: 2 * y)
    replace_norm_activation_pairs(model)
    assert isinstance(model.silu, ProxiedActivation)
    if when == "after":
        model.bn.register_forward_hook(lambda module, args, y: 2 * y)
    expected = F.silu(2 * _proxied(model.bn, x, F.silu) + x)
    for twin in (model, copy.deepcopy(model)):
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


class _Leaves(nn.Module):
    """Norms that no activation module follows alone, and one that has one only in training."""

    def __init__(self):
        super().__init__()
        for name in ("used_twice", "function", "residual", "slope", "sometimes", "output", "uncalled", "good"):
            self.add_module(name, nn.BatchNorm2d(3))
        self.relu, self.leaky, self.end = nn.ReLU(), nn.LeakyReLU(0.3), nn.ReLU()

    def forward(self, x):
        y = self.used_twice(x)
        x = self.relu(y) + y
        x = F.relu(self.function(x))
        x = self.relu(self.residual(x) + x)
        x = self.leaky(self.slope(x))
        x = self.sometimes(x)
        if self.training:
            x = self.relu(x)
        return self.output(self.end(self.good(x)))


def test_what_is_not_a_pair_is_left():
    model = _Leaves()
    assert replace_norm_activation_pairs(model) == {"good": "end"}
    assert sum(type(module) is nn.BatchNorm2d for module in model.modules()) == 7
    assert isinstance(model.relu, nn.ReLU)
    assert all(module.training for module in model.modules())


class _Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x)) if x.mean() > 0 else x


def test_mistakes_are_named_and_change_nothing():
    model = _Branches().eval()
    with pytest.raises(ConfigError, match=r"the forward of _Branches cannot be traced \(TraceError"):
        replace_norm_activation_pairs(model)
    assert not any(module.training for module in model.modules())
    assert type(model.bn) is nn.BatchNorm2d
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU())
    with pytest.raises(ConfigError, match=r"^2: ProxyNorm: num_groups=4 does not divide 6 channels"):
        replace_norm_activation_pairs(model, norm="GN", num_groups=4)
    with pytest.raises(ConfigError, match=r"^0: norm ProxyNorm has no option 'groups'; it takes num_groups"):
        replace_norm_activation_pairs(model, groups=4)
    with pytest.raises(ConfigError, match="where='x' matches no pair; the pairs of the model: 0, 2"):
        replace_norm_activation_pairs(model, where="x")
    with pytest.raises(ConfigError, match="activation: each pair has its own"):
        replace_norm_activation_pairs(model, activation="silu")
    assert [type(module) for module in model] == [nn.BatchNorm2d, nn.ReLU] * 2
    model = nn.Sequential(build_norm("DomainBN", 4, num_domains=2, affine="separate"), nn.ReLU())
    with pytest.raises(ConfigError, match=r"^0: its weight"):
        replace_norm_activation_pairs(model)


def test_norms_with_a_fused_activation_are_pairs_by_themselves():
    class BatchNormAct2d(nn.BatchNorm2d):  # as timm's
        def __init__(self, num_features, act):
            super().__init__(num_features)
            self.drop, self.act = nn.Identity(), act

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    model = nn.Sequential(BatchNormAct2d(3, nn.SiLU()), BatchNormAct2d(3, nn.Identity()), nn.ReLU())
    assert replace_norm_activation_pairs(model) == {"0": "", "1": "2"}
    assert [model[0].activation, model[1].activation] == ["silu", "relu"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), _proxied(model[1], _proxied(model[0], x, F.silu)), rtol=1e-4, atol=1e-5)


def test_converted_models_copy_pickle_compile_and_export():
    model, x = _resnet18(), torch.randn(2, 3, 32, 32)
    replace_norm_activation_pairs(model)
    model.eval()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    block, rows = model.layer2[0], torch.randn(2, 64, 8, 8)
    expected = block(rows)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(block, (rows,)).module()
    torch.testing.assert_close(exported(rows), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_break_between_norm_and_activation_changes_nothing():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            y = self.bn(x)
            torch._dynamo.graph_break()
            return self.relu(self.relu(y) - 1)

    model, x = Broken(), torch.randn(2, 3, 4, 4)
    replace_norm_activation_pairs(model)
    expected = F.relu(_proxied(model.bn, x) - 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected, rtol=1e-4, atol=1e-5)
