"""CBN against the equations of Yao et al. 2021, written out with unfold and autograd in float64."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import (
    CrossIterationBatchNorm,
    Partition,
    attach_convolutions,
    batch_statistics,
    build_norm,
    convert_norms,
    image_partition,
    normalization_scope,
)
from leakfree.norms.patches import output_covariance, patch_covariance, patch_mean
from tests.norms.equations import CompensatedBatchNorm as Reference
from tests.ranks import run_ranks

CIN, C, EPS = 4, 6, 1e-5
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _batches(count, rows=3, size=6, seed=0, dtype=torch.float64):
    """Batches that differ in mean and spread."""
    draw = torch.Generator().manual_seed(seed)
    scales = 0.5 + torch.rand(count, 1, CIN, 1, 1, generator=draw, dtype=torch.float64)
    shifts = torch.randn(count, 1, CIN, 1, 1, generator=draw, dtype=torch.float64)
    x = torch.randn(count, rows, CIN, size, size, generator=draw, dtype=torch.float64)
    return (x * scales + shifts).to(dtype)


def _conv(groups=1, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(CIN, C, 3, stride=2, padding=1, groups=groups, bias=bias).double()


def _model(conv=None, after=(), **options):
    """Convolution, attached CBN without burn-in unless asked for, and what comes after."""
    options = {"window": 3, "burn_in": 0, **options}
    conv = _conv() if conv is None else conv
    model = nn.Sequential(conv, build_norm("CBN", C, **options), *after).to(conv.weight.dtype)
    attach_convolutions(model)
    return model


def _move(parameter, step, size):
    """Another weight, as an optimizer would leave it."""
    draw = torch.Generator().manual_seed(1000 + step)
    with torch.no_grad():
        parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64), alpha=size)


def _pair(groups=1, bias=True, **options):
    """A model and the reference of it, with weights of their own."""
    model = _model(_conv(groups, bias), **options)
    reference = Reference(_conv(groups, bias), **{"window": 3, "burn_in": 0, **options})
    with torch.no_grad():
        model[1].weight.copy_(reference.gamma)
        model[1].bias.copy_(reference.beta)
    return model, reference


def _assert_step_equal(model, reference, x, step, size):
    """Outputs, all gradients and buffers of a step; then the weights move."""
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = model(ours), reference(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    pairs = [(ours, theirs), (model[1].weight, reference.gamma), (model[1].bias, reference.beta)]
    pairs += list(zip(model[0].parameters(), reference.conv.parameters(), strict=True))
    loss = (y * probe + y**3 * 0.1).sum()
    found = torch.autograd.grad(loss, [one for one, _ in pairs])
    wanted = torch.autograd.grad((expected * probe + expected**3 * 0.1).sum(), [other for _, other in pairs])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model[1].running_mean, reference.running_mean)
    torch.testing.assert_close(model[1].running_var, reference.running_var)
    for parameter in (*model[0].parameters(), *reference.conv.parameters()):
        _move(parameter, step, size)


OPTIONS = [
    {},
    {"window": 4},
    {"window": 2, "guard": "drop"},
    {"guard": "drop"},
    {"rho": 0.5},
    {"rho": 0.0},
    {"moments": "exact"},
    {"moments": "exact", "rho": 0.3, "guard": "drop"},
    {"burn_in": 2},
    {"burn_in": 4, "ramp": "linear", "window": 4},
]


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (2, True)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_six_steps_equal_the_equations(options, groups, bias):
    model, reference = _pair(groups, bias, **options)
    for step, x in enumerate(_batches(6)):
        _assert_step_equal(model, reference, x, step, 0.05)
    assert int(model[1].num_batches_tracked) == 6


@pytest.mark.parametrize("guard", ["max", "drop"])
def test_the_guards_at_work_equal_the_equations(guard):
    """Large changes of the weights: the first order makes variances negative."""
    model, reference = _pair(guard=guard, window=4)
    for step, x in enumerate(_batches(6)):
        _assert_step_equal(model, reference, x, step, 0.3)
    assert reference.guarded > 0


# ------------------------------------------------------------------------------- moments of patches

GEOMETRIES = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2), bias=False), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, 2, padding="valid", dilation=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (1, 3), padding=(0, 2), padding_mode="circular", stride=(2, 3)), (3, 4, 9, 8)),
    (nn.Conv2d(6, 6, 3, padding=2, groups=6), (3, 6, 5, 5)),
    (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
    (nn.Conv1d(4, 6, 5, padding=2, stride=3), (3, 4, 19)),
    (nn.Conv3d(2, 6, 3, padding=(1, 0, 2), dilation=2), (3, 2, 9, 8, 7)),
]


def _patches(conv, x):
    """(groups, P, N * positions): the outputs of convolutions that each copy one number of the patch."""
    width, per_group = conv.weight[0].numel(), x.shape[1] // conv.groups
    parts = []
    for group in range(conv.groups):
        copier = type(conv)(
            *(per_group, width, conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1, False),
            padding_mode=conv.padding_mode,
        ).to(x.dtype)
        copier.weight.data = torch.eye(width, dtype=x.dtype).view(copier.weight.shape)
        parts.append(copier(x[:, group * per_group : (group + 1) * per_group]).transpose(0, 1).flatten(1))
    return torch.stack(parts).detach()


def _assert_moments(conv, x):
    y = conv(x).detach()
    rows = y.transpose(0, 1).flatten(1)
    patches = _patches(conv, x)
    torch.testing.assert_close(patch_mean(x, conv), patches.mean(-1))
    centered = patches - patches.mean(-1, keepdim=True)
    per_group = conv.out_channels // conv.groups
    covariance = torch.stack([centered[c // per_group] @ (rows[c] - rows[c].mean()) for c in range(len(rows))])
    found = output_covariance(x, y, rows.mean(1), rows.var(1, correction=0), conv)
    torch.testing.assert_close(found, covariance / rows.shape[1], rtol=1e-9, atol=1e-12)
    scatter = centered @ centered.transpose(1, 2) / rows.shape[1]
    torch.testing.assert_close(patch_covariance(x, conv), scatter, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("conv", "shape"), GEOMETRIES, ids=str)
def test_moments_of_patches_equal_those_of_written_out_patches(conv, shape, layout):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    _assert_moments(copy.deepcopy(conv).double(), x)


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    groups=st.sampled_from([1, 2]),
)
def test_moments_of_patches_for_any_geometry(kernel, stride, padding, dilation, size, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups).double()
    _assert_moments(conv, torch.randn(2, 4, *size, dtype=torch.float64) - 0.3)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_closed_form_derivatives_are_those_of_autograd(groups):
    conv, x = _conv(groups), _batches(1)[0]
    y = conv(x)
    mean, square = y.mean((0, 2, 3)), (y * y).mean((0, 2, 3))
    mean_slope, mean_bias = torch.autograd.grad(mean.sum(), list(conv.parameters()), retain_graph=True)
    square_slope, square_bias = torch.autograd.grad(square.sum(), list(conv.parameters()))
    patch = patch_mean(x, conv).repeat_interleave(C // groups, 0)
    covariance = output_covariance(x, y, mean.detach(), (square - mean**2).detach(), conv)
    torch.testing.assert_close(mean_slope.flatten(1), patch)
    torch.testing.assert_close(square_slope.flatten(1), 2 * (covariance + mean.detach()[:, None] * patch))
    torch.testing.assert_close(mean_bias, torch.ones(C, dtype=torch.float64))
    torch.testing.assert_close(square_bias, 2 * mean.detach())


# ------------------------------------------------------------------------------- what the equations imply


def _moments_used(model, x):
    """(mean, var) with which the model, of affine map 1 and 0, normalized: from its input and output, (C,) each."""
    with torch.no_grad():
        y = model[0](x)
        out = model(x)
    y, out = (table.transpose(0, 1).flatten(1) for table in (y, out))
    slope = ((y - y.mean(1, keepdim=True)) * out).sum(1) / ((y - y.mean(1, keepdim=True)) ** 2).sum(1)
    return y.mean(1) - out.mean(1) / slope, 1 / slope**2 - EPS


def _moments_of(conv, x):
    y = conv(x).detach().transpose(0, 1).flatten(1)
    return y.mean(1), (y * y).mean(1)


@pytest.mark.parametrize("options", [{}, {"guard": "drop"}, {"moments": "exact"}, {"rho": 0.0}], ids=str)
def test_frozen_weights_pool_the_batches_of_the_window(options):
    model, batches = _model(window=3, **options), _batches(6)
    for step, x in enumerate(batches):
        mean, var = _moments_used(model, x)
        pooled_mean, pooled_square = _moments_of(model[0], batches[max(0, step - 2) : step + 1].flatten(0, 1))
        torch.testing.assert_close(mean, pooled_mean)
        torch.testing.assert_close(var, pooled_square - pooled_mean**2)


@pytest.mark.parametrize("moments", ["taylor", "exact"])
def test_the_compensated_mean_is_exact_and_the_second_moment_lacks_a_known_square(moments):
    model, (old, new) = _model(window=2, moments=moments), _batches(2)
    with torch.no_grad():
        model(old)
    before = model[0].weight.detach().clone()
    _move(model[0].weight, 0, 0.1)
    step = (model[0].weight.detach() - before).flatten(1)
    mean, var = _moments_used(model, new)
    past_mean = 2 * mean - _moments_of(model[0], new)[0]
    past_square = 2 * (var + mean**2) - _moments_of(model[0], new)[1]
    true_mean, true_square = _moments_of(model[0], old)
    torch.testing.assert_close(past_mean, true_mean)
    patches = F.unfold(old, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    missing = torch.einsum("cp,mp,mq,cq->c", step, patches, patches, step) / len(patches)
    assert float(missing.min()) > 1e-3
    torch.testing.assert_close(true_square - past_square, missing if moments == "taylor" else torch.zeros(C).double())


def test_a_window_of_one_is_batch_norm_bit_for_bit():
    for options in ({"window": 1}, {"window": 3, "burn_in": 6}):
        model = _model(**options)
        other = nn.Sequential(_conv(), nn.BatchNorm2d(C).double())
        for step, x in enumerate(_batches(6)):
            outputs = [model(x), other(x)]
            assert torch.equal(*outputs)
            for output in outputs:
                output.pow(3).sum().backward()
            assert torch.equal(model[0].weight.grad, other[0].weight.grad)
            for conv in (model[0], other[0]):
                _move(conv.weight, step, 0.1)
        assert torch.equal(model[1].running_var, other[1].running_var)
        assert torch.equal(model[1].running_mean, other[1].running_mean)
        assert int(model[1].window_forwards) == 0


@pytest.mark.parametrize("options", [{}, {"guard": "drop"}], ids=str)
def test_gradcheck(options):
    model = _model(several_calls=True, **options)
    for step, x in enumerate(_batches(3)):
        model(x)
        _move(model[0].weight, step, 0.1)
    x = torch.randn(2, CIN, 4, 4, dtype=torch.float64, requires_grad=True)
    conv, norm = model

    def forward(x, *affine):  # from the same window each time
        buffers = {name: table.clone() for name, table in norm.named_buffers()}
        state = dict(zip(("weight", "bias"), affine, strict=True)) | buffers
        return torch.func.functional_call(norm, state, conv(x))

    assert torch.autograd.gradcheck(forward, (x, norm.weight, norm.bias), fast_mode=True)
    assert int(norm.window_forwards) == 3


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_any_number_of_dimensions(dim):
    torch.manual_seed(0)
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dim - 1](2, 4, 3, padding=1).double()
    model = nn.Sequential(conv, build_norm("CBN", 4, dim=dim, window=2, burn_in=0)).double()
    attach_convolutions(model)
    batches = torch.randn(3, 2, 2, *[5] * dim, dtype=torch.float64)
    with torch.no_grad():
        for x in batches:
            y = model(x)
    pooled = conv(batches[1:].flatten(0, 1)).detach().transpose(0, 1).flatten(1)
    column = (1, 4, *[1] * dim)
    expected = (conv(batches[2]) - pooled.mean(1).view(column)) / (pooled.var(1, correction=0) + EPS).sqrt().view(
        column
    )
    torch.testing.assert_close(y, expected)


# ------------------------------------------------------------------------------- state


def _train(model, batches, first=0):
    """Steps of SGD with momentum; the outputs."""
    outputs = []
    for step, x in enumerate(batches, first):
        y = model(x)
        outputs.append(y.detach())
        grads = torch.autograd.grad((y * (step + 1) + y**3).mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.sub_(grad, alpha=0.1)
    return outputs


def _assert_same_state(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("attach", ["before loading", "after loading"])
@pytest.mark.parametrize("moments", ["taylor", "exact"])
def test_resuming_in_the_middle_of_a_window_changes_nothing(cut, attach, moments):
    options = {"window": 3, "burn_in": 1, "moments": moments}
    batches = _batches(7)
    whole = _model(**options)
    expected = _train(whole, batches)
    first = _model(**options)
    _train(first, batches[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = nn.Sequential(_conv(seed=9), build_norm("CBN", C, **options)).double()
    if attach == "before loading":
        attach_convolutions(second)
    second.load_state_dict(torch.load(file, weights_only=True))
    attach_convolutions(second)
    outputs = _train(second, batches[cut:], cut)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected[cut:], strict=True))
    _assert_same_state(second.state_dict(), whole.state_dict())


def test_the_state_holds_no_weight_twice_and_is_small():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), build_norm("CBN", 64, burn_in=0))
    attach_convolutions(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert [name for name, _ in model.named_modules()] == ["", "0", "1"]
    past = 3
    authors = past * (2 * 64 + 3 * 64 * 64 * 9) * 4  # two moments, two derivatives and the weight of each iteration
    assert sum(table.numel() * table.element_size() for table in model[1].buffers()) <= 0.4 * authors
    before = {name: table.shape for name, table in model.state_dict().items()}
    model(torch.randn(2, 64, 5, 5)).sum().backward()
    assert before == {name: table.shape for name, table in model.state_dict().items()}


def test_a_checkpoint_without_a_window_empties_it():
    model = _model()
    _train(model, _batches(3))
    assert int(model[1].window_forwards) == 3
    plain = nn.Sequential(_conv(seed=5), nn.BatchNorm2d(C)).double()
    model.load_state_dict(plain.state_dict())
    assert all(not table.any() for name, table in model[1].named_buffers() if name.startswith("window"))
    x = _batches(1)[0]
    assert torch.equal(model.eval()(x), plain.eval()(x))
    torch.testing.assert_close(model.train()(x), plain.train()(x))


def test_a_checkpoint_with_another_window_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.window_mean"):
        _model(window=3).load_state_dict(_model(window=4).state_dict())


def test_reset_window_forgets_the_past():
    model, (x, other) = _model(), _batches(2)
    _train(model, [x])
    model[1].reset_window()
    expected = F.batch_norm(model[0](other), None, None, model[1].weight, model[1].bias, training=True)
    torch.testing.assert_close(model(other), expected)


def test_the_window_follows_the_layout_of_the_weight():
    model = _model(_conv().float())
    _train(model, _batches(2, dtype=torch.float32))
    before = model[1].window_slope.clone()
    model.to(memory_format=torch.channels_last)
    assert torch.equal(model[1].window_slope, before)
    assert model[1].window_slope.transpose(1, 2).is_contiguous()
    model.to(memory_format=torch.contiguous_format)
    assert torch.equal(model[1].window_slope, before)
    assert model[1].window_slope.is_contiguous()


def test_the_window_keeps_its_precision():
    model = _model(_conv().float())
    _train(model, _batches(2, dtype=torch.float32))
    model.to(memory_format=torch.channels_last)
    before = {name: table.clone() for name, table in model[1].named_buffers() if name.startswith("window")}
    model.half()
    assert model[1].running_mean.dtype == torch.float16
    for name, table in before.items():
        assert torch.equal(getattr(model[1], name), table), name
    model.double()
    assert model[1].window_slope.dtype == torch.float64
    empty = _model().to("meta").to_empty(device="cpu")
    assert empty[1].window_mean.device.type == "cpu"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_attached_within_itself(copied):
    model = _model(window=3)
    batches = _batches(6)
    _train(model, batches[:2])
    other = copied(model)
    assert other[1].convolution is other[0]
    assert model[1].convolution is model[0]
    untouched = copy.deepcopy(model.state_dict())
    outputs = _train(other, batches[2:])
    _assert_same_state(model.state_dict(), untouched)
    assert all(map(torch.equal, outputs, _train(model, batches[2:])))


def test_a_copy_of_the_norm_alone_says_that_its_convolution_does_not_run():
    model = _model()
    model[1] = copy.deepcopy(model[1])
    with pytest.raises(LeakfreeError, match="has not run since the layer's last forward"):
        model(_batches(1)[0])
    assert attach_convolutions(model) == {"1": "0"}
    assert torch.isfinite(model(_batches(1)[0])).all()


def test_the_counter_is_seen_when_others_change_it():
    model, (a, b, c) = _model(burn_in=5), _batches(3)
    _train(model, [a, b])
    assert int(model[1].window_forwards) == 0
    model[1].num_batches_tracked.fill_(5)
    _train(model, [c])
    assert int(model[1].window_forwards) == 1
    model[1].burn_in = 100  # again: what the window holds is too old when that is over
    _train(model, [a])
    assert int(model[1].window_forwards) == 0


# ------------------------------------------------------------------------------- the convolution before


def test_without_a_convolution_training_is_refused_and_eval_is_not():
    norm = build_norm("CBN", C, burn_in=100)
    x = torch.randn(4, C, 3, 3)
    with pytest.raises(LeakfreeError, match=r"attach_convolutions\(model\) or attach\(conv\)"):
        norm(x)
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, torch.zeros(C), torch.ones(C)))


class _Between(nn.Module):
    """Something between convolution and norm."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize("what", [torch.relu, torch.relu_, lambda x: x.clone(), lambda x: x[:2]])
