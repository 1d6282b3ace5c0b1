"""kNN, recall and mAP against plain float64 formulas and lightly's kNN; both backends; one rank and several."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.benchmarking import knn_predict as lightly_knn_predict

from leakfree.errors import ConfigError, DataError
from leakfree.evaluation import (
    InvertedLists,
    extract_features,
    few_label_knn_accuracy,
    knn_accuracy,
    knn_predict,
    recall_at_k,
    retrieval_map,
)
from tests.evaluation.blobs import BACKENDS, blobs, exact_similarity
from tests.ranks import run_ranks


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), m=st.integers(1, 30), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_votes_are_those_of_the_formula(backend, n, m, k, seed):
    k = min(k, n)
    (train_x, train_y), (test_x, test_y) = blobs(n, seed=seed), blobs(m, seed=seed + 100)
    similarity = exact_similarity(train_x, test_x)
    votes = np.zeros((m, 4))
    for row, order in enumerate(np.argsort(-similarity, axis=1)[:, :k]):
        for index in order:
            votes[row, train_y[index]] += np.exp(similarity[row, index] / 0.07)
    predicted = knn_predict(train_x, train_y, test_x, k=k, num_classes=4, backend=backend)
    best = np.sort(votes, axis=1)
    clear = torch.from_numpy(best[:, -1] > best[:, -2] * (1 + 1e-4))  # ties may fall either way
    assert (predicted[:, 0] == torch.from_numpy(votes.argmax(1)))[clear].all()
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, k=k, backend=backend)
    assert accuracy == pytest.approx((predicted[:, 0] == test_y).double().mean().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "temperature"), [(200, 0.1), (20, 0.07), (1, 0.5)])
def test_predictions_are_lightlys(backend, k, temperature):
    (train_x, train_y), (test_x, _) = (blobs(n, 10, 32, 2.0, seed) for n, seed in ((3000, 0), (700, 1)))
    bank = F.normalize(train_x, dim=1).T.contiguous()
    theirs = lightly_knn_predict(F.normalize(test_x, dim=1), bank, train_y, 10, knn_k=k, knn_t=temperature)
    ours = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=10, backend=backend)
    assert torch.equal(ours[:, 0], theirs[:, 0])
    if k == 200:  # each class has votes: no ties
        assert (ours == theirs).double().mean() > 0.999


def test_a_low_temperature_does_not_overflow():
    (train_x, train_y), (test_x, _) = blobs(40), blobs(20, seed=1)
    nearest_class = knn_predict(train_x, train_y, test_x, k=1)[:, 0]
    assert torch.equal(knn_predict(train_x, train_y, test_x, k=20, temperature=1e-6)[:, 0], nearest_class)


def test_equal_votes_go_to_the_smaller_class():
    bank, y = torch.ones(4, 3), torch.tensor([3, 1, 1, 3])
    for backend in BACKENDS:
        assert knn_predict(bank, y, torch.ones(1, 3), k=4, num_classes=5, backend=backend).tolist() == [[1, 3, 0, 2, 4]]
        assert knn_accuracy(bank, y, torch.ones(2, 3), torch.tensor([1, 3]), k=4, backend=backend) == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_one_out_is_a_bank_without_it(backend):
    x, y = blobs(30, spread=2.0)
    hits = 0
    for i in range(30):
        others = torch.arange(30) != i
        hits += int(knn_predict(x[others], y[others], x[i : i + 1], k=5, num_classes=4, backend=backend)[0, 0] == y[i])
    assert knn_accuracy(x, y, x, y, k=5, backend=backend, exclude_self=True) == hits / 30


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), k=st.integers(1, 60))
def test_recall_and_average_precision(backend, seed, k):
    (train_x, train_y), (test_x, test_y) = blobs(60, spread=2.0, seed=seed), blobs(20, spread=2.0, seed=seed + 100)
    order = np.argsort(-exact_similarity(train_x, test_x), axis=1)
    hits = train_y.numpy()[order] == test_y.numpy()[:, None]
    recall = recall_at_k(train_x, train_y, test_x, test_y, ks=(1, 3, 10), backend=backend)
    assert recall == {k: pytest.approx(hits[:, :k].any(1).mean()) for k in (1, 3, 10)}
    for cut in (None, k):
        precision = [
            sum(row[: i + 1].mean() for i in np.flatnonzero(row[:cut])) / min(row.sum(), cut or 60) for row in hits
        ]
        found = retrieval_map(train_x, train_y, test_x, test_y, k=cut, backend=backend)
        assert found == pytest.approx(np.mean(precision))


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_precision_counts_what_can_be_found(backend):
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    y = torch.tensor([0, 1, 0, 2])
    # Rows 0 and 2 find each other second; rows 1 and 3 have nobody.
    assert retrieval_map(bank, y, bank, y, exclude_self=True, backend=backend) == pytest.approx(0.5)
    # Class 7 is not in the bank and does not count; row 0 finds itself first, its match third.
    found = retrieval_map(bank, y, bank[:2], torch.tensor([0, 7]), backend=backend)
    assert found == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(DataError, match="no query shares its class"):
        retrieval_map(bank, y, bank[:1], torch.tensor([7]), backend=backend)


def test_inverted_lists_with_all_probes_give_the_same_measures():
    (train_x, train_y), (test_x, test_y) = blobs(300, spread=2.0), blobs(50, spread=2.0, seed=1)
    data, all_of_them = (train_x, train_y, test_x, test_y), InvertedLists(8, 8)
    for measure, options in ((knn_accuracy, {"k": 9}), (recall_at_k, {"ks": (1, 5)}), (retrieval_map, {"k": 20})):
        assert measure(*data, **options, approximate=all_of_them) == measure(*data, **options)
    with pytest.raises(ConfigError, match="give k"):
        retrieval_map(*data, approximate=all_of_them)


# ---------------------------------------------------------------------------------------------------------- few labels


def test_few_labels_are_drawn_of_each_class():
    (train_x, train_y), (test_x, test_y) = blobs(200, spread=2.0), blobs(100, spread=2.0, seed=1)
    data = (train_x, train_y, test_x, test_y)
    counts = train_y.bincount()
    least = int(counts.min())
    found = few_label_knn_accuracy(*data)
    assert found == few_label_knn_accuracy(*data)
    assert len({few_label_knn_accuracy(*data, seed=seed) for seed in range(5)}) > 1
    draws = [few_label_knn_accuracy(*data, draws=n) * n for n in range(1, 11)]
    assert len({round(after - before, 9) for before, after in itertools.pairwise(draws)}) > 1
    assert found * 10 == pytest.approx(draws[-1])
    assert abs(found - knn_accuracy(*data, k=5)) < 0.2
    with pytest.raises(DataError, match=f"has {least} rows in the bank, fewer than {least + 1}"):
        few_label_knn_accuracy(*data, labels_per_class=least + 1)
    with pytest.raises(ConfigError, match="at least 1"):
        few_label_knn_accuracy(*data, draws=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_labels_as_there_are_is_knn(backend):
    train_y = torch.arange(40) % 4
    train_x = blobs(40, spread=2.0)[0]
    test_x, test_y = blobs(30, spread=2.0, seed=1)
    few = few_label_knn_accuracy(
        train_x, train_y, test_x, test_y, labels_per_class=10, draws=3, temperature=0.1, backend=backend
    )
    assert few == pytest.approx(knn_accuracy(train_x, train_y, test_x, test_y, 5, 0.1, backend))
    one = few_label_knn_accuracy(train_x, train_y, train_x, train_y, labels_per_class=1, k=4, draws=4, backend=backend)
    assert one >= 4 / 40  # each drawn row finds itself


# --------------------------------------------------------------------------------------------------------------- ranks


def _on_ranks(rank, world_size, count, cuts):
    train, test = blobs(53, spread=2.0), blobs(count, spread=2.0, seed=1)
    banks = []
    for x, y in (train, test):
        ends = [len(x) * cut // 100 for cut in cuts]
        numbers = torch.arange(len(x))[ends[rank] : ends[rank + 1]]
        batches = [(x[part], y[part], part) for part in numbers.split(7) if len(part)]
        banks.append(extract_features(torch.nn.Flatten(), batches))
    data = (banks[0].x, banks[0].y, banks[1].x, banks[1].y)
    return [knn_accuracy(*data, 5, backend=backend, over_ranks=True) for backend in BACKENDS] + [
        knn_accuracy(*data, 5), recall_at_k(*data)[4], retrieval_map(*data)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("cuts", [[0, 50, 100], [0, 30, 30, 100], [0, 0, 0, 100]])
def test_ranks_agree_with_one_process(count, cuts):
    alone = _on_ranks(0, 1, count, [0, 100])
    for found in run_ranks(_on_ranks, len(cuts) - 1, count, cuts):
        assert found == alone


def _mistakes_on_ranks(rank, world_size):
    x, y = blobs(10)
    broken = x.clone()
    broken[4] = float("nan")
    with pytest.raises(DataError, match="queries: feature 4 is not finite"):
        knn_accuracy(x, y, broken, y, k=2, over_ranks=True)
    with pytest.raises(ConfigError, match="k must be from 1 to 10"):
        knn_accuracy(x, y, x[:2], y[:2], k=11, over_ranks=True)


def test_a_mistake_is_found_by_every_rank():
    run_ranks(_mistakes_on_ranks, 3)


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_told():
    x, y = blobs(10)
    with pytest.raises(ConfigError, match="temperature"):
        knn_accuracy(x, y, x, y, k=2, temperature=0.0)
    with pytest.raises(DataError, match="expected 10 integer classes"):
        knn_accuracy(x, y[:5], x, y, k=2)
    with pytest.raises(DataError, match="expected 10 integer classes"):
        knn_accuracy(x, y, x, y.float(), k=2)
    with pytest.raises(ConfigError, match="does not go with exclude_self"):
        knn_accuracy(x, y, x, y, k=2, exclude_self=True, over_ranks=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_no_measure_ranks_a_feature_without_direction(backend, value):
    x, y = blobs(10)
    broken = x.clone()
    broken[3] = value
    for measure, options in ((knn_accuracy, {"k": 2}), (recall_at_k, {"ks": (1,)}), (retrieval_map, {})):
        with pytest.raises(DataError, match="bank: feature 3"):
            measure(broken, y, x, y, backend=backend, **options)
        with pytest.raises(DataError, match="queries: feature 3"):
            measure(x, y, broken, y, backend=backend, **options)


def test_empty_sets_and_classes_out_of_range_are_told():
    x, y = blobs(10)
    with pytest.raises(DataError, match="there are no queries"):
        knn_accuracy(x, y, x[:0], y[:0], k=2)
    with pytest.raises(DataError, match="the bank is empty"):
        knn_accuracy(x[:0], y[:0], x, y, k=1)
    with pytest.raises(DataError, match="classes must be from 0 to"):
        knn_accuracy(x, y - 5, x, y, k=2)
    with pytest.raises(DataError, match="classes must be from 0 to 1"):
        knn_predict(x, y, x, k=2, num_classes=2)
    for ks in ((), (0, 1)):
        with pytest.raises(ConfigError, match="at least 1 each"):
            recall_at_k(x, y, x, y, ks)
