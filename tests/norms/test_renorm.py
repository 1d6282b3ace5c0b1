"""BatchRenorm against the paper's algorithm, written out in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.errors import ConfigError
from leakfree.norms import (
    BatchRenorm,
    Partition,
    batch_statistics,
    build_norm,
    convert_norms,
    normalization_scope,
)
from leakfree.population import precise_bn
from leakfree.schedules import FreezeBN
from tests.ranks import run_ranks

C = 3
EPS = 1e-5
RAMP = (1, 4, 6)


def _x(seed=0, num_rows=6, shape=(4, 4), dtype=torch.float64):
    """Batches whose statistics differ, so that some corrections are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, C, *shape, dtype=torch.float64, generator=generator)
    scale, shift = torch.rand(2, C, dtype=torch.float64, generator=generator) + 0.5
    column = (1, C, *[1] * len(shape))
    return (x * scale.view(column) * 2 + shift.view(column)).to(dtype)


def _v(x):
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99)).to(x.dtype)


def _norm(momentum=0.3, ramp=RAMP, r_max=1.5, d_max=0.4, **options):
    norm = build_norm("BatchRenorm", C, momentum=momentum, ramp=ramp, r_max=r_max, d_max=d_max, **options).double()
    for parameter, seed in zip(norm.parameters(), (1, 2), strict=False):
        parameter.data.copy_(torch.randn(C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return norm


class Reference:
    """Ioffe 2017, algorithm 1: moving mean and standard deviation, r and d without gradient."""

    def __init__(self, momentum, ramp, r_max, d_max):
        self.momentum, self.ramp, self.r_max, self.d_max = momentum, ramp, r_max, d_max
        self.mean = torch.zeros(C, dtype=torch.float64)
        self.std = torch.full((C,), math.sqrt(1 + EPS), dtype=torch.float64)
        self.steps = 0
        self.clipped = []

    def limits(self):
        if self.ramp is None:
            return self.r_max, self.d_max
        start, end_d, end_r = self.ramp
        r, d = (min(max((self.steps - start) / (end - start), 0), 1) for end in (end_r, end_d))
        return 1 + r * (self.r_max - 1), d * self.d_max

    def __call__(self, x, weight, bias):
        dims, column = (0, *range(2, x.ndim)), (1, C, *[1] * (x.ndim - 2))
        mean = x.mean(dims)
        std = ((x - mean.view(column)).square().mean(dims) + EPS).sqrt()
        r_max, d_max = self.limits()
        with torch.no_grad():
            r, d = std / self.std, (mean - self.mean) / self.std
            self.clipped.append(bool(((r > r_max) | (r < 1 / r_max) | (d.abs() > d_max)).any()))
            r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
        xhat = (x - mean.view(column)) / std.view(column) * r.view(column) + d.view(column)
        self.steps += 1
        momentum = 1 / self.steps if self.momentum is None else self.momentum
        with torch.no_grad():
            self.mean = self.mean + momentum * (mean - self.mean)
            self.std = self.std + momentum * (std - self.std)
        return xhat * weight.view(column) + bias.view(column)

    def in_eval(self, x, weight, bias):
        column = (1, C, *[1] * (x.ndim - 2))
        xhat = (x - self.mean.view(column)) / self.std.view(column)
        return xhat * weight.view(column) + bias.view(column)


def _gradients(run, x, parameters, v=None):
    leaf = x.detach().clone().requires_grad_(True)
    y = run(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], _v(x) if v is None else v)]


def _close(some, others, tolerance=1e-9):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ the paper


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("ramp", [RAMP, None])
@pytest.mark.parametrize("shape", [(), (5,), (4, 4), (2, 2, 3)])
def test_it_is_the_papers_algorithm(momentum, ramp, shape):
    norm = _norm(momentum, ramp, dim={0: 1, 1: 1, 2: 2, 3: 3}[len(shape)])
    reference = Reference(momentum, ramp, 1.5, 0.4)
    for step in range(8):
        x = _x(step, 4 + step, shape)
        ours = _gradients(norm, x, norm.parameters())
        theirs = _gradients(lambda leaf: reference(leaf, *norm.parameters()), x, norm.parameters())
        _close(ours, theirs)
        _close([norm.running_mean, norm.running_var], [reference.mean, reference.std**2 - EPS])
        assert norm.num_batches_tracked == step + 1
    assert any(reference.clipped)
    _close([norm.eval()(_x(50, shape=shape))], [reference.in_eval(_x(50, shape=shape), *norm.parameters())])


@settings(max_examples=25)
@given(st.integers(0, 60), st.integers(0, 9), st.integers(1, 30), st.integers(1, 30))
def test_the_ramp_is_linear_from_batch_norm_to_the_limits(done, start, length_d, length_r):
    ramp = start, start + length_d, start + length_r
    norm, reference = _norm(ramp=ramp, r_max=3.0, d_max=5.0), Reference(0.1, ramp, 3.0, 5.0)
    norm.num_batches_tracked.fill_(done)
    reference.steps = done
    r_max, d_max = norm.limits()
    assert r_max.item() == pytest.approx(reference.limits()[0])
    assert d_max.item() == pytest.approx(reference.limits()[1])


