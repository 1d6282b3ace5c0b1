"""MBN against a list of past statistics in float64, and the Double-Forward against writing it out."""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import (
    MemorizedBatchNorm,
    Partition,
    batch_statistics,
    build_norm,
    convert_norms,
    double_forward,
    normalization_scope,
)
from leakfree.population import precise_bn
from leakfree.schedules import FreezeBN
from tests.ranks import run_ranks

C = 3
EPS = 1e-5


def _x(seed=0, num_rows=6, shape=(4, 3), dtype=torch.float64):
    """Batches whose statistics differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, C, *shape, dtype=torch.float64, generator=generator)
    scale, shift = torch.rand(2, C, dtype=torch.float64, generator=generator) + 0.5
    column = (1, C, *[1] * len(shape))
    return (x * scale.view(column) * 2 + 3 * shift.view(column)).to(dtype)


def _v(x):
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99)).to(x.dtype)


def _norm(memory=3, decay=0.6, **options):
    norm = build_norm("MBN", C, memory=memory, decay=decay, **{"dim": 2, **options}).double()
    for parameter, seed in zip(norm.parameters(), (1, 2), strict=False):
        parameter.data.copy_(torch.randn(C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return norm


class Reference:
    """Weighted averages of mean and E[x^2] over the last batches, newest first."""

    def __init__(self, memory, decay):
        self.size, self.decay = memory, decay
        self.entries = []  # (mean, E[x^2])

    def combined(self, entries):
        weights = [self.decay**age for age in range(len(entries))]
        mean, square = (sum(w * entry[i] for w, entry in zip(weights, entries, strict=True)) for i in (0, 1))
        mean, square = mean / sum(weights), square / sum(weights)
        return mean, square - mean.square()

    def __call__(self, x, weight, bias, older=None):
        dims, column = (0, *range(2, x.ndim)), (1, C, *[1] * (x.ndim - 2))
        current = x.mean(dims), x.square().mean(dims)
        older = self.entries if older is None else older
        mean, var = self.combined([current, *older][: self.size])
        self.entries = [tuple(table.detach() for table in current), *older][: self.size]
        xhat = (x - mean.view(column)) / (var + EPS).sqrt().view(column)
        return xhat * weight.view(column) + bias.view(column)

    def again(self, x, weight, bias):
        """The second forward on the newest batch."""
        return self(x, weight, bias, older=self.entries[1:])

    def buffers(self):
        """running_mean, running_var, and the memory's rows in use."""
        mean, var = self.combined(self.entries)
        means = torch.stack([entry[0] for entry in self.entries])
        return mean, var, means, torch.stack([entry[1] - entry[0].square() for entry in self.entries])


def _buffers(norm):
    used = int(norm.memory_count)
    return norm.running_mean, norm.running_var, norm.memory_mean[:used], norm.memory_var[:used]


def _gradients(run, x, parameters, v=None):
    leaf = x.detach().clone().requires_grad_(True)
    y = run(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], _v(x) if v is None else v)]


def _close(some, others, tolerance=1e-9):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def _changed(before, module):
    """The keys whose values are not bitwise as ``before``; some may be extra state."""
    return {
        key
        for key, value in module.state_dict().items()
        if not (torch.equal(before[key], value) if isinstance(value, torch.Tensor) else before[key] == value)
    }


def _same_state(before, module):
    return not _changed(before, module)


# ------------------------------------------------------------------------------------ the rule


@settings(max_examples=30)
@given(st.integers(1, 5), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([(), (5,), (4, 3), (2, 2, 2)]))
def test_it_is_the_rule_over_the_last_batches(memory, decay, shape):
    norm, reference = _norm(memory, decay, dim=None), Reference(memory, decay)
    for step in range(memory + 2):
        x = _x(step, 3 + step, shape)
        ours = _gradients(norm, x, norm.parameters())
        _close(ours, _gradients(lambda leaf: reference(leaf, *norm.parameters()), x, norm.parameters()))
        assert norm.memory_count == min(step + 1, memory)
        assert norm.num_batches_tracked == step + 1
        _close(_buffers(norm), reference.buffers())
    x, column = _x(50, shape=shape), (1, C, *[1] * len(shape))
    mean, var = (table.view(column) for table in reference.combined(reference.entries))
    expected = (x - mean) / (var + EPS).sqrt() * norm.weight.view(column) + norm.bias.view(column)
    _close([norm.eval()(x)], [expected])


