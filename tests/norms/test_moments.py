"""BatchMoments against autograd through the moments written out in float64, under a rule that is no batch norm's."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.norms import BatchMoments, Partition
from tests.ranks import run_ranks

C = 3
SHAPES = [(), (1,), (5,), (3, 2), (2, 2, 2)]


def _rule(mean, var, weight, bias):
    """Scale and shift that depend on everything, in other ways than BN's."""
    scale = weight * torch.rsqrt(var + 0.1) + 0.3 * torch.tanh(mean)
    return scale, bias + 0.5 * mean - 0.2 * var


def _row_rule(instance_mean, mean, var, weight, bias):
    gate = torch.sigmoid(instance_mean)
    scale, shift = _rule(mean, var, weight, bias)
    return gate * scale, shift + instance_mean.square()


def reference(x, weight, bias, groups, *, of_rows=False):
    """In x's dtype, by the formula; ``groups`` is (N,)."""
    y, dims, column = torch.zeros_like(x), (0, *range(2, x.ndim)), (-1, C, *[1] * (x.ndim - 2))
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        part = x[rows]
        mean = part.mean(dims)
        moments = mean, (part - mean.view(column)).square().mean(dims)
        if of_rows:
            instance_mean = part.flatten(2).mean(2) if x.ndim > 2 else part
            scale, shift = _row_rule(instance_mean, *moments, weight, bias)
        else:
            scale, shift = _rule(*moments, weight, bias)
        y = y.index_put((rows,), part * scale.view(column) + shift.view(column))
    return y


def ours(x, weight, bias, partition, *, of_rows=False):
    batch = BatchMoments(x, partition, instances=of_rows)
    if not of_rows:
        return batch.affine(*_rule(batch.mean, batch.var, weight.double(), bias.double()))
    groups = torch.zeros(len(x), dtype=torch.int64) if partition.groups is None else partition.groups
    mean, var = batch.mean[groups], batch.var[groups]
    scale, shift = _row_rule(batch.instance_mean, mean, var, weight.double(), bias.double())
    return batch.affine(scale, shift, of_rows=True)


def _problem(num_rows, shape=(3, 2), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, C, *shape, dtype=torch.float64, generator=generator) * 2 + 1
    v = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(2, C, dtype=torch.float64, generator=generator)
    return x.to(dtype), v.to(dtype), weight, bias


def _gradients(run, x, v, weight, bias):
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in (x, weight, bias)]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad((y * v).sum(), leaves)]


def _close(some, others, tolerance=1e-9):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def _whole(num_rows):
    return torch.zeros(num_rows, dtype=torch.int64)


# ------------------------------------------------------------------------------------ values and gradients


@given(st.integers(1, 9), st.integers(0, 4), st.sampled_from(SHAPES), st.booleans())
def test_values_and_gradients_are_those_of_the_formula(num_rows, num_groups, shape, of_rows):
    x, v, weight, bias = _problem(num_rows, shape)
    groups = torch.randint(max(num_groups, 1), (num_rows,), generator=torch.Generator().manual_seed(num_rows))
    partition = Partition(groups, num_groups) if num_groups else Partition()  # 0: whole batch
    _close(
        _gradients(lambda *a: ours(*a, partition, of_rows=of_rows), x, v, weight, bias),
        _gradients(lambda *a: reference(*a, groups, of_rows=of_rows), x, v, weight, bias),
    )


@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_gradcheck(grouped, of_rows):
    x, _, weight, bias = _problem(5)
    partition = Partition(torch.tensor([0, 2, 0, 2, 2]), 3) if grouped else Partition()
    leaves = [tensor.requires_grad_(True) for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: ours(*a, partition, of_rows=of_rows), leaves)


@pytest.mark.parametrize("grouped", [False, True])
def test_moments_are_values_of_autograd_by_themselves(grouped):
    """A loss on the moments alone, without a map."""
    groups = torch.tensor([0, 1, 0, 1, 1]) if grouped else _whole(5)
    x, other = (_problem(5)[0].requires_grad_(True) for _ in range(2))
    batch = BatchMoments(x, Partition(groups, 2) if grouped else None, instances=True)
    parts = [other[groups == group] for group in groups.unique()]
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts])
    var = torch.stack([part.var((0, 2, 3), correction=0) for part in parts])
    expected = mean, var, other.mean((2, 3))
    assert torch.equal(batch.count, torch.stack([torch.tensor(6.0 * len(part)) for part in parts]).double())
    _close((batch.mean, batch.var, batch.instance_mean), expected)
    loss = [(a.sin() * b).sum() for a, b in zip((batch.mean, batch.var, batch.instance_mean), (1, 2, 3), strict=True)]
    theirs = [(a.sin() * b).sum() for a, b in zip(expected, (1, 2, 3), strict=True)]
    _close(torch.autograd.grad(sum(loss), x), torch.autograd.grad(sum(theirs), other))