def test_an_input_that_the_convolution_did_not_make_is_refused(what):
    conv, norm = _conv(), build_norm("CBN", C, burn_in=0).double()
    norm.attach(conv)
    with torch.no_grad(), pytest.raises(LeakfreeError, match="not the last output of the convolution"):
        nn.Sequential(conv, _Between(what), norm)(_batches(1)[0])


def test_a_second_forward_before_the_backward_is_refused_unless_allowed():
    a, b = _batches(2)
    model = _model()
    y = model(a)
    with pytest.raises(LeakfreeError, match="second training forward before the backward of the last"):
        model(b)
    y.sum().backward()
    model(b).sum().backward()  # gradients add up: the graph of `y` is still there, its backward is done
    model(a)  # the result is thrown away
    model(b).sum().backward()
    several = _model(several_calls=True)
    (several(a) + several(b)).sum().backward()
    assert int(several[1].window_forwards) == 2


def test_each_level_of_a_pyramid_has_its_norm_behind_one_convolution():
    conv = _conv()
    norms = nn.ModuleList(build_norm("CBN", C, window=2, burn_in=0) for _ in range(2)).double()
    for norm in norms:
        norm.attach(conv)
    levels = [_batches(3, size=6), _batches(3, size=4, seed=1)]
    for step in range(3):
        outputs = [norm(conv(level[step])) for norm, level in zip(norms, levels, strict=True)]
        sum(y.square().sum() for y in outputs).backward()
        held = [hook for hook in conv._forward_hooks.values() if hook._call is not None]
        assert held == []
        _move(conv.weight, step, 0.1)
    for norm, level in zip(norms, levels, strict=True):
        alone = _model(window=2)
        for step in range(3):
            alone(level[step]).sum().backward()
            _move(alone[0].weight, step, 0.1)
        torch.testing.assert_close(norm.window_mean, alone[1].window_mean)
        torch.testing.assert_close(norm.window_slope, alone[1].window_slope)


