"""IEBN against its equations, in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.norms import (
    InstanceEnhancementBatchNorm,
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


def _x(seed=0, num_rows=5, shape=(4, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, C, *shape, dtype=torch.float64, generator=generator)
    offset = torch.randn(num_rows, C, *[1] * len(shape), dtype=torch.float64, generator=generator)
    return (x + 2 * offset).to(dtype)


def _v(x):
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99)).to(x.dtype)


def _norm(**options):
    norm = build_norm("IEBN", C, **{"dim": 2, **options}).double()
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(torch.randn(C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return norm


def reference(norm, x, mean=None, var=None):
    """``mean`` and ``var`` (C,): the running ones; by default the batch's."""
    dims, column = (0, *range(2, x.ndim)), (1, C, *[1] * (x.ndim - 2))
    mean = x.mean(dims) if mean is None else mean
    var = (x - mean.view(column)).square().mean(dims) if var is None else var
    instance = x.mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x
    gate = torch.sigmoid(norm.gate_weight.view(column) * instance + norm.gate_bias.view(column))
    xhat = (x - mean.view(column)) / (var.view(column) + EPS).sqrt()
    if norm.weight is None:
        return gate * xhat
    return norm.weight.view(column) * gate * xhat + norm.bias.view(column)


def _gradients(run, x, parameters, v=None):
    leaf = x.detach().clone().requires_grad_(True)
    y = run(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], _v(x) if v is None else v)]


def _close(some, others, tolerance=1e-9):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ the equations


