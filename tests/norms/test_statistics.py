"""The partitioned batch norm against its definition, over sizes, ranks, dtypes and layouts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.norms import Partition, group_moments, partitioned_batch_norm
from leakfree.norms.statistics import chunked_batch_norm
from tests.ranks import run_ranks


def reference(x, groups, weight, bias, eps=1e-5):
    """Each group by the formula, in float64 autograd."""
    out = torch.zeros_like(x)
    dims = (0, *range(2, x.ndim))
    column = (1, -1, *[1] * (x.ndim - 2))
    for group in groups.unique():
        rows = groups == group
        part = x[rows]
        mean = part.mean(dims).view(column)
        var = (part - mean).square().mean(dims).view(column)
        normal = (part - mean) / (var + eps).sqrt() * weight.view(column) + bias.view(column)
        out = out.index_put((rows.nonzero()[:, 0],), normal)
    return out


def _problem(num_rows, num_groups, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 3, *shape, dtype=torch.float64, generator=generator) * 2 + 5
    v = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    groups = torch.randint(num_groups, (num_rows,), generator=generator)
    weight, bias = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    return x, v, groups, weight, bias


def _gradients(forward, x, v, weight, bias):
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in (x, weight, bias)]
    y = forward(*leaves)
    return [y.detach(), *torch.autograd.grad((y * v).sum(), leaves)]


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([(), (1,), (4,), (3, 2), (2, 2, 2)]))
def test_each_group_is_normalized_by_the_formula(num_rows, num_groups, shape):
    x, v, groups, weight, bias = _problem(num_rows, num_groups, shape)
    ours = _gradients(
        lambda *a: partitioned_batch_norm(a[0], Partition(groups, num_groups), *a[1:])[0], x, v, weight, bias
    )
    theirs = _gradients(lambda a, w, b: reference(a, groups, w, b), x, v, weight, bias)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (5,), (3, 3)])
def test_gradcheck(shape):
    x, _, groups, weight, bias = _problem(6, 2, shape)
    leaves = [tensor.requires_grad_(True) for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: partitioned_batch_norm(a[0], Partition(groups, 2), *a[1:])[0], leaves)


def test_channels_last_and_strided_inputs_give_the_same():
    x, v, groups, weight, bias = _problem(6, 2, (4, 4))
    partition = Partition(groups, 2)
    plain = _gradients(lambda *a: partitioned_batch_norm(a[0], partition, *a[1:])[0], x, v, weight, bias)
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        other = _gradients(
            lambda a, w, b, c=change: partitioned_batch_norm(c(a), partition, w, b)[0], x, v, weight, bias
        )
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    out = partitioned_batch_norm(x.contiguous(memory_format=torch.channels_last), partition)[0]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ratio", [10, 100, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_variance_does_not_cancel_in_float32(ratio, layout):
    x64 = torch.randn(64, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + ratio
    x32 = x64.float()
    if layout == "channels_last":
        x32 = x32.contiguous(memory_format=torch.channels_last)
    groups = torch.arange(64) % 3
    exact = torch.stack([x32.double()[groups == g].var((0, 2, 3), correction=0) for g in range(3)])
    moments = group_moments(x32, Partition(groups, 3))
    assert ((moments.var - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_wide(dtype):
    x = (torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    groups = torch.arange(32) % 4
    y, moments = partitioned_batch_norm(x, Partition(groups, 4))
    assert y.dtype == dtype
    exact = torch.stack([x.double()[groups == g].mean((0, 2, 3)) for g in range(4)])
    torch.testing.assert_close(moments.mean, exact, rtol=1e-6, atol=0)


def _sharded(rank, world_size, sizes, across):
    x, v, groups, weight, bias = _problem(sum(sizes), 3, (3, 2))
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    partition = Partition(groups[mine] if across else None, 3 if across else 1, True)
    return _gradients(lambda *a: partitioned_batch_norm(a[0], partition, *a[1:])[0], x[mine], v[mine], weight, bias)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process_for_all_small_sizes(world_size, grouped):
    for sizes in itertools.product((0, 1, 3), repeat=world_size):
        if not sum(sizes):
            continue
        shards = run_ranks(_sharded, world_size, sizes, grouped)
        x, v, groups, weight, bias = _problem(sum(sizes), 3, (3, 2))
        if not grouped:
            groups = torch.zeros_like(groups)
        y, dx, dweight, dbias = _gradients(lambda a, w, b, g=groups: reference(a, g, w, b), x, v, weight, bias)
        torch.testing.assert_close(torch.cat([shard[0] for shard in shards]), y, rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.cat([shard[1] for shard in shards]), dx, rtol=0, atol=1e-9)
        torch.testing.assert_close(sum(shard[2] for shard in shards), dweight, rtol=0, atol=1e-9)
        torch.testing.assert_close(sum(shard[3] for shard in shards), dbias, rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_pooled_moments_are_those_of_all_values(sizes):
    num_rows = sum(sizes)
    x = torch.randn(num_rows, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(num_rows))
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count, mean, var = group_moments(x, Partition(groups, len(sizes))).pooled()
    assert count == num_rows * 3
    if num_rows:
        torch.testing.assert_close(mean, x.mean((0, 2)))
        torch.testing.assert_close(var, x.var((0, 2), correction=0))


def test_one_group_is_torchs_batch_norm():
    x, _, _, weight, bias = _problem(8, 1, (4, 4))
    y, _ = partitioned_batch_norm(x, Partition(), weight, bias)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, weight, bias, True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[3, 3], [4, 0, 1, 3], [8], [0, 2]])
@pytest.mark.parametrize("shape", [(), (4, 4)])
def test_consecutive_groups_by_torchs_kernel_give_the_same(sizes, shape):
    """The path of GPUs, checked on whatever device there is."""
    x, v, _, weight, bias = _problem(sum(sizes), 1, shape)
    partition = Partition.consecutive(sizes)
    ours = _gradients(lambda *a: partitioned_batch_norm(a[0], partition, *a[1:])[0], x, v, weight, bias)
    fused = _gradients(lambda *a: chunked_batch_norm(a[0], sizes, *a[1:], 1e-5)[0], x, v, weight, bias)
    for a, b in zip(ours, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    moments, expected = chunked_batch_norm(x, sizes, None, None, 1e-5)[1], group_moments(x, partition)
    for name in ("count", "mean", "var"):
        torch.testing.assert_close(getattr(moments, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