def test_nothing_is_held_where_nothing_is_learned():
    model = _model()
    (tap,) = model[0]._forward_hooks.values()
    x = _batches(1)[0]
    for prepare in (model.eval, lambda: setattr(model.train()[1], "frozen", True)):
        prepare()
        model[0](x)
        assert tap._call is None
    model[1].frozen = False
    with batch_statistics(model):
        model[0](x)
        assert tap._call is None
    convert_norms(model, "BN")
    model[0](x)
    assert tap._call is None


@pytest.mark.parametrize("moments", ["taylor", "exact"])
def test_another_convolution_starts_a_new_window(moments):
    model = _model(moments=moments)
    _train(model, _batches(2))
    model[0] = _conv(groups=2, seed=3)
    with pytest.raises(LeakfreeError, match="has not run"):
        model(_batches(1)[0])
    assert attach_convolutions(model) == {"1": "0"}
    assert int(model[1].window_forwards) == 0
    _train(model, _batches(2))
    assert int(model[1].window_forwards) == 2


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 5, 1), "has 5 output channels, the norm 6"),
        (nn.ConvTranspose2d(3, C, 1), "ConvTranspose2d is no nn.Conv1d, nn.Conv2d or nn.Conv3d"),
        (nn.Linear(3, C), "Linear is no"),
        (type("OwnConv", (nn.Conv2d,), {"forward": lambda self, x: x})(3, C, 1), "OwnConv overrides Conv2d.forward"),
    ],
)
def test_what_cannot_be_attached_is_named(conv, reason):
    with pytest.raises(ConfigError, match=reason):
        build_norm("CBN", C).attach(conv)