def test_one_entry_is_batch_norm_in_training():
    norm, twin = _norm(memory=1), nn.BatchNorm2d(C).double()
    twin.load_state_dict(norm.state_dict(), strict=False)
    for step in range(3):
        _close(_gradients(norm, _x(step), norm.parameters()), _gradients(twin, _x(step), twin.parameters()))
    values = _x(2).transpose(0, 1).flatten(1)
    _close([norm.running_mean, norm.running_var], [values.mean(1), values.var(1, correction=0)])


def test_a_uniform_memory_has_the_statistics_of_all_its_batches_together():
    norm = _norm(memory=4, decay=1.0)
    for step in range(7):
        norm(_x(step))
    values = torch.cat([_x(step) for step in range(3, 7)]).transpose(0, 1).flatten(1)
    _close([norm.running_mean, norm.running_var], [values.mean(1), values.var(1, correction=0)])


def test_gradcheck():
    norm = _norm()
    for step in range(2):
        norm(_x(step))

    def run(x, weight, bias):
        layer = copy.deepcopy(norm)  # a forward moves the memory
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (_x(9, 3, (2, 2)), *norm.parameters())]
    assert torch.autograd.gradcheck(run, leaves)


def test_far_from_zero_the_variance_between_batches_does_not_cancel_in_float32():
    norm = _norm(memory=4, decay=1.0).float()
    batches = [(_x(step) + 1000).float() for step in range(4)]
    for x in batches:
        y = norm(x)
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    _close([norm.running_var], [values.var(1, correction=0)], 1e-4)  # the memory's means are float32
    xhat = (batches[-1].double() - values.mean(1).view(1, C, 1, 1)) / values.std(1, correction=0).view(1, C, 1, 1)
    _close([y], [xhat * norm.weight.view(1, C, 1, 1) + norm.bias.view(1, C, 1, 1)], 2e-4)


# ------------------------------------------------------------------------------------ groups, ranks, again


def test_groups_of_rows_are_current_batches_of_their_own():
    """All see the same memory, which then receives their pooled moments."""
    norm = _norm()
    for step in range(2):
        norm(_x(step))
    x, sizes, whole = _x(5, 8), [3, 1, 4], copy.deepcopy(norm)
    twins = [copy.deepcopy(norm) for _ in sizes]
    with normalization_scope(Partition.consecutive(sizes)):
        y = norm(x)
    _close([y], [torch.cat([twin(part) for twin, part in zip(twins, x.split(sizes), strict=True)])])
    whole(x)
    _close(norm.state_dict().values(), whole.state_dict().values())


def _on_a_rank(rank, world_size, splits):
    norm = _norm()
    for step, sizes in enumerate(splits):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = _x(step, sum(sizes))
        with normalization_scope(Partition(across_ranks=True)):
            y, dx = _gradients(norm, x[mine], [], _v(x)[mine])
            with double_forward(norm):
                norm(2 * x[mine])
    return [y.numpy(), dx.numpy(), *(value.numpy() for value in norm.state_dict().values())]


def test_a_batch_over_ranks_is_one_process():
    splits = [(4, 3), (5, 0), (0, 6), (0, 0), (2, 6)]
    norm = _norm()
    for step, sizes in enumerate(splits):
        y, dx = _gradients(norm, _x(step, sum(sizes)), [])
        with double_forward(norm):
            norm(2 * _x(step, sum(sizes)))
    ranks = [[torch.from_numpy(item) for item in rank] for rank in run_ranks(_on_a_rank, 2, splits, timeout=20)]
    _close([torch.cat(parts) for parts in zip(ranks[0][:2], ranks[1][:2], strict=True)], [y, dx])
    for rank in ranks:
        _close(rank[2:], norm.state_dict().values())


