"""What curves of a contrastive run say: fallen, stalled, or neither, each by its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leakfree.errors import DataError
from leakfree.leakage import pretext_gap

STEPS = [100, 200, 300, 400]


def test_a_clean_run_rises():
    found = pretext_gap(STEPS, [0.1, 0.2, 0.3, 0.37], [0.31, 0.47, 0.59, 0.68])
    assert found.gap == pytest.approx(0.37 - 0.68)
    assert (found.best_knn, found.best_step, found.drop) == (0.68, 400, 0)
    assert (found.pretext_rise, found.knn_rise) == (pytest.approx(0.17), pytest.approx(0.21))
    assert (found.fell, found.stalled) == (False, False)


def test_knn_that_falls_while_the_pretext_rises():
    found = pretext_gap(STEPS, [0.5, 0.9, 0.99, 0.999], [0.3, 0.5, 0.45, 0.4])
    assert found.gap == pytest.approx(0.599)
    assert (found.best_knn, found.best_step, found.drop) == (0.5, 200, pytest.approx(0.1))
    assert (found.fell, found.stalled) == (True, False)


def test_knn_that_stalls_while_the_pretext_rises():
    found = pretext_gap(STEPS, [0.2, 0.4, 0.6, 0.7], [0.2, 0.25, 0.26, 0.26])
    assert (found.pretext_rise, found.knn_rise) == (pytest.approx(0.3), pytest.approx(0.01))
    assert (found.fell, found.stalled) == (False, True)


def test_neither_without_a_rise_of_the_pretext():
    for pretext in ([0.5, 0.5, 0.5, 0.51], [0.9, 0.8, 0.3, 0.1]):  # at rest; collapsing
        found = pretext_gap(STEPS, pretext, [0.5, 0.5, 0.4, 0.3])
        assert found.drop == pytest.approx(0.2)
        assert (found.fell, found.stalled) == (False, False)


def test_the_tolerance_is_what_is_still_no_change():
    curves = STEPS, [0.5, 0.5, 0.625, 0.75], [0.5, 0.5, 0.4375, 0.375]
    assert pretext_gap(*curves).fell
    assert not pretext_gap(*curves, tolerance=0.125).fell  # a drop of exactly as much
    assert pretext_gap(*curves, tolerance=0.125).stalled
    assert not pretext_gap(*curves, tolerance=0.25).stalled  # the pretext rose by exactly as much


def test_the_second_half_is_of_steps_not_of_points():
    steps, pretext = [0, 10, 20, 30, 1000], [0.1, 0.2, 0.3, 0.4, 0.9]
    found = pretext_gap(steps, pretext, [0.1, 0.2, 0.3, 0.4, 0.41])
    assert (found.pretext_rise, found.knn_rise) == (pytest.approx(0.5), pytest.approx(0.01))
    assert found.stalled


def test_points_without_both_count_for_nothing():
    sparse = pretext_gap([1, 2, 3, 4, 5], [0.1, 0.9, 0.2, None, 0.3], [0.4, None, 0.5, 0.9, 0.6])
    assert sparse == pretext_gap([1, 3, 5], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    one = pretext_gap([7], [0.25], [0.75])
    assert (one.gap, one.best_step, one.drop, one.pretext_rise, one.knn_rise) == (-0.5, 7, 0, 0, 0)
    assert not one.fell
    assert not one.stalled


def test_tensors_are_numbers():
    numbers = pretext_gap(STEPS, [0.25, 0.5, 0.75, 1.0], [0.5, 0.5, 0.25, 0.125])
    tensors = (torch.tensor(values) for values in (STEPS, [0.25, 0.5, 0.75, 1.0], [0.5, 0.5, 0.25, 0.125]))
    assert pretext_gap(*tensors) == numbers


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=12), st.integers(-5, 5), shares)
def test_what_holds_of_all_curves(points, start, tolerance):
    pretext, knn = zip(*points, strict=True)
    steps = range(start, start + len(points))
    found = pretext_gap(steps, pretext, knn, tolerance=tolerance)
    assert found.gap == pretext[-1] - knn[-1]
    assert found.best_knn == max(knn) == knn[found.best_step - start]
    assert max(knn[: found.best_step - start], default=-1) < found.best_knn
    assert found.drop >= 0
    assert not (found.fell and found.stalled)
    again = pretext_gap([10 * step + 3 for step in steps], pretext, knn, tolerance=tolerance)
    assert (again.fell, again.stalled, again.knn_rise) == (found.fell, found.stalled, found.knn_rise)


@pytest.mark.parametrize(
    ("steps", "pretext", "knn", "words"),
    [
        ([1, 2], [0.1], [0.1, 0.2], "2 steps, 1 pretext and 2 kNN accuracies"),
        ([], [], [], "no step has both"),
        ([1, 2], [None, 0.1], [0.1, None], "no step has both"),
        ([1, 1], [0.1, 0.2], [0.1, 0.2], "steps do not increase"),
        ([1, 2], [0.1, 99.9], [0.1, 0.2], "pretext accuracy at step 2 is 99.9"),
        ([1, 2], [0.1, 0.2], [0.1, float("nan")], "kNN accuracy at step 2 is nan"),
    ],
)
def test_mistakes_are_told(steps, pretext, knn, words):
    with pytest.raises(DataError, match=words):
        pretext_gap(steps, pretext, knn)
    with pytest.raises(DataError, match="tolerance"):
        pretext_gap([1], [0.5], [0.5], tolerance=-1.0)