def test_the_default_limits_are_the_papers():
    norm = build_norm("BatchRenorm", C)
    for done, limits in (
        (0, (1, 0)),
        (5_000, (1, 0)),
        (22_500, (2, 4.375)),
        (25_000, (2 + 1 / 7, 5)),
        (40_000, (3, 5)),
    ):
        norm.num_batches_tracked.fill_(done)
        assert [value.item() for value in norm.limits()] == pytest.approx(limits)


@pytest.mark.parametrize("options", [{"r_max": 1.0, "d_max": 0.0, "ramp": None}, {"ramp": (100, 200, 200)}])
def test_without_correction_it_is_batch_norm(options):
    norm, twin = _norm(**options), nn.BatchNorm2d(C).double()
    twin.load_state_dict(norm.state_dict())
    for step in range(3):
        _close(_gradients(norm, _x(step), norm.parameters()), _gradients(twin, _x(step), twin.parameters()))


def test_unclipped_it_normalizes_by_the_moving_averages():
    norm = _norm(ramp=None, r_max=100.0, d_max=100.0)
    for step in range(4):
        expected = copy.deepcopy(norm).eval()(_x(step))
        _close([norm(_x(step))], [expected])


def test_gradcheck():
    """Where r and d are clipped: there they are constants to numerical differences too."""
    norm = _norm(ramp=None, r_max=1.1, d_max=0.05)
    x = 3 * _x(9, 4, (2, 2)) + 2

    def run(x, weight, bias):
        layer = copy.deepcopy(norm)  # a forward moves the averages
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (x, *norm.parameters())]
    assert torch.autograd.gradcheck(run, leaves)


# ------------------------------------------------------------------------------------ groups, ranks


def test_base_groups_are_batches_of_their_own_and_the_averages_get_their_mean():
    norm = _norm()
    for step in range(3):
        norm(_x(step))
    sizes, x = [3, 1, 4], _x(5, 8)
    twins = [copy.deepcopy(norm) for _ in sizes]
    std = (norm.running_var + EPS).sqrt()
    with normalization_scope(Partition.consecutive(sizes)):
        y = norm(x)
    parts = x.split(sizes)
    _close([y], [torch.cat([twin(part) for twin, part in zip(twins, parts, strict=True)])])
    weights = torch.tensor(sizes).double() / 8
    mean = sum(w * twin.running_mean for w, twin in zip(weights, twins, strict=True))
    new = sum(w * (twin.running_var + EPS).sqrt() for w, twin in zip(weights, twins, strict=True))
    _close([norm.running_mean, norm.running_var], [mean, new**2 - EPS])
    assert not torch.allclose(std, new)
    assert norm.num_batches_tracked == 4


