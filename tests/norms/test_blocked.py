"""The passes by blocks against plain formulas, and how exact the norms made of them are in each layout and dtype."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from leakfree.norms import BatchNorm, Partition, blocked, group_moments, partitioned_batch_norm
from leakfree.norms.blocked import Rows
from tests.ranks import run_ranks

SHAPES = [
    *[(5, 3), (1, 1), (4, 1), (1, 4), (0, 3)],  # S = 1
    *[(5, 3, 7), (4, 1, 6), (3, 4, 1), (0, 3, 7), (3, 4, 0)],
    *[(5, 3, 4, 3), (4, 1, 3, 5), (6, 4, 1, 1), (1, 2, 9, 11), (0, 3, 4, 3), (40, 2, 2, 2)],
    *[(3, 2, 2, 3, 4), (2, 1, 3, 3, 3)],
]
LAYOUTS = ["contiguous", "channels last", "transposed", "every second", "expanded", "sliced channels"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _lay(x, layout):
    """The same numbers, dense in another order or not dense at all; an expanded one repeats its first position."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "sliced channels":
        return torch.cat([x + 1, x, x - 1], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if layout == "expanded" and x.numel():
        return x[..., :1].expand(x.shape)
    return x


def _numbers(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[None, 64, 400], ids=["one block", "tiny blocks", "small blocks"])
def blocks(request, monkeypatch):
    """The bytes of a block, and no lower bound for the kernels that work on blocks of a group."""
    if request.param is not None:
        monkeypatch.setattr(blocked, "_BLOCK_BYTES", request.param)
        if hasattr(blocked, "_SEGMENT_BYTES"):
            monkeypatch.setattr(blocked, "_SEGMENT_BYTES", 0)
    return request.param


def _bound(dtype):
    return {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def _close(actual, expected, dtype, bound=None):
    """As exact as the dtype of the result, relative to the largest number expected."""
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=scale * (bound or _bound(dtype)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiny_blocks_cover_each_number_once(shape, monkeypatch):
    monkeypatch.setattr(blocked, "_BLOCK_BYTES", 64)
    for layout in ("contiguous", "channels last"):
        rows = Rows.of(_lay(_numbers(shape), layout))
        seen = torch.zeros(rows.values.shape, dtype=torch.int64)
        taken = list(rows.blocks())
        for r, s, scratch in taken:
            seen[r, s] += 1
            assert scratch.shape == seen[r, s].shape
            assert scratch.numel() * scratch.itemsize <= max(64, rows.values.shape[2] * scratch.itemsize)
        assert bool((seen == 1).all())
        assert len(taken) > 1 or rows.values.numel() <= 8


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_pass_is_its_formula(shape, dtype):
    for layout, other in zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True):
        _check_passes(_lay(_numbers(shape, dtype) * 3 + 1, layout), _lay(_numbers(shape, dtype, 1), other))


def _check_passes(x, dy):
    shape, dtype, rows = x.shape, x.dtype, Rows.of(x)
    dy_rows = rows.match(dy)
    for alike, centered in itertools.product((False, True), repeat=2):
        each = (1 if alike else shape[0], shape[1])
        center, scale, slope, offset = (_numbers(each, rows.wide, seed).add(0.5) for seed in (2, 3, 4, 5))
        column = [numbers.double().view(*each, *[1] * (x.ndim - 2)) for numbers in (center, scale, slope, offset)]
        c = column[0] if centered else 0.0
        x64, dy64, positions = x.double(), dy.double(), tuple(range(2, x.ndim))

        def over_positions(values, positions=positions):
            return values.sum(positions) if positions else values

        given = center if centered else None
        _close(blocked.row_sums(rows), over_positions(x64), rows.wide)
        if centered:
            _close(blocked.deviation_sums(rows, center), over_positions(x64 - c), rows.wide)
            _close(blocked.deviation_sums(rows, center, squared=True), over_positions((x64 - c) ** 2), rows.wide)
        total, product = blocked.product_sums(dy_rows, rows, given)
        _close(total, over_positions(dy64), rows.wide)
        _close(product, over_positions(dy64 * (x64 - c)), rows.wide)
        y = rows.tensor(blocked.affine(rows, given, scale, offset, rows.room()))
        _close(y, (x64 - c) * column[1] + column[3], dtype)
        dx = rows.tensor(blocked.gradient(dy_rows, rows, given, scale, slope, offset, rows.room()))
        _close(dx, dy64 * column[1] + (x64 - c) * column[2] + column[3], dtype)


def _formula(x, groups, weight, bias, eps=1e-5):
    columns, dims = (1, -1, *[1] * (x.ndim - 2)), [0, *range(2, x.ndim)]
    y = 0 * (x + weight.view(columns) + bias.view(columns))
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        deviation = x[rows] - x[rows].mean(dims, keepdim=True)
        std = ((deviation**2).mean(dims, keepdim=True) + eps).sqrt()
        y = y.index_add(0, rows, deviation / std * weight.view(columns) + bias.view(columns))
    return y


def _stds(x, groups, eps=1e-5):
    """The smallest of each group."""
    if not x.numel():
        return []
    values = [x[groups == group].movedim(1, 0).flatten(1) for group in groups.unique()]
    return [(each.var(1, correction=0).min() + eps).sqrt().item() for each in values]


def _gradients(forward, x, dy, weight, bias):
    leaves = [tensor.detach().requires_grad_(True) for tensor in (x, weight, bias)]
    y = forward(*leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def _partitions(num_rows):
    """(groups of the rows, partition): one group, random ones, uneven chunks with an empty one."""
    groups = torch.randint(3, (num_rows,), generator=torch.Generator().manual_seed(0))
    first = num_rows // 4
    chunks = torch.arange(num_rows).ge(first).long() * 2
    return [
        (torch.zeros(num_rows, dtype=torch.int64), Partition()),
        (groups, Partition(groups, 3)),
        (chunks, Partition.consecutive([first, 0, num_rows - first])),
    ]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("mean", [1.0, 60.0])  # near zero and far from it are two ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_is_its_formula_in_any_layout(shape, dtype, mean):
    weight, bias = _numbers((2, shape[1]), dtype, 2)
    for layout, other in zip(LAYOUTS, LAYOUTS[2:] + LAYOUTS[:2], strict=True):
        x, dy = _lay(_numbers(shape, dtype) * 2 + mean, layout), _lay(_numbers(shape, dtype, 1), other)
        for groups, partition in _partitions(shape[0]):
            ours = _gradients(lambda *a, p=partition: partitioned_batch_norm(a[0], p, *a[1:])[0], x, dy, weight, bias)
            exact = _gradients(
                lambda *a, g=groups: _formula(a[0], g, *a[1:]), x.double(), dy.double(), weight.double(), bias.double()
            )
            # Where the values of a group are nearly alike, dx is a difference of numbers of order 1 / std.
            magnified = max([1.0, *(1 / std for std in _stds(x.double(), groups))])
            for a, b in zip(ours, exact, strict=True):
                _close(a, b, dtype, _bound(dtype) * magnified * (100 if dtype == torch.float64 else 10))


def _off(x, ratio):
    """Float32 numbers with mean / std of about ``ratio``, and themselves in float64."""
    x = (x + ratio).float()
    return x, x.double()


def _relative_errors(moments, x64, groups):
    """Of the variance, and of the mean against the standard deviation, at most over groups and channels."""
    errors = []
    for group in groups.unique():
        values = x64[groups == group].movedim(1, 0).flatten(1)
        var, mean = values.var(1, correction=0), values.mean(1)
        errors.append(((moments.var[group] - var) / var).abs().max().item())
        errors.append(((moments.mean[group] - mean) / var.sqrt()).abs().max().item())
    return max(errors)


ACCURATE = [(512, 8, 7, 7), (24, 4, 64, 64), (8192, 6), (64, 3, 700), (16, 2, 8, 16, 16), (256, 64, 7, 7)]
ratios = pytest.mark.parametrize("ratio", [0, 1, 5, 7.9, 10, 100, 1000])
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels last"])


@layouts
@ratios
@pytest.mark.parametrize("shape", ACCURATE, ids=str)
def test_float32_variance_is_exact_to_a_millionth(shape, ratio, layout):
    x, x64 = _off(_numbers(shape), ratio)
    x = _lay(x, layout)
    for groups, partition in _partitions(shape[0]):
        assert _relative_errors(group_moments(x, partition), x64, groups) <= 1e-6


@ratios
@pytest.mark.parametrize("shape", ACCURATE[:2], ids=str)
def test_running_variance_is_exact_to_a_millionth(shape, ratio):
    """Of the layer, whose single group on one rank takes torch's kernel: that for channels last does not keep to it."""
    x, x64 = _off(_numbers(shape), ratio)
    norm = BatchNorm(shape[1], momentum=1.0)
    norm(x)
    var = x64.movedim(1, 0).flatten(1).var(1)
    assert ((norm.running_var.double() - var) / var).abs().max() <= 1e-6


def _variances(rank, world_size, cases):
    """The relative error of the variances of all rows, of both ranks, as this rank finds them."""
    errors = []
    for sizes, ratio, layout, num_groups in cases:
        x, x64 = _off(_numbers((sum(sizes), 4, 24, 24)), ratio)
        groups = torch.randint(num_groups, (sum(sizes),), generator=torch.Generator().manual_seed(0))
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        partition = Partition(groups[mine] if num_groups > 1 else None, num_groups, True)
        errors.append(_relative_errors(group_moments(_lay(x[mine], layout), partition), x64, groups))
    return errors


def test_float32_variance_is_exact_across_ranks():
    cases = list(
        itertools.product([(16, 16), (1, 29), (30, 0)], [0, 5, 10, 1000], ["contiguous", "channels last"], [1, 3])
    )
    for errors in run_ranks(_variances, 2, cases, timeout=30):
        assert [case for case, error in zip(cases, errors, strict=True) if error > 1e-6] == []


@layouts
@ratios
@pytest.mark.parametrize("shape", [(64, 8, 7, 7), (12, 4, 40, 40), (512, 6)], ids=str)
def test_outputs_and_gradients_are_exact_far_from_zero(shape, ratio, layout):
    """Both to a few roundings of float32, although the input itself is ``ratio`` times coarser than its spread."""
    x, x64 = _off(_numbers(shape), ratio)
    dy = _numbers(shape, torch.float32, 1)
    weight, bias = (_numbers((2, shape[1]), torch.float32, 2)).abs() + 0.5
    for groups, partition in _partitions(shape[0]):
        ours = _gradients(
            lambda *a, p=partition: partitioned_batch_norm(a[0], p, *a[1:])[0], _lay(x, layout), dy, weight, bias
        )
        exact = _gradients(
            lambda *a, g=groups: _formula(a[0], g, *a[1:]), x64, dy.double(), weight.double(), bias.double()
        )
        _close(ours[0], exact[0], torch.float32, 2e-6)
        _close(ours[1], exact[1], torch.float32, 2e-6)
        for a, b in zip(ours[2:], exact[2:], strict=True):  # sums over all values, of which most cancel
            _close(a, b, torch.float32, 1e-6 * (x.numel() / shape[1]) ** 0.5)


@pytest.mark.usefixtures("blocks")
@layouts
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7, 1000.1, 1e-30])
def test_a_constant_channel_gives_its_bias(constant, layout):
    x = torch.full((12, 3, 5, 5), constant)
    x[:, 1] = _numbers((12, 5, 5), torch.float32)  # beside one that is not
    weight, bias = torch.tensor([1.5, -2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])
    for _, partition in _partitions(12):
        y, moments = partitioned_batch_norm(_lay(x, layout), partition, weight, bias)
        seen = moments.count > 0
        assert torch.equal(y[:, 0], torch.full_like(y[:, 0], 0.1))
        assert torch.equal(y[:, 2], torch.full_like(y[:, 2], 0.3))
        assert not moments.var[seen][:, [0, 2]].any()


@layouts
@pytest.mark.parametrize("constant", [1e-3, 0.01, 0.02])
def test_a_constant_near_zero_gives_its_bias_to_a_few_roundings(constant, layout):
    """Within 8 / 316 of zero, where eps makes its std: x * scale + shift rounds each."""
    y, _ = partitioned_batch_norm(_lay(torch.full((12, 3, 5, 5), constant), layout), Partition(), None, torch.ones(3))
    assert (y - 1).abs().max() <= 1e-6


@pytest.mark.usefixtures("blocks")
@layouts
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bad_value_stays_in_its_group(dtype, bad, layout):
    x, dy = (_numbers((12, 3, 4, 5), dtype, seed) for seed in (0, 1))
    weight, bias = _numbers((2, 3), dtype, 2)
    for groups, partition in _partitions(12)[1:]:
        clean = _gradients(
            lambda *a, p=partition: partitioned_batch_norm(a[0], p, *a[1:])[0], _lay(x, layout), dy, weight, bias
        )
        ill = x.clone()
        ill[-1, 1, 2, 3] = bad
        y, dx, *_ = _gradients(
            lambda *a, p=partition: partitioned_batch_norm(a[0], p, *a[1:])[0], _lay(ill, layout), dy, weight, bias
        )
        others = groups != groups[-1]
        bound = _bound(dtype)  # the way may be another one, the numbers are the same
        for a, b in ((y, clean[0]), (dx, clean[1])):
            torch.testing.assert_close(a[others], b[others], rtol=bound, atol=10 * bound)
            torch.testing.assert_close(a[:, [0, 2]], b[:, [0, 2]], rtol=bound, atol=10 * bound)  # nor other channels
            assert not a[~others][:, 1].isfinite().all()


@pytest.mark.usefixtures("blocks")
@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_expanded_gradient_and_an_expanded_input(dtype, layout):
    weight, bias = _numbers((2, 3), dtype, 2)
    for groups, partition in _partitions(12):
        for x in (_lay(_numbers((12, 3, 4, 5), dtype), layout), _numbers((12, 3, 1, 1), dtype).expand(12, 3, 4, 5)):
            leaves = [tensor.detach().requires_grad_(True) for tensor in (x, weight, bias)]
            partitioned_batch_norm(leaves[0], partition, *leaves[1:])[0].sum().backward()
            exact = [tensor.double().detach().requires_grad_(True) for tensor in (x, weight, bias)]
            _formula(exact[0], groups, *exact[1:]).sum().backward()
            for ours, theirs in zip(leaves, exact, strict=True):
                _close(ours.grad, theirs.grad, dtype, 20 * _bound(dtype))


@pytest.mark.usefixtures("blocks")
@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_output_and_the_gradient_may_be_changed_in_place(dtype, layout):
    """ReLU in place after the norm; and the norm's own work must not change the gradient it is given."""
    weight, bias = _numbers((2, 3), dtype, 2)
    for _, partition in _partitions(12):
        results = []
        for inplace in (False, True):
            leaf = _lay(_numbers((12, 3, 4, 5), dtype), layout).detach().requires_grad_(True)
            y = F.relu(partitioned_batch_norm(leaf, partition, weight, bias)[0], inplace=inplace)
            dy = _numbers(y.shape, dtype, 5)
            before = dy.clone()
            y.backward(dy)
            assert torch.equal(dy, before)
            results.append(leaf.grad)
        assert torch.equal(*results)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 2, 5, 6)])
def test_the_layout_of_the_input_is_kept(shape, dtype):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for layout, (_, partition) in itertools.product((torch.contiguous_format, last), _partitions(4)):
        x = _numbers(shape, dtype).contiguous(memory_format=layout).requires_grad_(True)
        y = partitioned_batch_norm(x, partition)[0]
        y.backward(_numbers(shape, dtype))  # of the plain layout
        assert y.is_contiguous(memory_format=layout)
        assert x.grad.is_contiguous(memory_format=layout)