# ------------------------------------------------------------------------------- whole models


class _Block(nn.Module):
    """Residual, with its modules in another order than they run in."""

    def __init__(self, traceable=True):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.norm1 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.passed = nn.Identity()
        self.traceable = traceable
        self.last = None

    def forward(self, x):
        if not self.traceable and not isinstance(x, torch.Tensor):
            raise TypeError
        self.last = x  # as models do for their losses
        return torch.relu(self.norm2(self.passed(self.conv2(torch.relu(self.norm1(self.conv1(x))))))) + x


class _Untraceable(nn.Module):
    """Its forward depends on values; its parts can be followed, or stand in their order."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), _Block()

    def forward(self, x):
        return self.block(self.norm(self.conv(x))) if x.sum() < 1e9 else x


def test_convolutions_are_found_in_traceable_models_and_in_parts_of_others():
    model = convert_norms(_Untraceable(), "CBN", burn_in=0, window=2)
    pairs = {"norm": "conv", "block.norm1": "block.conv1", "block.norm2": "block.conv2"}
    assert attach_convolutions(model) == pairs
    assert model.block.last is None
    assert attach_convolutions(model) == pairs  # they keep them
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    block = convert_norms(_Block(traceable=False), "CBN", burn_in=0)
    with pytest.raises(ConfigError, match="norm1: the module before it cannot be attached: CrossIter"):
        attach_convolutions(block)
    block.norm1.attach(block.conv1)
    block.norm2.attach(block.conv2)
    assert attach_convolutions(block) == {"norm2": "conv2", "norm1": "conv1"}


def test_a_torchvision_model_trains():
    models = pytest.importorskip("torchvision.models")
    model = convert_norms(models.resnet18(num_classes=3), "CBN", burn_in=1, window=2)
    pairs = attach_convolutions(model)
    assert len(pairs) == 20
    assert pairs["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {int(model.get_submodule(path).window_forwards) for path in pairs} == {2}


class _TwoPaths(nn.Module):
    """Two convolutions into one norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.a(x)) + self.norm(self.b(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_TwoPaths(), "norm: its input comes from 2 different places"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "1: the module before it cannot be attached: Linear"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), "0: its input comes from outside of its module"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "2: the module before it .*: ReLU"),
    ],
)
def test_norms_without_one_convolution_are_named_and_nothing_is_attached(model, message):
    convert_norms(model, "CBN")
    with pytest.raises(ConfigError, match=message):
        attach_convolutions(model)
    assert all(norm.convolution is None for norm in model.modules() if isinstance(norm, CrossIterationBatchNorm))


