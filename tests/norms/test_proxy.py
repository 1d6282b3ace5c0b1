import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import leakfree.norms.proxied as proxied
import leakfree.norms.proxy as proxy_module
from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import ProxyNorm, build_norm
from leakfree.norms.proxy import ACTIVATIONS
from tests.norms.equations import proxy_norm as reference

FUNCTIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "mish": F.mish,
}
NORMS = [{}, {"norm": "GN", "num_groups": 3}]


def make(channels=6, **options):
    norm = build_norm("ProxyNorm", channels, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(channels, generator=generator) * 0.5)
    return norm


def parameters_of(norm):
    return [norm.weight, norm.bias, norm.proxy_scale, norm.proxy_shift]


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_it_is_its_definition_with_all_gradients(options, activation, data):
    positions = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    last = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 100)))
    x = torch.randn(data.draw(st.integers(1, 3)), 6, *positions, dtype=torch.float64) * 2
    x += data.draw(st.sampled_from([0.0, 5.0, 300.0]))
    x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()
    norm = make(activation=activation, **options).double()
    inputs = [x, *parameters_of(norm)]
    y = norm(x)
    expected = reference(*inputs, FUNCTIONS[activation], norm.num_groups)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert torch.equal(norm.eval()(x), y)


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("last", [False, True])
def test_parts_of_the_batch_change_nothing(options, activation, last, monkeypatch):
    norm = make(activation=activation, **options)
    x = torch.randn(5, 6, 4, 4).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x.requires_grad_()
    dy = torch.randn(5, 6, 4, 4)
    whole = norm(x)
    gradients = torch.autograd.grad(whole, [x, *parameters_of(norm)], dy)
    monkeypatch.setattr(proxied, "_PART_BYTES", 8)
    parts = norm(x)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(parts, [x, *parameters_of(norm)], dy), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("last", [False, True])
def test_float32_is_as_exact_as_its_input(mean, options, last):
    norm = make(12, **options)
    x = torch.randn(4, 12, 16, 16) + mean
    x[1] -= mean  # beside samples that are near
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    expected = reference(x.double(), *(p.double() for p in parameters_of(norm)), F.relu, norm.num_groups)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=5e-6 + 1e-6 * mean)


def test_at_first_relu_is_shifted_by_its_mean_and_divided_by_its_deviation():
    for activation, mean, var in (("relu", 0.39845, 0.33803), ("silu", 0.20605, 0.31000)):
        norm, x = build_norm("ProxyNorm", 4, activation=activation), torch.randn(3, 4, 5, 5)
        found = norm.proxy_moments()
        torch.testing.assert_close(found[0], torch.full((4,), mean), rtol=0, atol=6e-6)
        torch.testing.assert_close(found[1], torch.full((4,), var), rtol=0, atol=6e-6)
        z = FUNCTIONS[activation](F.group_norm(x, 1))
        torch.testing.assert_close(norm(x), (z - mean) / math.sqrt(var + 0.03), rtol=0, atol=1e-4)


def test_more_points_come_nearer_to_the_expectation():
    exact = 1 / math.sqrt(2 * math.pi), 0.5 - 1 / (2 * math.pi)
    errors = [
        max(abs(float(found[0]) - value) for found, value in zip(norm.proxy_moments(), exact, strict=True))
        for norm in (build_norm("ProxyNorm", 2, num_points=n) for n in (20, 200, 2000))
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_it_has_four_parameters_and_says_which_decay():
    norm = build_norm("ProxyNorm", 5)
    assert sum(parameter.numel() for parameter in norm.parameters()) == 4 * 5
    assert [float(p.detach().mean()) for p in parameters_of(norm)] == [1, 0, 0, 0]
    assert {id(p) for p in norm.proxy_parameters()} == {id(norm.proxy_scale), id(norm.proxy_shift)}
    assert not list(norm.buffers())


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("mean", [0, 2, 1000])
def test_a_sample_does_not_see_the_others(options, memory_format, activation, mean):
    norm, x = make(activation=activation, **options), torch.randn(4, 6, 5, 5).contiguous(memory_format=memory_format)
    x[:3] += 5  # so that other samples have other ways to their moments
    others = [torch.randn(1, 6, 5, 5) * 10 + mean, x[2:3], torch.randn(1, 6, 5, 5)]
    other = torch.cat([x[:1], *others]).contiguous(memory_format=memory_format)
    dy = torch.randn(4, 6, 5, 5)
    found = []
    for batch in (x, other):
        item = batch.clone().requires_grad_()
        y = norm(item)
        found.append((y, *torch.autograd.grad(y, item, dy)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])


def test_a_gradient_does_not_reach_the_others():
    norm, x = make(), torch.randn(4, 6, 5, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x)[2].square().sum(), x)
    assert gradient[2].any()
    assert not gradient[[0, 1, 3]].any()


class _Counter:
    def __init__(self, monkeypatch):
        self.count, compute = 0, proxy_module.activated_proxy

        def counted(*args):
            self.count += 1
            return compute(*args)

        monkeypatch.setattr(proxy_module, "activated_proxy", counted)