def test_a_rule_may_ignore_the_moments():
    x, v, weight, bias = _problem(4)
    x.requires_grad_(True)
    scale, shift = weight[None], bias[None]
    y = BatchMoments(x).affine(scale, shift)
    column = (1, C, 1, 1)
    _close([y, *torch.autograd.grad(y, x, v)], [x * weight.view(column) + bias.view(column), v * weight.view(column)])


def test_moments_are_used_by_a_map_and_beside_it():
    groups = _whole(4)
    x, v, weight, bias = _problem(4)

    def run(a, w, b, mine):
        batch = BatchMoments(a) if mine else None
        y = batch.affine(*_rule(batch.mean, batch.var, w, b)) if mine else reference(a, w, b, groups)
        mean = batch.mean[0] if mine else a.mean((0, 2, 3))
        return y * mean.view(1, C, 1, 1)

    _close(
        _gradients(lambda *a: run(*a, True), x, v, weight, bias),
        _gradients(lambda *a: run(*a, False), x, v, weight, bias),
    )


def test_pooled_moments_are_those_of_all_rows():
    x, *_ = _problem(7)
    count, mean, var = BatchMoments(x.requires_grad_(True), Partition(torch.arange(7) % 3, 4)).pooled()
    assert count == 7 * 6
    assert not mean.requires_grad
    _close((mean, var), (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)))


# ------------------------------------------------------------------------------------ layouts and dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_layouts_give_the_same(dtype, grouped, of_rows):
    x, v, weight, bias = _problem(6, (4, 5), dtype=dtype)
    partition = Partition(torch.arange(6) % 2, 2) if grouped else Partition()
    plain = _gradients(lambda *a: ours(*a, partition, of_rows=of_rows), x, v, weight, bias)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        other = _gradients(
            lambda a, w, b, c=change: ours(c(a), w, b, partition, of_rows=of_rows), x, change(v), weight, bias
        )
        assert other[0].dtype == dtype
        _close(plain, other, tolerance)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_(True)
    y = ours(last, weight, bias, partition, of_rows=of_rows)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y, last, v)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_rows", [False, True])
