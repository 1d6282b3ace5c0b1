"""MBN far from zero, its checkpoints, and the Double-Forward against writing it out; its rule is in test_rules.py."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import build_norm, double_forward
from tests.norms.cases import C, assert_close, batch, changed, named, probe
from tests.norms.equations import MemorizedBatchNorm as Reference

(CASE,) = named("MBN 3 0.6")


def _assert_buffers(norm, reference):
    for name, value in reference.buffers().items():
        table = norm.get_buffer(name)
        assert_close([table[: len(value)] if name in ("memory_mean", "memory_var") else table], [value])


# ------------------------------------------------------------------------------------ the rule


def test_a_uniform_memory_has_the_statistics_of_all_its_batches_together():
    norm = CASE.make(memory=4, decay=1.0)
    for step in range(7):
        norm(batch(step))
    values = torch.cat([batch(step) for step in range(3, 7)]).transpose(0, 1).flatten(1)
    assert_close([norm.running_mean, norm.running_var], [values.mean(1), values.var(1, correction=0)])


def test_far_from_zero_the_variance_between_batches_does_not_cancel_in_float32():
    norm = CASE.make(memory=4, decay=1.0).float()
    batches = [(batch(step) + 1000).float() for step in range(4)]
    for x in batches:
        y = norm(x)
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    assert_close([norm.running_var], [values.var(1, correction=0)], 1e-4)  # the memory's means are float32
    xhat = (batches[-1].double() - values.mean(1).view(1, C, 1, 1)) / values.std(1, correction=0).view(1, C, 1, 1)
    assert_close([y], [xhat * norm.weight.view(1, C, 1, 1) + norm.bias.view(1, C, 1, 1)], 2e-4)


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
    norms = [CASE.make(), build_norm("BN", C), nn.BatchNorm2d(C), build_norm("ShuffleBN", C, num_groups=2)]
    layers = [nn.Conv2d(C, C, 1), norms[0], nn.ReLU(), norms[1], norms[2], nn.Dropout(0.3), norms[3], _Counting()]
    return nn.Sequential(*layers, nn.Conv2d(C, C, 1), CASE.make(memory=2)).double()


def _fail(*_):
    raise RuntimeError("stop")


def _random_numbers():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_double_forward_replaces_the_newest_entry_of_every_layer():
    """Written out for two layers: the second sees what the first makes of its refreshed memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 1), CASE.make(), nn.ReLU(), nn.Conv2d(C, C, 1), CASE.make(memory=2)).double()
    references = [Reference(C, 3, 0.6), Reference(C, 2, 0.6)]

    def written_out(x, again):
        for index, reference in ((0, references[0]), (3, references[1])):
            x = model[index](x)
            x = (reference.again if again else reference.train)(x, dict(model[index + 1].named_parameters()))
            x = x.relu() if index == 0 else x
        return x

    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(4):
        x = batch(step)
        y = model(x)
        assert_close([y], [written_out(x, False)])
        optimizer.zero_grad()
        (y * probe(y)).sum().backward()
        optimizer.step()
        stale = model[1].memory_mean.clone()
        with double_forward(model) as layers:
            assert layers == (model[1], model[4])
            y = model(x)
            assert not y.requires_grad
        with torch.no_grad():
            assert_close([y], [written_out(x, True)])
        for layer, reference in zip((model[1], model[4]), references, strict=True):
            _assert_buffers(layer, reference)
        assert not torch.allclose(model[1].memory_mean[0], stale[0])
        assert torch.equal(model[1].memory_mean[1:], stale[1:])


def test_double_forward_changes_nothing_else():
    model = _model()
    for step in range(3):
        model(batch(step, 8)).square().sum().backward()
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
        model(2 * batch(2, 8))
    assert _random_numbers() == expected
    parts = ("running_mean", "running_var", "memory_mean", "memory_var")
    assert changed(before, model) == {f"{index}.{part}" for index in (1, 9) for part in parts}
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model[6].last_groups is groups
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), gradients, strict=True))
    y = model(batch(3, 8))  # an ordinary forward again
    assert y.requires_grad
    assert model[1].num_batches_tracked == 4


def test_a_failed_double_forward_changes_nothing_at_all():
    model = _model()
    for step in range(3):
        model(batch(step, 8))
    before = copy.deepcopy(model.state_dict())
    handle = model[-1].register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="stop"), double_forward(model):
        model(2 * batch(2, 8))
    assert not changed(before, model)
    handle.remove()
    model(batch(3, 8))
    assert model[1].num_batches_tracked == 4


def test_double_forward_is_for_models_with_mbn_that_run_each_layer_once():
    with pytest.raises(LeakfreeError, match="the model has no MBN layer"), double_forward(nn.BatchNorm2d(C)):
        pass
    norm = CASE.make()
    norm(batch())
    before = copy.deepcopy(norm.state_dict())
    twice = nn.Sequential(norm, norm)
    with pytest.raises(LeakfreeError, match="an MBN layer ran more than once inside"), double_forward(twice):
        twice(batch(1))
    assert not changed(before, norm)
    with double_forward(norm):  # once again is fine
        norm(batch(1))


@pytest.mark.parametrize("how", ["eval", "frozen", "empty memory", "no rows"])
def test_double_forward_leaves_alone_what_has_nothing_to_refresh(how):
    norm = CASE.make()
    if how != "empty memory":
        norm(batch())
    if how == "eval":
        norm.eval()
    norm.frozen = how == "frozen"
    before = copy.deepcopy(norm.state_dict())
    with double_forward(norm) as layers:
        norm(batch(1, rows=0 if how == "no rows" else 5))
    assert layers == (() if how in ("eval", "frozen") else (norm,))
    assert not changed(before, norm)


# ------------------------------------------------------------------------------------ state


def test_a_batch_norms_checkpoint_loads_with_an_empty_memory():
    model, source = nn.Sequential(CASE.make()), nn.Sequential(nn.BatchNorm2d(C)).double()
    for step in range(3):
        model(batch(step))
        source(batch(step))
    model.load_state_dict(source.state_dict())
    assert model[0].memory_count == 0
    assert_close([model.eval()(batch(5))], [source.eval()(batch(5))], 0)
    fresh = nn.Sequential(CASE.make())
    fresh.load_state_dict(source.state_dict())
    assert_close([model.train()(batch(6))], [fresh(batch(6))], 0)
    part = dict(CASE.make().state_dict())
    del part["memory_count"]
    with pytest.raises(RuntimeError, match=r"Missing key.*memory_count"):
        CASE.make().load_state_dict(part)
    with pytest.raises(RuntimeError, match="size mismatch for memory_mean"):
        CASE.make(memory=5).load_state_dict(CASE.make().state_dict())


# ------------------------------------------------------------------------------------ inputs


def test_a_single_value_is_normalized_with_the_batches_before_it():
    norm, reference = CASE.make(), Reference(C, 3, 0.6)
    assert_close([norm(batch(9, 1, ()))], [norm.bias[None]])  # nothing before it: its own mean
    norm.reset_running_stats()
    for step, num_rows in ((0, 5), (1, 1), (2, 1)):
        x = batch(step, num_rows, ())
        assert_close([norm(x)], [reference.train(x, dict(norm.named_parameters()))])


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
