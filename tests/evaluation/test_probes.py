"""Linear probes against scikit-learn's, and over ranks against one process."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from leakfree.errors import ConfigError, DataError
from leakfree.evaluation import linear_probe
from tests.evaluation.blobs import blobs
from tests.ranks import run_ranks


def test_the_probe_is_scikit_learns():
    (train_x, train_y), (test_x, test_y) = blobs(300, spread=1.5), blobs(200, spread=1.5, seed=1)
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
    x, y = blobs(50)
    x[:, 2] = 7.0
    assert linear_probe(x, y, x, y, closed_form=True).weight.isfinite().all()
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        linear_probe(x, y, x, y)
    with pytest.raises(DataError, match="0 training"):
        linear_probe(x[:0], y[:0], x[4:], y[4:])


def _probe_on_ranks(rank, world_size, cuts):
    (train_x, train_y), (test_x, test_y) = blobs(101, spread=1.5), blobs(53, spread=1.5, seed=1)
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
    for found in run_ranks(_probe_on_ranks, len(cuts) - 1, cuts):
        for (accuracy, weight), (expected_accuracy, expected_weight) in zip(found, alone, strict=True):
            assert accuracy == expected_accuracy
            np.testing.assert_allclose(weight, expected_weight, atol=1e-5)


def test_mistakes_are_told():
    x, y = blobs(10)
    with pytest.raises(DataError, match="from 0 to 1"):
        linear_probe(x, y, x, y, num_classes=2)
    with pytest.raises(DataError, match="from 0 to"):
        linear_probe(x, y - 5, x, y)
    with pytest.raises(DataError, match="different widths"):
        linear_probe(x, y, x[:, :3], y)
    with pytest.raises(DataError, match="train: expected"):
        linear_probe(x, y[:3], x, y)
    with pytest.raises(ConfigError, match="weight_decay"):
        linear_probe(x, y, x, y, weight_decay=-1.0)
