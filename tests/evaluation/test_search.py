"""The nearest rows against a sort in float64: both backends, whatever the tiles and chunks."""

from unittest import mock

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.errors import ConfigError, DataError
from leakfree.evaluation import InvertedLists, nearest, search
from leakfree.evaluation.search import _largest
from tests.evaluation.blobs import BACKENDS, blobs, exact_similarity


def _check(bank, queries, k, *, exclude_self=False, **options):
    similarity, index = nearest(bank, queries, k, exclude_self=exclude_self, **options)
    assert (similarity.dtype, index.dtype) == (torch.float32, torch.int64)
    assert similarity.shape == index.shape == (len(queries), k)
    exact = exact_similarity(bank, queries)
    if exclude_self:
        np.fill_diagonal(exact, -2)
    np.testing.assert_allclose(similarity.numpy(), -np.sort(-exact, axis=1)[:, :k], atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, index.numpy(), 1), similarity.numpy(), atol=2e-6)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_neighbours_are_those_of_a_sort_in_float64(backend, data):
    n, seed = data.draw(st.integers(2, 120)), data.draw(st.integers(0, 99))
    exclude_self = data.draw(st.booleans())
    bank = blobs(n, seed=seed)[0]
    queries = bank if exclude_self else blobs(data.draw(st.integers(1, 40)), seed=seed + 100)[0]
    k = data.draw(st.integers(1, n - exclude_self))
    tile, numbers = data.draw(st.sampled_from([3, 50, 1000])), data.draw(st.sampled_from([1, 200, 2**20]))
    copied, sample = data.draw(st.sampled_from([0, 2**20])), data.draw(st.sampled_from([0, 64, 2**10]))
    changes = {"_TILE": tile, "_HEAP_TILE": tile, "_NUMBERS": numbers, "_COPIED_BYTES": copied, "_SAMPLE": sample}
    with mock.patch.multiple(search, **changes):
        _check(bank, queries, k, exclude_self=exclude_self, backend=backend)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 700), st.integers(1, 30), st.integers(0, 99), st.booleans())
def test_two_levels_select_what_one_would(rows, columns, k, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if ties:
        values = values.round()
    best, index = _largest(values, k)
    assert torch.equal(best, values.topk(min(k, columns), dim=1).values)
    assert torch.equal(values.gather(1, index), best)
    assert all(len(set(row)) == len(row) for row in index.tolist())


@pytest.mark.parametrize("kind", ["mixed", "near rows are all in the sample", "equal rows"])
def test_a_bound_that_was_too_high_costs_nothing_but_time(kind):
    bank, queries = blobs(2000)[0], blobs(30, seed=1)[0]
    sampled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:128]
    if kind == "near rows are all in the sample":
        bank[sampled[:20]] = queries[:1] + 0.01 * bank[:20]
    if kind == "equal rows":
        bank[:] = bank[0]
    redone = []
    find = search._Heaps._find

    def spy(self, asked, k, bound):
        redone.append(len(asked) if bound is None else 0)
        return find(self, asked, k, bound)

    with mock.patch.object(search, "_SAMPLE", 128), mock.patch.object(search._Heaps, "_find", spy):
        similarity, index = nearest(bank, queries, 10)
    exact = exact_similarity(bank, queries)
    np.testing.assert_allclose(similarity.numpy(), -np.sort(-exact, axis=1)[:, :10], atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, index.numpy(), 1), similarity.numpy(), atol=2e-6)
    assert all(len(set(row)) == 10 for row in index.tolist())
    assert redone[0] == 0  # with a bound
    assert sum(redone) == {"mixed": 0, "equal rows": 30}.get(kind, sum(redone))
    assert kind == "mixed" or len(redone) == 2


@pytest.mark.parametrize("exclude_self", [False, True])
def test_backends_find_the_same_neighbours(exclude_self):
    bank, _ = blobs(3000)
    queries = bank if exclude_self else blobs(1500, seed=1)[0]
    found = {b: nearest(bank, queries, 7, backend=b, exclude_self=exclude_self) for b in BACKENDS}
    torch.testing.assert_close(found["faiss"][0], found["torch"][0], atol=1e-6, rtol=0)
    assert (found["faiss"][1] == found["torch"][1]).double().mean() > 0.999
    _check(bank, queries, 7, backend="torch", exclude_self=exclude_self)