def _train(use_reentrant, steps=5):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(C, C, 1), _norm(), nn.ReLU(), nn.Conv2d(C, C, 1), _norm()).double()
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
        with double_forward(body):
            body(x)
    return gradients, body.state_dict()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once_and_keeps_its_memory(use_reentrant):
    gradients, state = _train(use_reentrant)
    expected, expected_state = _train(None)
    _close(gradients, expected, 1e-8)
    _close(state.values(), expected_state.values(), 1e-8)
    assert state["1.num_batches_tracked"] == 10


def test_torch_compile_gives_the_eager_answer():
    torch.compiler.reset()
    norm = _norm()
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager")
    for step in range(3):
        _close(_gradients(compiled, _x(step), twin.parameters()), _gradients(norm, _x(step), norm.parameters()))
        for layer, run in ((norm, norm), (twin, compiled)):
            with double_forward(layer):
                run(_x(step) * 2)
    _close(twin.state_dict().values(), norm.state_dict().values())
    torch.compiler.reset()
    compiled = torch.compile(twin.eval(), backend="aot_eager", fullgraph=True)
    _close([compiled(_x(5))], [norm.eval()(_x(5))])


# ------------------------------------------------------------------------------------ Double-Forward


class _Counting(nn.Module):
    """What else a forward may change: random numbers of all kinds, buffers, extra state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.notes = []

    def forward(self, x):
        self.calls = self.calls + 1  # another object
        self.notes.append(random.random() + np.random.rand() + torch.rand(()).item())
        return x

    def get_extra_state(self):
        return {"notes": self.notes}

    def set_extra_state(self, state):
        self.notes = state["notes"]


def _model():
    torch.manual_seed(0)
    norms = [_norm(), build_norm("BN", C), nn.BatchNorm2d(C), build_norm("ShuffleBN", C, num_groups=2)]
    layers = [nn.Conv2d(C, C, 1), norms[0], nn.ReLU(), norms[1], norms[2], nn.Dropout(0.3), norms[3], _Counting()]
    return nn.Sequential(*layers, nn.Conv2d(C, C, 1), _norm(memory=2)).double()


def _fail(*_):
    raise RuntimeError("stop")


def _random_numbers():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_double_forward_replaces_the_newest_entry_of_every_layer():
    """Written out for two layers: the second sees what the first makes of its refreshed memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 1), _norm(), nn.ReLU(), nn.Conv2d(C, C, 1), _norm(memory=2)).double()
    references = [Reference(3, 0.6), Reference(2, 0.6)]

    def written_out(x, again):
        for index, reference in ((0, references[0]), (3, references[1])):
            x = model[index](x)
            x = (reference.again if again else reference)(x, *model[index + 1].parameters())
            x = x.relu() if index == 0 else x
        return x

    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(4):
        x = _x(step)
        y = model(x)
        _close([y], [written_out(x, False)])
        optimizer.zero_grad()
        (y * _v(y)).sum().backward()
        optimizer.step()
        stale = model[1].memory_mean.clone()
        with double_forward(model) as layers:
            assert layers == (model[1], model[4])
            y = model(x)
            assert not y.requires_grad
        with torch.no_grad():
            _close([y], [written_out(x, True)])
        for layer, reference in zip((model[1], model[4]), references, strict=True):
            _close(_buffers(layer), reference.buffers())
            assert layer.num_batches_tracked == step + 1
        assert not torch.allclose(model[1].memory_mean[0], stale[0])
        assert torch.equal(model[1].memory_mean[1:], stale[1:])