def test_the_proxy_is_computed_once_for_each_value_of_the_parameters(monkeypatch):
    counter, norm, x = _Counter(monkeypatch), make(), torch.randn(2, 6, 3, 3)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        (norm(x).square().sum() + norm(2 * x).square().sum()).backward()
        assert counter.count == step
        optimizer.step()
    norm.eval()
    with torch.no_grad():
        for _ in range(3):
            norm(x)
    assert counter.count == 4
    norm.weight.data.mul_(2)  # the version does not tell
    changed = norm(x)
    assert counter.count == 5
    expected = reference(x, *parameters_of(norm), F.relu, 1)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)


def test_several_forwards_of_a_step_train_as_the_definition_does():
    norm = make(activation="silu").double()
    twins = [parameter.detach().clone().requires_grad_() for parameter in parameters_of(norm)]
    optimizers = [torch.optim.SGD(tensors, lr=0.1) for tensors in (parameters_of(norm), twins)]
    for _ in range(3):
        a, b = torch.randn(2, 2, 6, 4, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (norm(a) * norm(b)).cos().sum().backward()
        (reference(a, *twins, F.silu, 1) * reference(b, *twins, F.silu, 1)).cos().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(parameters_of(norm), twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_step_between_forward_and_backward_is_an_error():
    norm = make()
    y = norm(torch.randn(2, 6, 3, 3))
    with torch.no_grad():
        norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_half_precision_and_autocast(options, activation):
    norm, x = make(activation=activation, **options), torch.randn(3, 6, 4, 4).bfloat16()
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    outputs = [norm(item) for item in inputs]
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=1e-2, atol=1e-2)
    dy = torch.randn(3, 6, 4, 4).bfloat16()
    found = [
        torch.autograd.grad(y, [item, *norm.parameters()], dy.to(y.dtype), retain_graph=True)
        for y, item in zip(outputs, inputs, strict=True)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x.float()), outputs[1])
        assert torch.equal(norm(x), outputs[0])
    small = copy.deepcopy(norm).bfloat16()
    assert small(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 3, 3), (2, 6, 0)])
def test_no_values_give_zero_gradients(shape):
    norm, x = make(), torch.randn(shape, requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(not parameter.grad.any() for parameter in norm.parameters())


def test_expanded_gradients_and_strided_inputs():
    norm = make().double()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64).transpose(1, 2).requires_grad_()
    inputs = [x, *parameters_of(norm)]
    ours = torch.autograd.grad(norm(x).sum(), inputs)
    theirs = torch.autograd.grad(reference(*inputs, F.relu, 1).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_it_keeps_only_the_input_for_the_backward():
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        make(16)(x)
    assert saved.count(x.numel()) == 1
    assert sum(saved) < 1.01 * x.numel()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_memory_is_at_most_four_times_the_input(last, dtype, activation):
    norm = make(16, activation=activation)
    x = torch.randn(8, 16, 64, 64).to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    dy = torch.randn_like(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        norm(x).backward(dy)
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=_start)
    held, peak = 0, 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    assert len(events) > 4
    assert peak <= 4 * x.numel() * x.element_size()


def _start(event):
    return event.start_ns()


def test_without_a_bias_it_is_zero():
    norm, twin, x = make(), make(), torch.randn(2, 6, 3, 3)
    norm.register_parameter("bias", None)
    with torch.no_grad():
        twin.bias.zero_()
    assert torch.equal(norm(x), twin(x))
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_mistakes_name_what_would_be_right():
    for options, message in [
        ({"norm": "BN"}, "unknown norm='BN'; choose from LN, GN"),
        ({"activation": "rlu"}, "unknown activation='rlu'; choose from relu"),
        ({"norm": "GN", "num_groups": 4}, "ProxyNorm: num_groups=4 does not divide 6 channels; use one of 1, 2, 3, 6"),
        ({"num_groups": 2}, "num_groups=2 is for norm='GN'"),
        ({"num_points": 1}, "num_points must be at least 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_norm("ProxyNorm", 6, **options)
    with pytest.raises(LeakfreeError, match=r"ProxyNorm expects \(N, 6, \*\), got \(2, 5\)"):
        make()(torch.randn(2, 5))
    with pytest.raises(LeakfreeError, match="single value"):
        ProxyNorm(6, norm="GN", num_groups=6)(torch.randn(2, 6))


def test_on_other_devices_the_version_of_the_parameters_tells_in_eval(monkeypatch):
    counter = _Counter(monkeypatch)
    norm, x = make(activation="silu").to("meta"), torch.randn(2, 6, 3, 3, device="meta", requires_grad=True)
    for _ in range(2):  # in training it is not asked
        y = norm(x)
        y.sum().backward()
        assert x.grad.shape == y.shape == x.shape
    assert counter.count == 2
    norm.eval()
    for count in (3, 3):
        norm(x)
        assert counter.count == count
    with torch.no_grad():
        norm.bias.add_(1)
    norm(x)
    assert counter.count == 4
    norm.weight.data = torch.ones(6, device="meta")
    norm.train().eval()
    norm(x)
    assert counter.count == 5
