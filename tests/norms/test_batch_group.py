"""BGN against its definition on the reshaped tensor, in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.errors import ConfigError
from leakfree.norms import (
    BatchGroupNorm,
    GroupNorm,
    Partition,
    batch_statistics,
    build_norm,
    convert_norms,
    normalization_scope,
)
from leakfree.population import precise_bn
from leakfree.schedules import FreezeBN
from tests.ranks import run_ranks

C, G = 6, 2
EPS = 1e-5


def _x(seed=0, num_rows=5, shape=(4, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, C, *shape, dtype=torch.float64, generator=generator)
    column = (1, C, *[1] * len(shape))
    scale, shift = torch.rand(2, C, dtype=torch.float64, generator=generator) + 0.5
    return (x * scale.view(column) * 2 + 3 * shift.view(column)).to(dtype)


def _v(x):
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99)).to(x.dtype)


def _norm(num_groups=G, **options):
    norm = build_norm("BGN", C, num_groups=num_groups, **{"dim": 2, **options}).double()
    for parameter, seed in zip(norm.parameters(), (1, 2), strict=False):
        parameter.data.copy_(torch.randn(C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return norm


def reference(x, weight, bias, num_groups):
    """(N, G, D / G): one mean and variance over the rows and what is in the group."""
    parts = x.reshape(len(x), num_groups, -1)
    mean = parts.mean((0, 2), keepdim=True)
    var = (parts - mean).square().mean((0, 2), keepdim=True)
    column = (1, C, *[1] * (x.ndim - 2))
    xhat = ((parts - mean) / (var + EPS).sqrt()).reshape(x.shape)
    return xhat * weight.view(column) + bias.view(column)


def group_values(x, num_groups):
    """(G, values)"""
    return x.reshape(len(x), num_groups, -1).transpose(0, 1).flatten(1)


def expected_buffers(batches, num_groups, momentum=0.1):
    mean, var = torch.zeros(num_groups).double(), torch.ones(num_groups).double()
    for step, x in enumerate(batches):
        share = 1 / (step + 1) if momentum is None else momentum
        values = group_values(x, num_groups)
        mean, var = mean + share * (values.mean(1) - mean), var + share * (values.var(1) - var)
    return [table.repeat_interleave(C // num_groups) for table in (mean, var)]


def _gradients(run, x, parameters, v=None):
    leaf = x.detach().clone().requires_grad_(True)
    y = run(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], _v(x) if v is None else v)]


def _close(some, others, tolerance=1e-9):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ the definition


@given(st.integers(1, 6), st.sampled_from([1, 2, 3, 6]), st.sampled_from([(), (5,), (4, 3), (2, 2, 2)]))
def test_values_and_gradients_are_those_of_the_definition(num_rows, num_groups, shape):
    if num_groups == C and num_rows == 1 and not shape:
        return  # a single value per group is BN's error, below
    norm, x = _norm(num_groups, dim=None), _x(num_rows, num_rows, shape)
    ours = _gradients(norm, x, norm.parameters())
    _close(ours, _gradients(lambda leaf: reference(leaf, *norm.parameters(), num_groups), x, norm.parameters()))


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_gradcheck(num_groups):
    norm = _norm(num_groups, track_running_stats=False)
    leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (_x(0, 3, (2, 2)), *norm.parameters())]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x), leaves
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_running_statistics_are_those_of_the_groups_and_eval_uses_them(num_groups, momentum):
    norm = _norm(num_groups, momentum=momentum)
    batches = [_x(step, 3 + step) for step in range(5)]
    for x in batches:
        norm(x)
    mean, var = expected_buffers(batches, num_groups, momentum)
    _close([norm.running_mean, norm.running_var], [mean, var])
    assert norm.num_batches_tracked == 5
    x, column = _x(9), (1, C, 1, 1)
    xhat = (x - mean.view(column)) / (var + EPS).sqrt().view(column)
    _close([norm.eval()(x)], [xhat * norm.weight.view(column) + norm.bias.view(column)])


@pytest.mark.parametrize("num_groups", [C, 32])
def test_as_many_groups_as_channels_are_batch_norm_bit_for_bit(num_groups):
    norm, twin = _norm(num_groups), nn.BatchNorm2d(C).double()
    assert norm.num_groups == C
    twin.load_state_dict(norm.state_dict())
    for step in range(3):
        _close(_gradients(norm, _x(step), norm.parameters()), _gradients(twin, _x(step), twin.parameters()), 0)
    _close(norm.state_dict().values(), twin.state_dict().values(), 0)
    _close([norm.eval()(_x(9))], [twin.eval()(_x(9))], 0)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_a_batch_of_one_is_group_norm(num_groups):
    norm, twin = _norm(num_groups), GroupNorm(C, num_groups=num_groups).double()
    twin.load_state_dict(dict(norm.named_parameters()))
    x = _x(num_rows=1)
    _close(_gradients(norm, x, norm.parameters()), _gradients(twin, x, twin.parameters()))


def test_one_group_of_a_batch_is_one_mean_and_variance():
    x = _x()
    y = _norm(1, affine=False)(x)
    _close([y], [(x - x.mean()) / (x.var(correction=0) + EPS).sqrt()])


def test_a_single_value_per_group_is_batch_norms_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        _norm(C, dim=1)(_x(num_rows=1, shape=()))


def test_the_order_of_the_batch_does_not_matter():
    norm, x = _norm(), _x()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    _close([norm(x[order])], [norm(x)[order]])


# ------------------------------------------------------------------------------------ statistics of channels


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_pooled_channels_are_the_values_of_the_group(num_rows, positions, seed):
    x = _x(seed, num_rows, (positions,))
    mean, var = _norm().pool_channels(x.mean((0, 2)), x.var((0, 2), correction=0))
    values = group_values(x, G)
    _close([mean, var], [table.repeat_interleave(C // G) for table in (values.mean(1), values.var(1, correction=0))])
    again = _norm().pool_channels(mean, var)
    _close(again, [mean, var], 1e-15)


def test_pooling_leaves_its_own_statistics_as_they_are_in_float32():
    norm = _norm(3).float()
    for step in range(4):
        norm(_x(step, dtype=torch.float32))
    twin = convert_norms(copy.deepcopy(norm), "BN").eval()
    x = _x(9, dtype=torch.float32)
    _close([norm.eval()(x)], [twin(x)], 0)


def test_precise_statistics_are_those_of_the_groups():
    model = nn.Sequential(_norm())
    batches = [_x(step, 6) for step in range(4)]
    for x in batches:
        model(x)
    precise_bn(model.eval(), batches, progress=False)
    values = group_values(torch.cat(batches), G)
    expected = [table.repeat_interleave(C // G) for table in (values.mean(1), values.var(1))]
    _close([model[0].running_mean, model[0].running_var], expected)
    y = model(_x(9))
    _close([convert_norms(model, "BN")(_x(9))], [y], 1e-12)


def test_buffers_of_a_batch_norm_are_pooled_and_then_averaged():
    norm, twin = _norm(), nn.BatchNorm2d(C).double()
    for step in range(4):
        twin(_x(step))
    norm.load_state_dict({**twin.state_dict(), **dict(norm.named_parameters())})
    mean, var = norm.pool_channels(twin.running_mean, twin.running_var)
    x, column = _x(9), (1, C, 1, 1)
    expected = (x - mean.view(column)) / (var + EPS).sqrt().view(column)
    expected = expected * norm.weight.view(column) + norm.bias.view(column)
    _close([copy.deepcopy(norm).eval()(x)], [expected])
    norm(x)
    values = group_values(x, G)
    new = [table.repeat_interleave(C // G) for table in (values.mean(1), values.var(1))]
    _close([norm.running_mean, norm.running_var], [0.9 * mean + 0.1 * new[0], 0.9 * var + 0.1 * new[1]])


def test_conversion_keeps_eval_outputs_on_the_way_to_batch_norm():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    expected, weight = model.eval()(_x(9)), model[0].weight
    for name in ("BN", "SyncBN", "BGN", "FrozenBN"):
        convert_norms(model, name, **({"num_groups": G} if name == "BGN" else {}))
        _close([model(_x(9))], [expected], 1e-12)
        assert model[0].weight is weight
    model = convert_norms(nn.Sequential(nn.BatchNorm2d(C)), "BGN", num_groups=3)
    assert isinstance(model[0], BatchGroupNorm)
    assert model[0].num_groups == 3


def test_frozen_it_uses_the_running_statistics_and_leaves_them_alone():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    before = copy.deepcopy(model.state_dict())
    FreezeBN(at=0).step(model, 0, 10)
    _close([model.train()(_x(5))], [copy.deepcopy(model).eval()(_x(5))], 0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------ groups of rows, ranks, again


def test_groups_of_rows_are_batches_of_their_own():
    norm, x, sizes = _norm(), _x(num_rows=8), [3, 1, 4]
    with normalization_scope(Partition.consecutive(sizes)):
        y = norm(x)
    _close([y], [torch.cat([reference(part, *norm.parameters(), G) for part in x.split(sizes)])])
    _close([norm.running_mean, norm.running_var], expected_buffers([x], G))


def test_the_batchs_own_statistics_on_request():
    norm = _norm()
    norm(_x())
    before = copy.deepcopy(norm.state_dict())
    for mode in (True, False):
        with batch_statistics(norm.train(mode)):
            _close([norm(_x(1))], [reference(_x(1), *norm.parameters(), G)])
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    untracked = _norm(track_running_stats=False).eval()
    _close([untracked(_x(1))], [reference(_x(1), *untracked.parameters(), G)])


def _on_a_rank(rank, world_size, splits):
    norm = _norm()
    for step, sizes in enumerate(splits):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = _x(step, sum(sizes))
        with normalization_scope(Partition(across_ranks=True)):
            y, dx = _gradients(norm, x[mine], [], _v(x)[mine])
    return [y.numpy(), dx.numpy(), *(value.numpy() for value in norm.state_dict().values())]


def test_a_batch_over_ranks_is_one_process():
    splits = [(4, 3), (5, 0), (0, 6), (2, 6)]
    norm = _norm()
    for step, sizes in enumerate(splits):
        y, dx = _gradients(norm, _x(step, sum(sizes)), [])
    ranks = [[torch.from_numpy(item) for item in rank] for rank in run_ranks(_on_a_rank, 2, splits, timeout=20)]
    _close([torch.cat(parts) for parts in zip(ranks[0][:2], ranks[1][:2], strict=True)], [y, dx])
    for rank in ranks:
        _close(rank[2:], norm.state_dict().values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(use_reentrant):
    norm, twin, x = _norm(), _norm(), _x().requires_grad_(True)
    checkpoint(norm, x, use_reentrant=use_reentrant).backward(_v(x))
    _, *expected = _gradients(twin, x, twin.parameters())
    _close([x.grad, *(parameter.grad for parameter in norm.parameters())], expected)
    _close(norm.state_dict().values(), twin.state_dict().values())


@pytest.mark.parametrize("num_groups", [G, C])
def test_torch_compile_gives_the_eager_answer(num_groups):
    torch.compiler.reset()
    norm = _norm(num_groups)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager")
    for step in range(2):
        _close(_gradients(compiled, _x(step), twin.parameters()), _gradients(norm, _x(step), norm.parameters()))
    _close(twin.state_dict().values(), norm.state_dict().values())
    torch.compiler.reset()
    compiled = torch.compile(twin.eval(), backend="aot_eager", fullgraph=True)
    _close([compiled(_x(5))], [norm.eval()(_x(5))])


# ------------------------------------------------------------------------------------ inputs


def test_layouts_give_the_same():
    norm, twin = _norm(), _norm()
    last = _x().contiguous(memory_format=torch.channels_last)
    _close(_gradients(twin, last, twin.parameters()), _gradients(norm, _x(), norm.parameters()))
    _close(twin.state_dict().values(), norm.state_dict().values())
    for mode in (True, False):
        assert twin.train(mode)(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    norm, exact = _norm().float(), _norm()
    for step in range(3):
        x = _x(step, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = _gradients(norm, x, norm.parameters())
        theirs = _gradients(exact, x.double(), exact.parameters(), _v(x).double())
        assert ours[0].dtype == torch.bfloat16
        _close(ours[:2], theirs[:2], 3e-2)
        _close(ours[2:], theirs[2:], 1e-3)
    _close(norm.state_dict().values(), exact.state_dict().values(), 1e-5)
    assert norm.eval()(x).dtype == torch.bfloat16
    _close([norm(x)], [exact.eval()(x.double())], 3e-2)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("num_groups", [G, C])
def test_an_empty_batch_leaves_everything_as_it_is(train, num_groups):
    norm = _norm(num_groups).float().train(train)
    norm.running_mean.normal_()  # as of a batch norm: not equal in a group
    before = copy.deepcopy(norm.state_dict())
    y, *gradients = _gradients(norm, _x(1, 0, dtype=torch.float32), norm.parameters())
    assert y.shape == (0, C, 4, 3)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_the_state_is_that_of_a_batch_norm():
    norm, other = _norm(), _norm()
    norm(_x())
    assert set(norm.state_dict()) == set(nn.BatchNorm2d(C).state_dict())
    other.load_state_dict(norm.state_dict())
    _close([other(_x(1))], [norm(_x(1))], 0)
    _close(other.state_dict().values(), norm.state_dict().values(), 0)


@pytest.mark.parametrize(("num_groups", "channels"), [(4, 6), (32, 48), (0, 6), (-1, 6)])
def test_groups_must_divide_the_channels(num_groups, channels):
    with pytest.raises(
        ConfigError, match=rf"num_groups={num_groups} does not divide {channels} channels; use one of 1, 2, 3"
    ):
        build_norm("BGN", channels, num_groups=num_groups)


def test_by_default_there_are_32_groups_or_as_many_as_channels():
    assert build_norm("BGN", 64).num_groups == 32
    assert build_norm("BGN", 12).num_groups == 12