def test_double_forward_changes_nothing_else():
    model = _model()
    for step in range(3):
        model(_x(step, 8)).square().sum().backward()
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    groups, gradients = model[6].last_groups, [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = _random_numbers()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with double_forward(model):
        model(2 * _x(2, 8))
    assert _random_numbers() == expected
    parts = ("running_mean", "running_var", "memory_mean", "memory_var")
    assert _changed(before, model) == {f"{index}.{part}" for index in (1, 9) for part in parts}
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model[6].last_groups is groups
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), gradients, strict=True))
    y = model(_x(3, 8))  # an ordinary forward again
    assert y.requires_grad
    assert model[1].num_batches_tracked == 4


def test_a_failed_double_forward_changes_nothing_at_all():
    model = _model()
    for step in range(3):
        model(_x(step, 8))
    before = copy.deepcopy(model.state_dict())
    handle = model[-1].register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="stop"), double_forward(model):
        model(2 * _x(2, 8))
    assert _same_state(before, model)
    handle.remove()
    model(_x(3, 8))
    assert model[1].num_batches_tracked == 4


def test_double_forward_is_for_models_with_mbn_that_run_each_layer_once():
    with pytest.raises(LeakfreeError, match="the model has no MBN layer"), double_forward(nn.BatchNorm2d(C)):
        pass
    norm = _norm()
    norm(_x())
    before = copy.deepcopy(norm.state_dict())
    twice = nn.Sequential(norm, norm)
    with pytest.raises(LeakfreeError, match="an MBN layer ran more than once inside"), double_forward(twice):
        twice(_x(1))
    assert _same_state(before, norm)
    with double_forward(norm):  # once again is fine
        norm(_x(1))


@pytest.mark.parametrize("how", ["eval", "frozen", "empty memory", "no rows"])
def test_double_forward_leaves_alone_what_has_nothing_to_refresh(how):
    norm = _norm()
    if how != "empty memory":
        norm(_x())
    if how == "eval":
        norm.eval()
    norm.frozen = how == "frozen"
    before = copy.deepcopy(norm.state_dict())
    with double_forward(norm) as layers:
        norm(_x(1, num_rows=0 if how == "no rows" else 5))
    assert layers == (() if how in ("eval", "frozen") else (norm,))
    assert _same_state(before, norm)


# ------------------------------------------------------------------------------------ state


def test_a_resumed_run_is_the_same_run():
    norm, other = _norm(), _norm()
    for step in range(2):
        norm(_x(step))
    other.load_state_dict(copy.deepcopy(norm.state_dict()))
    for step in range(2, 6):
        _close([other(_x(step))], [norm(_x(step))], 0)
    assert _same_state(norm.state_dict(), other)


def test_a_batch_norms_checkpoint_loads_with_an_empty_memory():
    model, source = nn.Sequential(_norm()), nn.Sequential(nn.BatchNorm2d(C)).double()
    for step in range(3):
        model(_x(step))
        source(_x(step))
    model.load_state_dict(source.state_dict())
    assert model[0].memory_count == 0
    _close([model.eval()(_x(5))], [source.eval()(_x(5))], 0)
    fresh = nn.Sequential(_norm())
    fresh.load_state_dict(source.state_dict())
    _close([model.train()(_x(6))], [fresh(_x(6))], 0)
    part = dict(_norm().state_dict())
    del part["memory_count"]
    with pytest.raises(RuntimeError, match=r"Missing key.*memory_count"):
        _norm().load_state_dict(part)
    with pytest.raises(RuntimeError, match="size mismatch for memory_mean"):
        _norm(memory=5).load_state_dict(_norm().state_dict())


def test_reset_forgets_everything():
    norm, fresh = _norm(), _norm()
    for step in range(3):
        norm(_x(step))
    norm.reset_running_stats()
    assert _same_state(fresh.state_dict(), norm)


def test_conversion_keeps_eval_outputs_both_ways():
    model = nn.Sequential(nn.BatchNorm2d(C, momentum=0.2).double())
    for step in range(3):
        model(_x(step))
    expected, state = model.eval()(_x(5)), copy.deepcopy(model.state_dict())
    convert_norms(model, "MBN", memory=2)
    assert isinstance(model[0], MemorizedBatchNorm)
    assert model[0].memory == 2
    assert model[0].memory_mean.dtype == torch.float64
    _close([model(_x(5))], [expected], 0)
    convert_norms(model, "BN")
    assert _same_state(state, model)
    assert model[0].momentum == 0.2
    trained = nn.Sequential(_norm())
    for step in range(3):
        trained(_x(step))
    expected = trained.eval()(_x(5))
    _close([convert_norms(trained, "BN")(_x(5))], [expected], 0)