def test_a_model_without_the_norm_is_refused_and_one_without_compensation_needs_nothing():
    with pytest.raises(ConfigError, match="has no CBN"):
        attach_convolutions(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model = convert_norms(nn.Sequential(nn.BatchNorm2d(4)), "CBN", rho=0.0)
    assert attach_convolutions(model) == {}


# ------------------------------------------------------------------------------- forwards that run twice


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("burn_in", [0, 2])
@pytest.mark.parametrize("part", ["convolution and norm", "norm"])
def test_a_recomputed_forward_is_no_iteration(reentrant, burn_in, part):
    plain, saving = (_model(burn_in=burn_in, after=[nn.ReLU(inplace=True)]) for _ in range(2))

    def checkpointed(x):
        if part == "norm":
            return checkpoint(saving[1:], saving[0](x), use_reentrant=reentrant)
        return checkpoint(saving, x, use_reentrant=reentrant)

    for step, x in enumerate(_batches(5)):
        gradients = []
        for model, forward in ((plain, plain), (saving, checkpointed)):
            x = x.detach().requires_grad_()
            forward(x).pow(2).sum().backward()
            gradients.append([x.grad, *(parameter.grad.clone() for parameter in model.parameters())])
            model.zero_grad()
            _move(model[0].weight, step, 0.1)
        assert all(map(torch.equal, *gradients))
    _assert_same_state(plain.state_dict(), saving.state_dict())
    assert int(saving[1].window_forwards) == 5 - burn_in


# ------------------------------------------------------------------------------- modes, groups, inputs


def test_eval_frozen_and_measured_forwards_leave_the_state_alone():
    model = _model()
    _train(model, _batches(3))
    norm, x = model[1], _batches(1)[0]
    state = copy.deepcopy(model.state_dict())
    y = model[0](x)
    running = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(model.eval()(x), running)
    model.train()[1].frozen = True
    torch.testing.assert_close(model(x), running)
    for mode in (True, False):
        with batch_statistics(model):
            own = model.train(mode)(x)
        torch.testing.assert_close(own, F.batch_norm(y, None, None, norm.weight, norm.bias, True))
    _assert_same_state(model.state_dict(), state)


def test_groups_of_a_scope_are_averaged_with_the_same_past():
    model, (old, new) = _model(window=2), _batches(2, rows=5)
    with torch.no_grad():
        model(old)
    _move(model[0].weight, 0, 0.1)
    sizes, whole = [2, 0, 3], copy.deepcopy(model)
    with normalization_scope(image_partition(sizes, 1, across_ranks=False)):
        y = model(new)
    parts = [part for part in new.split(sizes) if len(part)]
    expected = [copy.deepcopy(whole)(part) for part in parts]
    torch.testing.assert_close(y, torch.cat(expected))
    whole(new)
    for name, table in whole[1].named_buffers():  # the buffers and the window take all groups together
        torch.testing.assert_close(getattr(model[1], name), table)


@pytest.mark.parametrize("burn_in", [0, 2])
def test_an_empty_batch_changes_nothing(burn_in):
    model = _model(burn_in=burn_in)
    _train(model, _batches(1))
    state = copy.deepcopy(model.state_dict())
    x = torch.zeros(0, CIN, 6, 6, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert y.shape == (0, C, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    _assert_same_state(model.state_dict(), state)
    _train(model, _batches(1))


def test_a_single_value_is_defined_by_the_past():
    model = _model(nn.Conv2d(CIN, C, 1).double(), window=2)
    x = _batches(1)[0]
    with torch.no_grad():
        model(x)
        single = model(x[:1, :, :1, :1])
    y = model[0](x).detach()
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    value = y[0, :, 0, 0]
    var = (var + (value - mean) ** 2 / 2) / 2
    torch.testing.assert_close(single[0, :, 0, 0], (value - mean) / 2 / (var + EPS).sqrt())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        _model(nn.Conv2d(CIN, C, 1).double(), burn_in=1)(x[:1, :, :1, :1])


@pytest.mark.parametrize("moments", ["taylor", "exact"])
def test_channels_last_equals_contiguous(moments):
    results = []
    for layout in LAYOUTS:
        model = _model(_conv().float(), moments=moments).to(memory_format=layout)
        batches = _batches(4, dtype=torch.float32)
        results.append([*_train(model, [x.to(memory_format=layout) for x in batches]), *model.state_dict().values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("moments", ["taylor", "exact"])
def test_a_gpu_equals_the_cpu(moments):
    results = []
    for device in ("cpu", "cuda"):
        model = _model(_conv().float(), moments=moments).to(device)
        outputs = _train(model, [x.to(device) for x in _batches(5, dtype=torch.float32)])
        results.append([table.cpu() for table in (*outputs, *model.state_dict().values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)  # convolutions may use TF32


@pytest.mark.parametrize("moments", ["taylor", "exact"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16 input", "float16 input"])
def test_half_precision_stays_near_float32(how, moments):
    full, half = (_model(_conv().float(), moments=moments) for _ in range(2))
    dtype = torch.float16 if how == "float16 input" else torch.bfloat16
    if how != "autocast":
        half = half.to(dtype)
    for step, x in enumerate(_batches(4, rows=8, dtype=torch.float32)):
        expected = full(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            y = half(x if how == "autocast" else x.to(dtype))
        assert y.dtype == dtype
        assert float((y.float() - expected).detach().square().mean().sqrt()) < 0.03
        for output in (expected, y):
            output.float().pow(3).mean().backward()
        for model in (full, half):
            _move(model[0].weight, step, 0.02)
    assert half[1].window_slope.dtype == torch.float32
    for name in ("window_mean", "window_var", "window_patch", "window_slope"):
        torch.testing.assert_close(getattr(half[1], name), getattr(full[1], name), rtol=0.1, atol=0.03)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_equal_eager_ones(backend):
    eager, compiled = (_model(after=[nn.ReLU()]) for _ in range(2))
    batches = _batches(3)
    expected = _train(eager, batches)
    torch._dynamo.reset()
    run = torch.compile(compiled, backend=backend)
    outputs = _train(run, batches)
    assert all(map(torch.equal, outputs, expected))
    _assert_same_state(compiled.state_dict(), eager.state_dict())
    whole = torch.compile(compiled.eval(), backend=backend, fullgraph=True)
    torch.testing.assert_close(whole(batches[0]), eager.eval()(batches[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1 iteration, got 0"),
        ({"burn_in": -1}, "burn_in must be a number of forwards, at least 0, got -1"),
        ({"burn_in": 1.5}, "burn_in must be a whole number"),
        ({"rho": -1.0}, "rho must be at least 0"),
        ({"guard": "min"}, "guard must be 'max' or 'drop', got 'min'"),
        ({"moments": "second"}, "moments must be 'taylor' or 'exact'"),
        ({"ramp": "cosine"}, "ramp must be 'two_stage' or 'linear'"),
        ({"track_running_stats": False}, "track_running_stats must be True"),
        ({"windows": 3}, "has no option 'windows'; it takes window"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_norm("CBN", C, **options)


def test_a_linear_ramp_widens_the_window():
    model, batches = _model(window=4, burn_in=6, ramp="linear"), _batches(1)
    used = []
    for _ in range(8):
        used.append(int(model[1].window_forwards))
        _train(model, batches)
    assert used == [0, 0, 1, 2, 3, 4, 5, 6]  # the past is wanted from the second forward on: 3 * 2 // 6 = 1


# ------------------------------------------------------------------------------- ranks


def _train_on_ranks(rank, world_size, own_data):
    model = _model(window=2)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    for step, x in enumerate(_batches(4, seed=rank if own_data else 0)):
        loss = parallel(x).pow(3).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1 + 0.01 * step)
                parameter.grad = None
    return {name: table.detach().clone() for name, table in model.state_dict().items()}


def test_ranks_keep_windows_of_their_own():
    one, two = run_ranks(_train_on_ranks, 2, True)
    for name in one:
        shared = name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.num_batches_tracked", "1.window_forwards")
        assert torch.equal(one[name], two[name]) == shared, name
    same = run_ranks(_train_on_ranks, 2, False)
    _assert_same_state(*same)


def _meet_across_ranks(rank, world_size):
    model = _model()
    with normalization_scope(Partition(across_ranks=True)):
        model(torch.zeros(rank, CIN, 6, 6, dtype=torch.float64))


def test_groups_that_span_ranks_are_refused_on_all_of_them():
    with pytest.raises(AssertionError, match="the groups of this scope span ranks"):
        run_ranks(_meet_across_ranks, 2, timeout=30)