def test_duplicates_do_not_hide_that_a_query_is_itself():
    bank = torch.ones(5, 3)
    for backend in BACKENDS:
        _, index = nearest(bank, bank, 4, backend=backend, exclude_self=True)
        assert index.shape == (5, 4)
        assert not (index == torch.arange(5)[:, None]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e-4, 1e25])
def test_lengths_neither_overflow_nor_vanish(backend, scale):
    bank, queries = blobs(50)[0], blobs(20, seed=1)[0]
    expected = nearest(bank, queries, 5, backend=backend)
    found = nearest(bank * scale, queries / scale, 5, backend=backend)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=0)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int16])
def test_any_real_dtype_is_taken(backend, dtype):
    bank, queries = (blobs(n, seed=n)[0].mul(50).to(dtype) for n in (40, 10))
    _check(bank, queries, 5, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_surroundings_change_nothing_and_are_not_changed(backend):
    bank, queries = blobs(60)[0].requires_grad_(), blobs(20, seed=1)[0]
    expected = nearest(bank, queries, 5, backend=backend)
    threads = faiss.omp_get_max_threads()
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(bank, queries, 5, backend=backend)
        assert (queries @ queries.T).dtype == torch.bfloat16
    assert torch.equal(found[0], expected[0])
    assert not found[0].requires_grad
    assert faiss.omp_get_max_threads() == threads


def test_inverted_lists_with_all_probes_are_exact():
    bank, queries = blobs(2000)[0], blobs(50, seed=1)[0]
    exact = nearest(bank, queries, 5)[0]
    for lists in (2, 20):  # 2: fewer rows are looked at than there are
        approximate = InvertedLists(lists, lists)
        torch.testing.assert_close(nearest(bank, queries, 5, approximate=approximate)[0], exact, atol=1e-6, rtol=0)
    some = nearest(bank, queries, 5, approximate=InvertedLists(20, 2))
    assert (some[0] <= exact + 1e-6).all()
    again = nearest(bank, queries, 5, approximate=InvertedLists(20, 2))
    assert torch.equal(some[1], again[1])
    with mock.patch.object(search, "_TILE", 300):
        tiled = nearest(bank, queries, 5, approximate=InvertedLists(2, 2))[0]
    torch.testing.assert_close(tiled, exact, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="raise num_probes"):
        nearest(bank, queries, 1900, approximate=InvertedLists(20, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zero")])
def test_a_feature_without_direction_is_told(backend, value, kind):
    bank, _ = blobs(10)
    bank[3] = value
    bank[7, 2] = float("nan")
    with pytest.raises(DataError, match=f"bank: feature 3 is {kind} \\(2 of 10"):
        nearest(bank, blobs(5)[0], 2, backend=backend)
    with pytest.raises(DataError, match="queries: feature 3"):
        nearest(blobs(5)[0], bank, 2, backend=backend)


def test_mistakes_are_told():
    x, _ = blobs(10)
    with pytest.raises(ConfigError, match="unknown backend 'fais'; choose from faiss, torch"):
        nearest(x, x, 2, backend="fais")
    for k in (0, 11):
        with pytest.raises(ConfigError, match="k must be from 1 to 10"):
            nearest(x, x, k)
    with pytest.raises(ConfigError, match="k must be from 1 to 9"):
        nearest(x, x, 10, exclude_self=True)
    with pytest.raises(DataError, match="5 queries are not the 10 rows"):
        nearest(x, x[:5], 2, exclude_self=True)
    with pytest.raises(DataError, match="the bank has 6 features a row, the queries 3"):
        nearest(x, x[:, :3], 2)
    with pytest.raises(DataError, match=r"bank: expected features \(N, D\)"):
        nearest(x[0], x, 2)
    with pytest.raises(DataError, match="there are no queries"):
        nearest(x, x[:0], 2)
    with pytest.raises(ConfigError, match="num_probes"):
        InvertedLists(4, 5)
    with pytest.raises(ConfigError, match="more than the 10 rows"):
        nearest(x, x, 2, approximate=InvertedLists(11, 1))
    with pytest.raises(ConfigError, match="searches exactly"):
        nearest(x, x, 2, backend="torch", approximate=InvertedLists(2, 1))