def test_half_precision_is_rounded_once(dtype, of_rows):
    """Values and gradients are those of the same numbers in float64, rounded to the dtype."""
    x, v, weight, bias = _problem(6, (8, 8), dtype=dtype)
    half = _gradients(lambda *a: ours(*a, Partition(), of_rows=of_rows), x, v, weight, bias)
    exact = _gradients(lambda *a: reference(*a, _whole(6), of_rows=of_rows), x.double(), v.double(), weight, bias)
    assert half[0].dtype == half[1].dtype == dtype
    for a, b in zip(half[:2], exact[:2], strict=True):
        assert ((a.double() - b) / (b.abs() + 1e-2)).abs().max() < torch.finfo(dtype).eps
    _close(half[2:], exact[2:], 1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("num_groups", [0, 1, 3])
@pytest.mark.parametrize("of_rows", [False, True])
def test_inputs_far_from_zero_do_not_cancel_in_float32(layout, num_groups, of_rows):
    """A batch norm at mean/std 1000, where x * scale + shift would be off by 1e-4 and E[x^2] - E[x]^2 by 1e-1."""
    x, v, *_ = _problem(32, (16, 16), dtype=torch.float32)
    x = (x / 2 + 1000).contiguous(memory_format=layout)
    groups = torch.arange(32) % max(num_groups, 1)
    partition = Partition(groups, num_groups) if num_groups else Partition()
    leaf, exact = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    batch = BatchMoments(leaf, partition, instances=of_rows)
    mean, invstd = (table[groups] if of_rows else table for table in (batch.mean, torch.rsqrt(batch.var + 1e-5)))
    gate = torch.sigmoid(batch.instance_mean - 1000) if of_rows else 1
    y = batch.affine(gate * invstd, -gate * invstd * mean, of_rows=of_rows)
    expected = torch.zeros_like(exact)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        part = exact[rows]
        var, mean = torch.var_mean(part, (0, 2, 3), correction=0, keepdim=True)
        gates = torch.sigmoid(part.mean((2, 3), keepdim=True) - 1000) if of_rows else 1
        expected = expected.index_put((rows,), gates * (part - mean) / (var + 1e-5).sqrt())
    _close([y], [expected], 2e-6)
    _close(torch.autograd.grad(y, leaf, v), torch.autograd.grad(expected, exact, v.double()), 5e-6)


def test_a_constant_channel_is_finite():
    x = torch.full((4, C, 2, 2), 1e4, requires_grad=True)
    batch = BatchMoments(x)
    scale = torch.rsqrt(batch.var + 1e-5)
    y = batch.affine(scale, -batch.mean * scale)
    y.sum().backward()
    _close([y, x.grad], [torch.zeros_like(y), torch.zeros_like(y)], 1e-6)


# ------------------------------------------------------------------------------------ empty, no gradient, again


@pytest.mark.parametrize("shape", [(), (3, 2)])
@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_empty_batch_is_empty_with_zero_gradients(shape, num_groups, of_rows, dtype):
    x, v, weight, bias = _problem(0, shape, dtype=dtype)
    partition = Partition(_whole(0), num_groups) if num_groups else Partition()
    y, dx, *gradients = _gradients(lambda *a: ours(*a, partition, of_rows=of_rows), x, v, weight, bias)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (x.shape, dtype, x.shape, dtype)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert BatchMoments(x, partition).count.tolist() == [0.0] * max(num_groups, 1)


def test_empty_groups_stay_out_of_the_way():
    x, v, weight, bias = _problem(4)
    groups = torch.tensor([3, 1, 3, 1])
    _close(
        _gradients(lambda *a: ours(*a, Partition(groups, 6)), x, v, weight, bias),
        _gradients(lambda *a: reference(*a, groups), x, v, weight, bias),
    )


@pytest.mark.parametrize("of_rows", [False, True])
def test_an_input_that_needs_no_gradient(of_rows):
    x, v, weight, bias = _problem(4)
    expected = _gradients(lambda *a: reference(*a, _whole(4), of_rows=of_rows), x, v, weight, bias)
    weight.requires_grad_(True)
    y = ours(x, weight, bias, Partition(), of_rows=of_rows)
    assert not BatchMoments(x).mean.requires_grad
    _close([y, *torch.autograd.grad(y, weight, v)], [expected[0], expected[2]])
    assert not ours(x, weight.detach(), bias, Partition(), of_rows=of_rows).requires_grad
    with torch.inference_mode():
        _close([ours(x, weight, bias, Partition(), of_rows=of_rows)], [expected[0]])


@pytest.mark.parametrize("of_rows", [False, True])
def test_a_graph_may_be_used_again(of_rows):
    x, v, weight, bias = _problem(4)
    leaves = [tensor.requires_grad_(True) for tensor in (x, weight, bias)]
    y = ours(*leaves, Partition(), of_rows=of_rows)
    first = torch.autograd.grad(y, leaves, v, retain_graph=True)
    again = torch.autograd.grad(y, leaves, v, retain_graph=True)
    other = torch.autograd.grad(y, leaves, -2 * v)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    _close([-2 * gradient for gradient in first], other)


def test_a_backward_that_stops_before_the_moments_leaves_nothing_to_the_next():
    x, v, weight, bias = _problem(4)
    x.requires_grad_(True)
    weight.requires_grad_(True)
    batch = BatchMoments(x)
    y = batch.affine(*_rule(batch.mean, batch.var, weight, bias))
    torch.autograd.grad(y, weight, v, retain_graph=True)
    (alone,) = torch.autograd.grad(batch.mean.sum(), x, retain_graph=True)
    _close([alone], [torch.full_like(x, 1 / (4 * 6))])


def test_the_result_may_be_changed_in_place_but_not_the_input():
    x, v, weight, bias = _problem(4)
    leaf, other = (x.clone().requires_grad_(True) for _ in range(2))
    y = ours(leaf, weight, bias, Partition()).relu_()
    expected = reference(other, weight, bias, _whole(4)).relu()
    _close(torch.autograd.grad(y, leaf, v), torch.autograd.grad(expected, other, v))
    inner = leaf * 1
    y = ours(inner, weight, bias, Partition())
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("of_rows", [False, True])
def test_a_compiler_changes_nothing(of_rows):
    torch.compiler.reset()
    x, v, weight, bias = _problem(4)
    compiled = torch.compile(lambda *a: ours(*a, Partition(), of_rows=of_rows), backend="aot_eager")
    expected = _gradients(lambda *a: reference(*a, _whole(4), of_rows=of_rows), x, v, weight, bias)
    _close(_gradients(compiled, x, v, weight, bias), expected)


# ------------------------------------------------------------------------------------ mistakes


def test_a_second_map_is_refused():
    batch = BatchMoments(_problem(4)[0])
    scale, shift = torch.ones(2, 1, C, dtype=torch.float64)
    batch.affine(scale, shift)
    with pytest.raises(RuntimeError, match="was called before: take the moments again"):
        batch.affine(scale, shift)


@pytest.mark.parametrize(
    ("scale", "of_rows", "message"),
    [
        (torch.ones(C).double(), False, r"scale must be float64 \(2, 3\), one number per group .* got float64 \(3,\)"),
        (torch.ones(1, C).double(), False, r"one number per group and channel, got float64 \(1, 3\)"),
        (torch.ones(2, C).double(), True, r"scale must be float64 \(4, 3\), one number per row and channel"),
        (torch.ones(2, C), False, r"got float32 \(2, 3\)"),
    ],
)
def test_a_table_of_another_shape_or_dtype_is_refused(scale, of_rows, message):
    good = torch.ones(4 if of_rows else 2, C, dtype=torch.float64)
    partition = Partition(torch.tensor([0, 1, 0, 1]), 2)
    x = _problem(4)[0]
    with pytest.raises(ValueError, match=message):
        BatchMoments(x, partition).affine(scale, good, of_rows=of_rows)
    with pytest.raises(ValueError, match=message.replace("scale", "shift")):
        BatchMoments(x, partition).affine(good, scale, of_rows=of_rows)


# ------------------------------------------------------------------------------------ ranks


def _on_a_rank(rank, world_size, cases):
    results = []
    for sizes, num_groups, of_rows, detached in cases:
        x, v, weight, bias = _problem(sum(sizes))
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        groups = (torch.arange(sum(sizes)) % num_groups)[mine] if num_groups else None
        partition = Partition(groups, max(num_groups, 1), across_ranks=True)
        if detached and not sizes[rank]:
            weight.requires_grad_(True)
            y = ours(x[mine], weight, bias, partition, of_rows=of_rows)
            (y * v[mine]).sum().backward()
            results.append([y.detach(), x[mine], weight.grad, bias * 0])
        else:
            run = _gradients(lambda *a, p=partition, r=of_rows: ours(*a, p, of_rows=r), x[mine], v[mine], weight, bias)
            results.append(run)
    return [[tensor.numpy() for tensor in result] for result in results]


def test_ranks_are_one_process_also_where_some_have_no_rows():
    """Values and gradients of x row by row; those of parameters are each rank's share."""
    sizes = [(3, 2), (5, 0), (0, 4), (1, 1)]
    cases = list(itertools.product(sizes, (0, 3), (False, True), (False, True)))
    for case, *shards in zip(cases, *run_ranks(_on_a_rank, 2, cases, timeout=20), strict=True):
        (num_rows, num_groups, of_rows) = sum(case[0]), case[1], case[2]
        groups = torch.arange(num_rows) % num_groups if num_groups else _whole(num_rows)
        x, v, weight, bias = _problem(num_rows)
        y, dx, dweight, dbias = _gradients(
            lambda *a, g=groups, r=of_rows: reference(*a, g, of_rows=r), x, v, weight, bias
        )
        first, second = ([torch.from_numpy(array) for array in shard] for shard in shards)
        _close((torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])), (y, dx))
        _close((first[2] + second[2], first[3] + second[3]), (dweight, dbias))


@settings(max_examples=15)
@given(st.integers(1, 40), st.sampled_from([(), (4,), (7, 9)]), st.sampled_from([0.0, 5.0, 300.0]))
def test_float32_moments_are_those_of_float64(num_rows, shape, offset):
    x = (_problem(num_rows, shape, seed=num_rows)[0] + offset).float()
    batch = BatchMoments(x)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(batch.mean[0], exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch.var[0], exact.var(1, correction=0), rtol=1e-5, atol=1e-6)
