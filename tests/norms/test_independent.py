import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import GroupNorm, InstanceNorm, LayerNorm, PositionalNorm, build_norm, convert_norms

# name, options, eps, which values of (N, C, S) share statistics
KINDS = [
    ("GN", {"num_groups": 3}, 1e-5, "groups of 2"),
    ("LN", {}, 1e-5, "sample"),
    ("LN", {"per_position": True}, 1e-6, "position"),
    ("IN", {"affine": True}, 1e-5, "channel"),
    ("PN", {"affine": True}, 1e-5, "position"),
]


def reference(x, weight, bias, eps, sharing):
    """(N, C, *) float64, from the definition: one set of values at a time."""
    flat = x.reshape(*x.shape[:2], -1)
    y = torch.empty_like(flat)
    for n in range(flat.shape[0]):
        parts = {
            "sample": [(slice(None), slice(None))],
            "groups of 2": [(slice(c, c + 2), slice(None)) for c in range(0, flat.shape[1], 2)],
            "channel": [(c, slice(None)) for c in range(flat.shape[1])],
            "position": [(slice(None), s) for s in range(flat.shape[2])],
        }[sharing]
        for part in parts:
            values = flat[n][part]
            mean = values.sum() / values.numel()
            var = ((values - mean) ** 2).sum() / values.numel()
            y[n][part] = (values - mean) / (var + eps) ** 0.5
    column = (1, -1) + (1,) * (x.ndim - 2)
    return y.reshape(x.shape) * weight.view(column) + bias.view(column)


def make(name, options):
    norm = build_norm(name, 6, **options)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 6))
        norm.bias.copy_(torch.linspace(0.5, -1, 6))
    return norm


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_each_is_its_definition_in_every_dimension(name, options, eps, sharing, data):
    positions = data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    if sharing == "channel" and torch.Size(positions).numel() == 1:
        positions = [2]
    torch.manual_seed(data.draw(st.integers(0, 100)))
    x = torch.randn(data.draw(st.integers(1, 3)), 6, *positions, dtype=torch.float64) * 3 + 1
    norm = make(name, options).double()
    expected = reference(x, norm.weight, norm.bias, eps, sharing)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.eval()(x), expected)


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
def test_gradients(name, options, eps, sharing):
    norm = make(name, options).double()
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, (a,)), (x, norm.weight, norm.bias)
    )


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_see_the_others(name, options, eps, sharing, memory_format):
    norm, x = make(name, options), torch.randn(4, 6, 5, 5).contiguous(memory_format=memory_format)
    other = torch.cat([x[:1], torch.randn(3, 6, 5, 5) * 10]).contiguous(memory_format=memory_format)
    assert torch.equal(norm(x)[0], norm(other)[0])


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
def test_layouts_dtypes_and_autocast(name, options, eps, sharing):
    norm, x = make(name, options), torch.randn(3, 6, 4, 4)
    y = norm(x)
    assert y.is_contiguous()
    last = norm(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x.bfloat16().float()), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(norm(x).float(), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
def test_an_empty_batch_gives_zero_gradients_and_one_row_an_answer(name, options, eps, sharing):
    norm, x = make(name, options), torch.randn(0, 6, 3, 3, requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert not norm.weight.grad.any()
    assert not norm.bias.grad.any()
    one = torch.randn(1, 6, 3, 3)
    torch.testing.assert_close(norm(one), norm(torch.cat([one, one]))[:1])


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole(name, options, eps, sharing, backend):
    norm, x = make(name, options).eval(), torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(torch.compile(norm, backend=backend, fullgraph=True)(x), norm(x))


@pytest.mark.parametrize(("name", "options", "eps", "sharing"), KINDS)
def test_state_dict_round_trip(name, options, eps, sharing):
    norm, twin, x = make(name, options), build_norm(name, 6, **options), torch.randn(2, 6, 3)
    assert list(norm.state_dict()) == ["weight", "bias"]
    twin.load_state_dict(norm.state_dict())
    assert torch.equal(twin(x), norm(x))


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