def _on_a_rank(rank, world_size, splits):
    norm = _norm()
    for step, sizes in enumerate(splits):
        part = _x(step, sum(sizes))[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        with normalization_scope(Partition(across_ranks=True)):
            y = norm(part.requires_grad_(True))
        (dx,) = torch.autograd.grad(y, part, _v(_x(step, sum(sizes)))[sum(sizes[:rank]) : sum(sizes[: rank + 1])])
    return [y.detach().numpy(), dx.numpy(), *(value.numpy() for value in norm.state_dict().values())]


def test_a_group_over_ranks_is_one_process():
    splits = [(4, 3), (5, 0), (0, 6), (2, 6)]
    norm = _norm()
    for step, sizes in enumerate(splits):
        y, dx = _gradients(norm, _x(step, sum(sizes)), [])
    first, second = run_ranks(_on_a_rank, 2, splits, timeout=20)
    _close(
        [torch.cat([torch.from_numpy(a), torch.from_numpy(b)]) for a, b in zip(first[:2], second[:2], strict=True)],
        [y, dx],
    )
    for rank in (first, second):
        _close([torch.from_numpy(value) for value in rank[2:]], norm.state_dict().values())


# ------------------------------------------------------------------------------------ forwards that run twice


def _train(use_reentrant, steps=5):
    torch.manual_seed(0)
    norms = [_norm(), _norm()]
    body = nn.Sequential(nn.Conv2d(C, C, 1), norms[0], nn.ReLU(), nn.Conv2d(C, C, 1), norms[1]).double()
    optimizer = torch.optim.SGD(body.parameters(), 0.1)
    gradients = []
    for step in range(steps):
        optimizer.zero_grad()
        losses = []
        for part in (0, 1):  # two forwards wait for their backward at a time
            x = _x(2 * step + part).requires_grad_(True)
            y = body(x) if use_reentrant is None else checkpoint(body, x, use_reentrant=use_reentrant)
            losses.append((y * _v(y)).sum())
        sum(losses).backward()
        gradients += [parameter.grad.clone() for parameter in body.parameters()]
        optimizer.step()
    return gradients, body.state_dict()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once_and_keeps_its_correction(use_reentrant):
    gradients, state = _train(use_reentrant)
    expected, expected_state = _train(None)
    _close(gradients, expected, 1e-8)
    _close(state.values(), expected_state.values(), 1e-8)
    assert state["1.num_batches_tracked"] == 10


def test_a_recomputation_whose_forward_is_forgotten_is_refused():
    norm, x = _norm(), _x().requires_grad_(True)
    y = checkpoint(norm, x, use_reentrant=False)
    for step in range(40):
        norm(_x(step + 1))
    with pytest.raises(RuntimeError, match=r"BatchRenorm: .* its input is that of no recent forward"):
        y.sum().backward()


def test_torch_compile_gives_the_eager_answer():
    torch.compiler.reset()
    norm = _norm()
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager")
    for step in range(3):
        _close(_gradients(compiled, _x(step), twin.parameters()), _gradients(norm, _x(step), norm.parameters()))
    _close(twin.state_dict().values(), norm.state_dict().values())
    torch.compiler.reset()
    compiled = torch.compile(twin.eval(), backend="aot_eager", fullgraph=True)
    _close([compiled(_x(5))], [norm.eval()(_x(5))])


# ------------------------------------------------------------------------------------ modes and tools


def test_frozen_it_uses_the_averages_and_leaves_them_alone():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    before = copy.deepcopy(model.state_dict())
    FreezeBN(at=0).step(model, 0, 10)
    y = model.train()(_x(5))
    _close([y], [copy.deepcopy(model).eval()(_x(5))], 0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_precise_bn_fills_its_buffers_and_nothing_else():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    counter = model[0].num_batches_tracked.clone()
    batches = [_x(step) for step in range(4)]
    precise_bn(model.eval(), batches, progress=False)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    _close([model[0].running_mean, model[0].running_var], [values.mean(1), values.var(1)])
    assert torch.equal(model[0].num_batches_tracked, counter)


def test_conversion_keeps_eval_outputs_both_ways():
    model = nn.Sequential(nn.BatchNorm2d(C).double())
    for step in range(3):
        model(_x(step))
    expected, state = model.eval()(_x(5)), copy.deepcopy(model.state_dict())
    convert_norms(model, "BatchRenorm", ramp=None)
    assert isinstance(model[0], BatchRenorm)
    _close([model(_x(5))], [expected], 0)
    convert_norms(model, "BN")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_batchs_own_statistics_on_request():
    """Plain BN: no correction, no buffers, and with the groups of the scope."""
    norm = _norm()
    for step in range(5):
        norm(_x(step))
    before = copy.deepcopy(norm.state_dict())
    x = _x(7)
    xhat = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + EPS).sqrt()
    expected = xhat * norm.weight.view(1, C, 1, 1) + norm.bias.view(1, C, 1, 1)
    for mode in (True, False):
        with batch_statistics(norm.train(mode)):
            _close([norm(x)], [expected])
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_a_resumed_run_is_the_same_run():
    norm = _norm()
    for step in range(4):
        norm(_x(step))
    other = _norm()
    other.load_state_dict(norm.state_dict())
    _close([other(_x(4))], [norm(_x(4))], 0)
    _close(other.state_dict().values(), norm.state_dict().values(), 0)


# ------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("affine", [True, False])
def test_layouts_give_the_same(affine):
    norm = _norm(affine=affine)
    for step in range(4):
        norm(_x(step))
    twin = copy.deepcopy(norm)
    last = _x(5).contiguous(memory_format=torch.channels_last)
    _close(_gradients(twin, last, twin.parameters()), _gradients(norm, _x(5), norm.parameters()))
    assert twin(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    norm, exact = _norm().float(), _norm()
    for step in range(5):
        x = _x(step, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = _gradients(norm, x, norm.parameters())
        theirs = _gradients(exact, x.double(), exact.parameters(), _v(x).double())
        assert ours[0].dtype == torch.bfloat16
        _close(ours[:2], theirs[:2], 3e-2)
        _close(ours[2:], theirs[2:], 1e-3)
    assert norm.running_var.dtype == torch.float32
    _close(norm.state_dict().values(), exact.state_dict().values(), 1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_leaves_everything_as_it_is(train, dtype):
    norm = _norm().to(dtype).train(train)
    norm(_x(0, dtype=dtype))
    before = copy.deepcopy(norm.state_dict())
    y, *gradients = _gradients(norm, _x(1, 0, dtype=dtype), norm.parameters())
    assert y.shape == (0, C, 4, 4)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_a_single_value_is_normalized_by_the_averages_as_far_as_the_limits_allow():
    """Its own deviation is 0, so what is left is d."""
    norm = _norm(ramp=None, dim=1)
    for step in range(3):
        norm(_x(step, shape=()))
    x = _x(7, 1, ())
    d = ((x - norm.running_mean) / (norm.running_var + EPS).sqrt()).clamp(-0.4, 0.4)
    _close([norm(x)], [d * norm.weight + norm.bias])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "r_max must be at least 1 and d_max at least 0, got 0.5"),
        ({"d_max": -1.0}, "d_max at least 0"),
        ({"ramp": (5, 5, 9)}, r"start before both ends, got \(5, 5, 9\)"),
        ({"ramp": (5, 9)}, "ramp takes"),
        ({"track_running_stats": False}, "track_running_stats must be True"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        build_norm("BatchRenorm", C, **options)
