"""GN, LN, IN, PN beside torch's, and their errors; their definitions are checked in test_rules.py."""

import pytest
import torch
from torch import nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import GroupNorm, InstanceNorm, LayerNorm, PositionalNorm, build_norm, convert_norms


def test_they_are_torchs_own_where_torch_has_them():
    x = torch.randn(3, 6, 4, 4)
    assert torch.equal(build_norm("LN", 6)(x), nn.GroupNorm(1, 6)(x))
    torch.testing.assert_close(build_norm("LN", 6)(x[..., 0, 0]), nn.LayerNorm(6)(x[..., 0, 0]))
    torch.testing.assert_close(build_norm("LN", 6)(x), nn.LayerNorm((6, 4, 4))(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(build_norm("IN", 6)(x), nn.InstanceNorm2d(6)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(build_norm("GN", 6, num_groups=6)(x), build_norm("IN", 6)(x))
    torch.testing.assert_close(build_norm("GN", 6, num_groups=1)(x), build_norm("LN", 6)(x))
    rows = x.movedim(1, -1)
    torch.testing.assert_close(
        build_norm("LN", 6, per_position=True)(x), nn.LayerNorm(6, eps=1e-6)(rows).movedim(-1, 1)
    )
    torch.testing.assert_close(build_norm("PN", 6)(x), nn.LayerNorm(6)(rows).movedim(-1, 1))


def test_affine_maps_are_as_their_papers_have_them():
    assert [build_norm(name, 6).affine for name in ("LN", "IN", "PN")] == [True, False, False]
    assert build_norm("IN", 6).weight is None
    assert build_norm("LN", 6, affine=False).weight is None


def test_what_has_a_single_value_for_a_mean_is_refused():
    with pytest.raises(LeakfreeError, match=r"IN: in an input \(4, 6\) each mean is of a single value.*use LN or GN"):
        build_norm("IN", 6)(torch.randn(4, 6))
    with pytest.raises(LeakfreeError, match="IN needs several positions"):
        build_norm("IN", 6).eval()(torch.randn(4, 6, 1, 1))
    with pytest.raises(LeakfreeError, match="use fewer groups"):
        build_norm("GN", 6, num_groups=6)(torch.randn(4, 6))
    for name in ("LN", "PN"):
        with pytest.raises(LeakfreeError, match=f"{name}: .*more channels"):
            build_norm(name, 1)(torch.randn(4, 1))


@pytest.mark.parametrize("name", ["GN", "LN", "IN", "PN"])
def test_another_number_of_channels_is_refused(name):
    norm = build_norm(name, 6, **({"num_groups": 2} if name == "GN" else {}))
    with pytest.raises(LeakfreeError, match=rf"{name} expects \(N, 6, \*\), got \(2, 5, 3\)"):
        norm(torch.randn(2, 5, 3))


def test_options_that_a_norm_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="norm LN has no option 'num_groups'"):
        build_norm("LN", 6, num_groups=2)
    with pytest.raises(ConfigError, match="num_groups=4 does not divide 6 channels; use one of 1, 2, 3, 6"):
        GroupNorm(6, num_groups=4)


@pytest.mark.parametrize(("name", "kind"), [("LN", LayerNorm), ("IN", InstanceNorm), ("PN", PositionalNorm)])
def test_a_model_converts_and_keeps_weight_and_bias(name, kind):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    weight, bias = model[1].weight, model[1].bias
    convert_norms(model, name)
    assert isinstance(model[1], kind)
    assert model[1].weight is weight
    assert model[1].bias is bias
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 6, 4, 4)
