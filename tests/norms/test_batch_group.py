"""How BGN pools what channels have, and what else is special about it; its definition is in test_rules.py."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms import BatchGroupNorm, build_norm, convert_norms
from tests.norms.cases import C, assert_close, batch, changed, gradients, named
from tests.norms.equations import EPS, column
from tests.norms.equations import BatchGroupNorm as Reference

G = 2
CASES = dict(zip((1, 2, 3, C), named("BGN 1", "BGN 2", "BGN 3", "BGN 6"), strict=True))


def test_a_single_value_per_group_is_batch_norms_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        CASES[C].make()(batch(rows=1, shape=()))


# ------------------------------------------------------------------------------------ statistics of channels


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_pooled_channels_are_the_values_of_the_group(rows, positions, seed):
    x = batch(seed, rows, (positions,))
    mean, var = CASES[G].make().pool_channels(x.mean((0, 2)), x.var((0, 2), correction=0))
    expected, unbiased = Reference(C, G).population(x)
    count = rows * positions * C // G
    assert_close([mean, var], [expected, unbiased * (count - 1) / count])
    again = CASES[G].make().pool_channels(mean, var)
    assert_close(again, [mean, var], 1e-15)


def test_pooling_leaves_its_own_statistics_as_they_are_in_float32():
    norm = CASES[3].make(torch.float32)
    for step in range(4):
        norm(batch(step, dtype=torch.float32))
    twin = convert_norms(copy.deepcopy(norm), "BN").eval()
    x = batch(9, dtype=torch.float32)
    assert_close([norm.eval()(x)], [twin(x)], 0)


def test_buffers_of_a_batch_norm_are_pooled_and_then_averaged():
    norm, twin = CASES[G].make(), nn.BatchNorm2d(C).double()
    for step in range(4):
        twin(batch(step))
    norm.load_state_dict({**twin.state_dict(), **dict(norm.named_parameters())})
    mean, var = norm.pool_channels(twin.running_mean, twin.running_var)
    x = batch(9)
    expected = (x - column(mean, x)) / (column(var, x) + EPS).sqrt()
    expected = expected * column(norm.weight, x) + column(norm.bias, x)
    assert_close([copy.deepcopy(norm).eval()(x)], [expected])
    norm(x)
    new = Reference(C, G).population(x)
    assert_close([norm.running_mean, norm.running_var], [0.9 * mean + 0.1 * new[0], 0.9 * var + 0.1 * new[1]])


def test_conversion_keeps_eval_outputs_on_the_way_to_batch_norm():
    model = nn.Sequential(CASES[G].make())
    for step in range(3):
        model(batch(step))
    expected, weight = model.eval()(batch(9)), model[0].weight
    for name in ("BN", "SyncBN", "BGN", "FrozenBN"):
        convert_norms(model, name, **({"num_groups": G} if name == "BGN" else {}))
        assert_close([model(batch(9))], [expected], 1e-12)
        assert model[0].weight is weight
    model = convert_norms(nn.Sequential(nn.BatchNorm2d(C)), "BGN", num_groups=3)
    assert isinstance(model[0], BatchGroupNorm)
    assert model[0].num_groups == 3


# ------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("num_groups", [G, C])
def test_an_empty_batch_leaves_the_buffers_of_a_batch_norm_as_they_are(train, num_groups):
    norm = CASES[num_groups].make(torch.float32).train(train)
    norm.running_mean.normal_()  # as of a batch norm: not equal in a group
    before = copy.deepcopy(norm.state_dict())
    y, *found = gradients(norm, batch(1, 0, dtype=torch.float32), norm.parameters())
    assert y.shape == (0, C, 4, 3)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)
    assert not changed(before, norm)


@pytest.mark.parametrize(("num_groups", "channels"), [(4, 6), (32, 48), (0, 6), (-1, 6)])
def test_groups_must_divide_the_channels(num_groups, channels):
    with pytest.raises(
        ConfigError, match=rf"num_groups={num_groups} does not divide {channels} channels; use one of 1, 2, 3"
    ):
        build_norm("BGN", channels, num_groups=num_groups)


def test_by_default_there_are_32_groups_or_as_many_as_channels():
    assert build_norm("BGN", 64).num_groups == 32
    assert build_norm("BGN", 12).num_groups == 12