def test_frozen_it_uses_the_memorys_statistics_and_leaves_them_alone():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    before = copy.deepcopy(model.state_dict())
    FreezeBN(at=0).step(model, 0, 10)
    _close([model.train()(_x(5))], [copy.deepcopy(model).eval()(_x(5))], 0)
    assert _same_state(before, model)


def test_precise_statistics_replace_the_memorys_in_eval_only():
    model = nn.Sequential(_norm())
    for step in range(3):
        model(_x(step))
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    batches = [_x(step) for step in range(4)]
    precise_bn(model.eval(), batches, progress=False)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    _close([model[0].running_mean, model[0].running_var], [values.mean(1), values.var(1)])
    after = model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"0.running_mean", "0.running_var"}
    _close([model.train()(_x(7))], [twin(_x(7))], 0)
    assert _same_state(twin.state_dict(), model)


def test_the_batchs_own_statistics_on_request():
    norm = _norm()
    for step in range(3):
        norm(_x(step))
    before = copy.deepcopy(norm.state_dict())
    expected = _norm()(_x(7))  # without a past
    for mode in (True, False):
        with batch_statistics(norm.train(mode)):
            _close([norm(_x(7))], [expected])
    assert _same_state(before, norm)


# ------------------------------------------------------------------------------------ inputs


def test_layouts_give_the_same():
    norm, twin = _norm(), _norm()
    for step in range(4):
        last = _x(step).contiguous(memory_format=torch.channels_last)
        _close(_gradients(twin, last, twin.parameters()), _gradients(norm, _x(step), norm.parameters()))
    _close(twin.state_dict().values(), norm.state_dict().values())
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
    assert norm.memory_mean.dtype == torch.float32
    _close(norm.state_dict().values(), exact.state_dict().values(), 1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("seen", [0, 2])
def test_an_empty_batch_leaves_everything_as_it_is(train, seen):
    norm = _norm().float()
    for step in range(seen):
        norm(_x(step, dtype=torch.float32))
    before = copy.deepcopy(norm.train(train).state_dict())
    y, *gradients = _gradients(norm, _x(1, 0, dtype=torch.float32), norm.parameters())
    assert y.shape == (0, C, 4, 3)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert _same_state(before, norm)


def test_a_single_value_is_normalized_with_the_batches_before_it():
    norm, reference = _norm(dim=1), Reference(3, 0.6)
    _close([norm(_x(9, 1, ()))], [norm.bias[None]])  # nothing before it: its own mean
    norm.reset_running_stats()
    for step, num_rows in ((0, 5), (1, 1), (2, 1)):
        x = _x(step, num_rows, ())
        _close([norm(x)], [reference(x, *norm.parameters())])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory must be at least 1 batch, the current one, got 0"),
        ({"decay": 0.0}, r"decay must be above 0 and at most 1, got 0\.0"),
        ({"decay": 1.5}, "at most 1, got 1.5"),
        ({"track_running_stats": False}, "track_running_stats must be True"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        build_norm("MBN", C, **options)


def test_a_copy_made_inside_of_double_forward_is_outside_of_it():
    model = nn.Sequential(build_norm("MBN", 3)).train()
    model(torch.randn(4, 3, 2, 2))
    with double_forward(model):
        twin = copy.deepcopy(model)
        model(torch.randn(4, 3, 2, 2))
    twin(torch.randn(4, 3, 2, 2))
    assert int(twin[0].memory_count) == 2  # a forward of training: an entry of its own
    twin(torch.randn(4, 3, 2, 2))
    assert int(twin[0].memory_count) == 3
    assert int(model[0].memory_count) == 1
