"""What is special about IEBN; its equations are checked in test_rules.py."""

import pytest
import torch
from torch import nn

from leakfree.norms import build_norm
from tests.norms.cases import C, batch, named


def test_initially_every_gate_is_that_of_minus_one():
    norm = build_norm("IEBN", C)
    assert [norm.gate_weight.tolist(), norm.gate_bias.tolist()] == [[0.0] * C, [-1.0] * C]
    norm.gate_bias.data.zero_()
    norm.reset_parameters()
    assert norm.gate_bias.tolist() == [-1.0] * C
    x, twin = batch(dtype=torch.float32), nn.BatchNorm2d(C)
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x), 0.26894142 * twin.train(mode)(x))


def test_the_gate_is_each_samples_own_also_in_eval():
    """In eval a batch norm multiplies a channel of every sample by the same."""
    (case,) = named("IEBN")
    norm = case.trained().eval()
    x = batch(1, 2)
    scales = (norm(x)[:, :, 0, 0] - norm(x)[:, :, 1, 1]) / (x[:, :, 0, 0] - x[:, :, 1, 1])
    assert not torch.isclose(scales[0], scales[1]).any()


def test_a_single_value_is_refused_as_for_bn():
    """It is its own mean and has no variance."""
    (case,) = named("IEBN")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        case.make()(batch(rows=1, shape=()))