@given(st.integers(2, 6), st.sampled_from([(), (5,), (4, 3), (2, 2, 2)]), st.booleans(), st.booleans())
def test_values_and_gradients_are_those_of_the_equations(num_rows, shape, affine, train):
    norm, x = _norm(dim=None, affine=affine), _x(num_rows, num_rows, shape)
    norm(_x(50, 4, shape))
    norm.train(train)
    statistics = () if train else (norm.running_mean.clone(), norm.running_var.clone())
    ours = _gradients(norm, x, norm.parameters())
    _close(ours, _gradients(lambda leaf: reference(norm, leaf, *statistics), x, norm.parameters()))


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(train):
    norm = _norm()
    norm(_x())
    norm.train(train)
    names = [name for name, _ in norm.named_parameters()]
    leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (_x(1, 3, (2, 2)), *norm.parameters())]

    def run(x, *parameters):
        return torch.func.functional_call(copy.deepcopy(norm), dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_batch_norms(momentum):
    norm, twin = _norm(momentum=momentum), nn.BatchNorm2d(C, momentum=momentum).double()
    for step in range(4):
        norm(_x(step, 3 + step))
        twin(_x(step, 3 + step))
    _close([norm.running_mean, norm.running_var], [twin.running_mean, twin.running_var])
    assert norm.num_batches_tracked == 4


def test_initially_it_is_a_share_of_batch_norm():
    norm, twin = build_norm("IEBN", C), nn.BatchNorm2d(C)
    share = 1 / (1 + math.e)
    assert share == pytest.approx(0.2689, abs=1e-4)
    for mode in (True, False):
        x = _x(0, dtype=torch.float32)
        _close([norm.train(mode)(x)], [share * twin.train(mode)(x)], 1e-6)
    assert [norm.gate_weight.tolist(), norm.gate_bias.tolist()] == [[0.0] * C, [-1.0] * C]
    norm.gate_bias.data.zero_()
    norm.reset_parameters()
    assert norm.gate_bias.tolist() == [-1.0] * C


def test_the_gate_is_each_samples_own_also_in_eval():
    """What a sample becomes in eval does not depend on the others."""
    norm = _norm()
    norm(_x())
    norm.eval()
    x = _x(1, 4)
    alone = torch.cat([norm(row) for row in x.split(1)])
    _close([norm(x)], [alone], 1e-12)
    assert not torch.allclose((norm(x) / (x - norm.running_mean.view(1, C, 1, 1)))[0], norm(x)[1])


# ------------------------------------------------------------------------------------ groups, ranks, again


def test_groups_of_rows_are_batches_of_their_own():
    norm, x, sizes = _norm(), _x(num_rows=8), [3, 1, 4]
    with normalization_scope(Partition.consecutive(sizes)):
        ours = _gradients(norm, x, norm.parameters())
    theirs = _gradients(
        lambda leaf: torch.cat([reference(norm, part) for part in leaf.split(sizes)]), x, norm.parameters()
    )
    _close(ours, theirs)
    values = x.transpose(0, 1).flatten(1)
    _close([norm.running_mean, norm.running_var], [0.1 * values.mean(1), 0.9 + 0.1 * values.var(1)])


def _on_a_rank(rank, world_size, splits):
    norm = _norm()
    for step, sizes in enumerate(splits):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = _x(step, sum(sizes))
        with normalization_scope(Partition(across_ranks=True)):
            results = _gradients(norm, x[mine], norm.parameters(), _v(x)[mine])
    return [*(value.numpy() for value in results), *(value.numpy() for value in norm.buffers())]


def test_a_batch_over_ranks_is_one_process():
    splits = [(4, 3), (5, 0), (0, 6), (2, 6)]
    norm = _norm()
    for step, sizes in enumerate(splits):
        y, dx, *gradients = _gradients(norm, _x(step, sum(sizes)), norm.parameters())
    ranks = [[torch.from_numpy(item) for item in rank] for rank in run_ranks(_on_a_rank, 2, splits, timeout=20)]
    _close([torch.cat(parts) for parts in zip(ranks[0][:2], ranks[1][:2], strict=True)], [y, dx])
    _close([sum(parts) for parts in zip(ranks[0][2:6], ranks[1][2:6], strict=True)], gradients)
    for rank in ranks:
        _close(rank[6:], norm.buffers())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(use_reentrant):
    norm, twin, x = _norm(), _norm(), _x().requires_grad_(True)
    checkpoint(norm, x, use_reentrant=use_reentrant).backward(_v(x))
    _, *expected = _gradients(twin, x, twin.parameters())
    _close([x.grad, *(parameter.grad for parameter in norm.parameters())], expected)
    _close(norm.buffers(), twin.buffers())


def test_torch_compile_gives_the_eager_answer():
    torch.compiler.reset()
    norm = _norm()
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager")
    for step in range(2):
        _close(_gradients(compiled, _x(step), twin.parameters()), _gradients(norm, _x(step), norm.parameters()))
    _close(twin.state_dict().values(), norm.state_dict().values())
    torch.compiler.reset()
    compiled = torch.compile(twin.eval(), backend="aot_eager", fullgraph=True)
    _close(_gradients(compiled, _x(5), twin.parameters()), _gradients(norm.eval(), _x(5), norm.parameters()))


# ------------------------------------------------------------------------------------ modes and tools


def test_the_batchs_own_statistics_on_request():
    norm = _norm()
    norm(_x())
    before = copy.deepcopy(norm.state_dict())
    for mode in (True, False):
        with batch_statistics(norm.train(mode)):
            _close([norm(_x(1))], [reference(norm, _x(1))])
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    untracked = _norm(track_running_stats=False).eval()
    _close([untracked(_x(1))], [reference(untracked, _x(1))])


def test_frozen_it_uses_the_running_statistics_but_its_own_gate():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    before = copy.deepcopy(model.state_dict())
    FreezeBN(at=0).step(model, 0, 10)
    _close([model.train()(_x(5))], [reference(model[0], _x(5), model[0].running_mean, model[0].running_var)])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_precise_statistics_are_those_of_its_input():
    model = nn.Sequential(_norm())
    batches = [_x(step) for step in range(4)]
    precise_bn(model.eval(), batches, progress=False)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    _close([model[0].running_mean, model[0].running_var], [values.mean(1), values.var(1)])


def test_conversion_starts_with_the_initial_gate():
    model = nn.Sequential(nn.BatchNorm2d(C).double())
    for step in range(3):
        model(_x(step))
    expected, state, weight = model.eval()(_x(5)), copy.deepcopy(model.state_dict()), model[0].weight
    convert_norms(model, "IEBN")
    assert isinstance(model[0], InstanceEnhancementBatchNorm)
    assert model[0].weight is weight
    assert model[0].gate_bias.dtype == torch.float64
    _close([model(_x(5))], [torch.sigmoid(torch.tensor(-1.0).double()) * expected], 1e-12)
    convert_norms(model, "BN")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_state_loads_back():
    norm, other = _norm(), build_norm("IEBN", C).double()
    norm(_x())
    assert set(norm.state_dict()) - set(nn.BatchNorm2d(C).state_dict()) == {"gate_weight", "gate_bias"}
    other.load_state_dict(norm.state_dict())
    _close([other(_x(1))], [norm(_x(1))], 0)
    _close(other.state_dict().values(), norm.state_dict().values(), 0)


# ------------------------------------------------------------------------------------ inputs


def test_layouts_give_the_same():
    norm, twin = _norm(), _norm()
    last = _x().contiguous(memory_format=torch.channels_last)
    for mode in (True, False):
        norm.train(mode)
        twin.train(mode)
        _close(_gradients(twin, last, twin.parameters()), _gradients(norm, _x(), norm.parameters()))
        assert copy.deepcopy(twin)(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_bfloat16(autocast, train):
    norm, exact = _norm().float().train(train), _norm().train(train)
    for step in range(3):
        x = _x(step, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = _gradients(norm, x, norm.parameters())
        theirs = _gradients(exact, x.double(), exact.parameters(), _v(x).double())
        assert ours[0].dtype == torch.bfloat16
        _close(ours[:2], theirs[:2], 3e-2)
        _close(ours[2:], theirs[2:], 1e-3 if train else 5e-2)  # eval leaves the sums to torch
    _close(norm.buffers(), exact.buffers(), 1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(), (4, 3)])
def test_an_empty_batch_leaves_everything_as_it_is(train, shape):
    norm = _norm(dim=None).float().train(train)
    norm(_x(0, shape=shape, dtype=torch.float32))
    before = copy.deepcopy(norm.state_dict())
    y, *gradients = _gradients(norm, _x(1, 0, shape, dtype=torch.float32), norm.parameters())
    assert y.shape == (0, C, *shape)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_a_batch_of_one_is_defined_and_one_value_is_refused():
    """Like an instance norm's; a single value is its own mean and has no variance: torch's error, as for BN."""
    norm = _norm(dim=None)
    _close([norm(_x(num_rows=1))], [reference(norm, _x(num_rows=1))])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(_x(num_rows=1, shape=()))
