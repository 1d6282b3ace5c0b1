import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakfree.shuffle.plan import GroupDraw, permute, unpermute


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_it_is_a_permutation_with_an_inverse(total, key):
    rows = np.arange(total)
    positions = permute(rows, total, key)
    assert sorted(positions) == list(rows)
    assert (unpermute(positions, total, key) == rows).all()


def test_any_rank_can_place_its_own_rows():
    whole = permute(np.arange(1000), 1000, 7)
    assert (permute(np.arange(300, 310), 1000, 7) == whole[300:310]).all()


def test_indices_outside_are_refused():
    with pytest.raises(ValueError, match="must lie in"):
        permute(np.array([5]), 5, 0)


@pytest.mark.parametrize("total", [8, 64, 97])
def test_pairs_meet_as_often_as_chance(total):
    num_groups, draws = 4, 4000
    met = np.zeros((total, total))
    for index in range(draws):
        groups = GroupDraw((total,), 0, num_groups, 3, index).groups
        met += groups[:, None] == groups[None, :]
    sizes = np.bincount(GroupDraw((total,), 0, num_groups, 3, 0).groups)
    chance = (sizes * (sizes - 1)).sum() / (total * (total - 1))
    pairs = met[~np.eye(total, dtype=bool)] / draws
    # binomial standard deviation is sqrt(p(1-p)/draws) ~ 0.007; six of them
    assert abs(pairs - chance).max() < 6 * np.sqrt(chance * (1 - chance) / draws)
    assert abs(pairs.mean() - chance) < 1e-9


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 99))
def test_draws_are_balanced_and_agree_over_ranks(sizes, num_groups, index):
    draws = [GroupDraw(tuple(sizes), rank, num_groups, 0, index) for rank in range(len(sizes))]
    total = sum(sizes)
    counts = np.bincount(np.concatenate([draw.groups for draw in draws]).astype(int), minlength=num_groups)
    assert counts.sum() == total
    assert counts.max() - counts.min() <= 1
    arrived = np.concatenate([draw.sources for draw in draws])
    assert sorted(arrived) == list(range(total))  # every row meets somewhere, once
    assert [g for draw in draws for g in draw.local_groups] == list(range(num_groups))
