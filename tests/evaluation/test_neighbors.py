"""kNN, recall and mAP against plain float64 formulas; both backends; one rank and several."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from leakfree.errors import ConfigError, DataError
from leakfree.evaluation import (
    InvertedLists,
    extract_features,
    knn_accuracy,
    knn_predict,
    linear_probe,
    nearest,
    recall_at_k,
    retrieval_map,
)
from tests.ranks import run_ranks

BACKENDS = ["faiss", "torch"]


def _blobs(n, classes=4, width=6, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=generator)
    return centers[y] + spread * torch.randn(n, width, generator=generator), y


def _similarity(bank, queries):
    bank, queries = bank.double().numpy(), queries.double().numpy()
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    return queries @ bank.T


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), m=st.integers(1, 30), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_votes_are_those_of_the_formula(backend, n, m, k, seed):
    k = min(k, n)
    (train_x, train_y), (test_x, test_y) = _blobs(n, seed=seed), _blobs(m, seed=seed + 100)
    similarity = _similarity(train_x, test_x)
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


@pytest.mark.parametrize("exclude_self", [False, True])
def test_backends_find_the_same_neighbours(exclude_self):
    bank, _ = _blobs(3000)
    queries = bank if exclude_self else _blobs(1500, seed=1)[0]
    found = {b: nearest(bank, queries, 7, backend=b, exclude_self=exclude_self) for b in BACKENDS}
    torch.testing.assert_close(found["faiss"][0], found["torch"][0], atol=1e-5, rtol=0)
    assert (found["faiss"][1] == found["torch"][1]).double().mean() > 0.999
    exact = _similarity(bank, queries)
    if exclude_self:
        np.fill_diagonal(exact, -2)
        assert not (found["torch"][1] == torch.arange(len(bank))[:, None]).any()
    np.testing.assert_allclose(found["torch"][0].numpy(), -np.sort(-exact, axis=1)[:, :7], atol=1e-5)


def test_duplicates_do_not_hide_that_a_query_is_itself():
    bank = torch.ones(5, 3)
    for backend in BACKENDS:
        _, index = nearest(bank, bank, 4, backend=backend, exclude_self=True)
        assert index.shape == (5, 4)


def test_inverted_lists_with_all_probes_are_exact():
    bank, queries = _blobs(2000)[0], _blobs(50, seed=1)[0]
    exact = nearest(bank, queries, 5)[0]
    torch.testing.assert_close(nearest(bank, queries, 5, approximate=InvertedLists(20, 20))[0], exact)
    some = nearest(bank, queries, 5, approximate=InvertedLists(20, 2))[0]
    assert (some <= exact + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_recall_and_average_precision(backend):
    (train_x, train_y), (test_x, test_y) = _blobs(60, spread=2.0), _blobs(20, spread=2.0, seed=1)
    order = np.argsort(-_similarity(train_x, test_x), axis=1)
    hits = train_y.numpy()[order] == test_y.numpy()[:, None]
    recall = recall_at_k(train_x, train_y, test_x, test_y, ks=(1, 3, 10), backend=backend)
    assert recall == {k: pytest.approx(hits[:, :k].any(1).mean()) for k in (1, 3, 10)}
    precision = [np.mean([row[: i + 1].mean() for i in np.flatnonzero(row)]) for row in hits]
    assert retrieval_map(train_x, train_y, test_x, test_y, backend=backend) == pytest.approx(np.mean(precision))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zero")])
def test_a_feature_without_direction_is_told(backend, value, kind):
    bank, y = _blobs(10)
    bank[3] = value
    with pytest.raises(DataError, match=f"bank: feature 3 is {kind} \\(1 of 10"):
        knn_accuracy(bank, y, *_blobs(5), backend=backend, k=2)
    with pytest.raises(DataError, match="queries: feature 3"):
        knn_accuracy(*_blobs(5), bank, y, backend=backend, k=2)


def test_mistakes_are_told():
    x, y = _blobs(10)
    with pytest.raises(ConfigError, match="unknown backend 'fais'; choose from faiss, torch"):
        knn_accuracy(x, y, x, y, k=2, backend="fais")
    with pytest.raises(ConfigError, match="k must be from 1 to 10"):
        knn_accuracy(x, y, x, y, k=11)
    with pytest.raises(ConfigError, match="temperature"):
        knn_accuracy(x, y, x, y, k=2, temperature=0.0)
    with pytest.raises(DataError, match="the bank has 6 features a row, the queries 3"):
        nearest(x, x[:, :3], 2)
    with pytest.raises(DataError, match="expected 10 integer classes"):
        knn_accuracy(x, y[:5], x, y, k=2)
    with pytest.raises(ConfigError, match="num_probes"):
        InvertedLists(4, 5)
    with pytest.raises(ConfigError, match="searches exactly"):
        nearest(x, x, 2, backend="torch", approximate=InvertedLists(2, 1))


def test_empty_sets_and_classes_out_of_range_are_told():
    x, y = _blobs(10)
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
    with pytest.raises(DataError, match="from 0 to 1"):
        linear_probe(x, y, x, y, num_classes=2)
    with pytest.raises(DataError, match="from 0 to"):
        linear_probe(x, y - 5, x, y)
    with pytest.raises(DataError, match="different widths"):
        linear_probe(x, y, x[:, :3], y)


# --------------------------------------------------------------------------------------------------------------- probe


def test_the_probe_is_scikit_learns():
    (train_x, train_y), (test_x, test_y) = _blobs(300, spread=1.5), _blobs(200, spread=1.5, seed=1)
    probe = linear_probe(train_x, train_y, test_x, test_y, weight_decay=1e-3)
    std = train_x.double().std(0, correction=0)
    train, test = ((x.double() - train_x.double().mean(0)) / std for x in (train_x, test_x))
    peer = LogisticRegression(C=1 / (1e-3 * 300), tol=1e-10, max_iter=5000).fit(train.numpy(), train_y.numpy())
    loss = [
        torch.nn.functional.cross_entropy(logits, train_y).item() + 5e-4 * float((weight**2).sum())
        for logits, weight in (
            (probe.logits(train_x), probe.weight),
            (torch.from_numpy(peer.decision_function(train.numpy())), peer.coef_),
        )
    ]
    assert loss[0] <= loss[1] + 1e-7
    assert probe.accuracy == pytest.approx(peer.score(test.numpy(), test_y.numpy()), abs=0.01)
    quick = linear_probe(train_x, train_y, test_x, test_y, closed_form=True, weight_decay=1e-3)
    ridge = Ridge(alpha=1e-3 * 300).fit(train.numpy(), torch.nn.functional.one_hot(train_y).double().numpy())
    np.testing.assert_allclose(quick.weight.numpy().T, ridge.coef_, atol=1e-8)
    assert quick.accuracy == pytest.approx((ridge.predict(test.numpy()).argmax(1) == test_y.numpy()).mean())


def test_a_constant_feature_and_broken_ones():
    x, y = _blobs(50)
    x[:, 2] = 7.0
    assert linear_probe(x, y, x, y, closed_form=True).weight.isfinite().all()
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        linear_probe(x, y, x, y)
    with pytest.raises(DataError, match="0 training"):
        linear_probe(x[:0], y[:0], x[4:], y[4:])


def _probe_on_ranks(rank, world_size, cuts):
    (train_x, train_y), (test_x, test_y) = _blobs(101, spread=1.5), _blobs(53, spread=1.5, seed=1)
    mine, of_test = slice(cuts[rank], cuts[rank + 1]), slice(rank, None, world_size)
    out = []
    for closed_form in (False, True):
        probe = linear_probe(
            train_x[mine], train_y[mine], test_x[of_test], test_y[of_test], closed_form=closed_form, weight_decay=1e-2
        )
        out.append((probe.accuracy, probe.weight.tolist()))
    return out


@pytest.mark.parametrize("cuts", [[0, 40, 101], [0, 0, 101], [0, 7, 7, 101]])
def test_the_probe_of_ranks_is_that_of_one_process(cuts):
    alone = _probe_on_ranks(0, 1, [0, 101])
    for found in run_ranks(_probe_on_ranks, len(cuts) - 1, cuts, timeout=20):
        for (accuracy, weight), (expected_accuracy, expected_weight) in zip(found, alone, strict=True):
            assert accuracy == expected_accuracy
            np.testing.assert_allclose(weight, expected_weight, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ features


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x) * 2


def _batches(x, y, numbers, size=4):
    return [(x[part], y[part], part) for part in torch.as_tensor(numbers).split(size)]


def _extract_on_ranks(rank, world_size, folder):
    x, y = _blobs(11, width=3)
    padded = torch.arange(12) % 11  # what samplers do to give every rank as many
    model = _Model()
    found = extract_features(model, _batches(x, y, padded[rank::world_size]), folder=folder)
    assert model.training
    assert model.norm.training
    assert isinstance(found.x, torch.Tensor)
    return found.x.tolist(), found.y.tolist()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_features_of_ranks_count_each_sample_once(ranks, mapped, tmp_path):
    x, y = _blobs(11, width=3)
    expected = _Model().eval()(x)
    for features, classes in run_ranks(_extract_on_ranks, ranks, tmp_path if mapped else None, timeout=20):
        torch.testing.assert_close(torch.tensor(features), expected)
        assert classes == y.tolist()


def test_mapped_features_of_before_stay_what_they_are(tmp_path):
    (train_x, train_y), (val_x, val_y) = _blobs(64, width=3), _blobs(4, width=3, seed=1)
    train = extract_features(nn.Flatten(), _batches(train_x, train_y, range(64)), folder=tmp_path)
    val = extract_features(nn.Flatten(), _batches(val_x, val_y, range(4)), folder=tmp_path)
    assert torch.equal(train.x, train_x)
    assert torch.equal(val.x, val_x)


def test_gaps_and_contradictions_are_told():
    x, y = _blobs(6, width=3)
    with pytest.raises(DataError, match="3 is missing"):
        extract_features(_Model(), _batches(x, y, [0, 1, 2, 4, 5]))
    with pytest.raises(DataError, match="two different classes"):
        extract_features(_Model(), [*_batches(x, y, range(6)), (x[:1], y[:1] + 1, torch.tensor([0]))])
    with pytest.raises(DataError, match="no samples"):
        extract_features(_Model(), [])
    with pytest.raises(DataError, match="a batch of 3 images has 2 classes and 3 sample numbers"):
        extract_features(_Model(), [(x[:3], y[:2], torch.arange(3))])
