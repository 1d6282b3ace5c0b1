"""The limits of BatchRenorm, and what else is special about it; its algorithm is checked in test_rules.py."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from leakfree.errors import ConfigError
from leakfree.norms import Partition, build_norm, normalization_scope
from tests.norms import equations
from tests.norms.cases import C, assert_close, batch, named
from tests.norms.equations import EPS

(CASE,) = named("BatchRenorm")

# ------------------------------------------------------------------------------------ the limits


@settings(max_examples=25)
@given(st.integers(0, 60), st.integers(0, 9), st.integers(1, 30), st.integers(1, 30))
def test_the_ramp_is_linear_from_batch_norm_to_the_limits(done, start, length_d, length_r):
    ramp = start, start + length_d, start + length_r
    norm, reference = CASE.make(ramp=ramp, r_max=3.0, d_max=5.0), equations.BatchRenorm(C, 0.1, ramp, 3.0, 5.0)
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


# ------------------------------------------------------------------------------------ groups, ranks


def test_the_averages_get_the_mean_of_the_base_groups():
    norm = CASE.trained()
    sizes, x = [3, 1, 4], batch(5, 8)
    twins = [copy.deepcopy(norm) for _ in sizes]
    std = (norm.running_var + EPS).sqrt()
    with normalization_scope(Partition.consecutive(sizes)):
        norm(x)
    for twin, part in zip(twins, x.split(sizes), strict=True):
        twin(part)
    weights = torch.tensor(sizes).double() / 8
    mean = sum(w * twin.running_mean for w, twin in zip(weights, twins, strict=True))
    new = sum(w * (twin.running_var + EPS).sqrt() for w, twin in zip(weights, twins, strict=True))
    assert_close([norm.running_mean, norm.running_var], [mean, new**2 - EPS])
    assert not torch.allclose(std, new)
    assert norm.num_batches_tracked == 4


def test_a_recomputation_whose_forward_is_forgotten_is_refused():
    norm, x = CASE.make(), batch().requires_grad_(True)
    y = checkpoint(norm, x, use_reentrant=False)
    for step in range(40):
        norm(batch(step + 1))
    with pytest.raises(RuntimeError, match=r"BatchRenorm: .* its input is that of no recent forward"):
        y.sum().backward()


# ------------------------------------------------------------------------------------ inputs


def test_a_single_value_is_normalized_by_the_averages_as_far_as_the_limits_allow():
    """Its own deviation is 0, so what is left is d."""
    norm = CASE.make(ramp=None)
    for step in range(3):
        norm(batch(step, shape=()))
    x = batch(7, 1, ())
    d = ((x - norm.running_mean) / (norm.running_var + EPS).sqrt()).clamp(-0.4, 0.4)
    assert_close([norm(x)], [d * norm.weight + norm.bias])


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
