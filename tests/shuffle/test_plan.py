import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from leakfree.shuffle.plan import GroupDraw, mix_seed, permute, unpermute


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


@given(st.integers(1, 2**50), st.integers(0, 2**64 - 1), st.data())
def test_the_inverse_holds_at_any_total(total, key, data):
    rows = np.array(data.draw(st.lists(st.integers(0, total - 1), max_size=20)), dtype=np.int64)
    positions = permute(rows, total, key)
    assert ((positions >= 0) & (positions < total)).all()
    assert (unpermute(positions, total, key) == rows).all()
    assert len(set(positions)) == len(set(rows))


@pytest.mark.parametrize("total", [3, 4])
def test_every_permutation_is_as_likely(total):
    draws = 6000
    orders = list(itertools.permutations(range(total)))
    seen = dict.fromkeys(orders, 0)
    for index in range(draws):
        seen[tuple(GroupDraw((total,), 0, 1, 11, index).positions.tolist())] += 1
    expected = draws / len(orders)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    freedom = len(orders) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_nothing_to_permute():
    nothing = np.zeros(0, dtype=np.int64)
    assert permute(nothing, 0, 5).shape == (0,)
    assert unpermute(nothing, 7, 5).shape == (0,)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
def test_mixed_seeds_fit_a_generator_and_a_message(seed, salt):
    assert 0 <= mix_seed(seed, salt) < 2**62
    assert mix_seed(seed, salt) != mix_seed(seed, salt + 1)


def test_seeds_and_counts_select_the_draw():
    def positions(seed, index):
        return GroupDraw((40,), 0, 2, seed, index).positions.tolist()

    assert positions(1, 0) == positions(1, 0)
    different = [positions(seed, index) for seed in range(3) for index in range(3)]
    assert len({tuple(order) for order in different}) == 9


def _check_draw(sizes, num_groups, balance, index=0):
    """All that a draw promises, against plain counting over all rows."""
    world_size, total = len(sizes), sum(sizes)
    draws = [GroupDraw(sizes, rank, num_groups, 3, index, balance) for rank in range(world_size)]
    first = draws[0]
    assert [len(draw.positions) for draw in draws] == list(sizes)
    positions = np.concatenate([draw.positions for draw in draws])
    assert sorted(positions) == list(range(total))
    # which rows meet where: the inverse of the positions, rank by rank
    assert np.concatenate([draw.local_positions for draw in draws]).tolist() == list(range(total))
    sources = np.concatenate([draw.sources for draw in draws])
    assert (sources[positions] == np.arange(total)).all()
    assert first.rank_of_row(np.arange(total)).tolist() == [rank for rank, n in enumerate(sizes) for _ in range(n)]
    # groups are ranges of positions, in order, and each meets on one rank
    groups = first.group_of(np.arange(total))
    assert (np.diff(groups) >= 0).all()
    assert ((groups >= 0) & (groups < num_groups)).all()
    for group in range(num_groups + 1):
        assert first.first_position(group) == (groups < group).sum()
    hosts = first.rank_of_group(np.arange(num_groups)).tolist()
    assert hosts == sorted(hosts)
    for rank, draw in enumerate(draws):
        assert list(draw.local_groups) == [group for group, host in enumerate(hosts) if host == rank]
        assert draw.local_positions.tolist() == [p for p in range(total) if hosts[groups[p]] == rank]
        assert (draw.groups == groups[draw.positions]).all()
        assert draw.groups.dtype == draw.positions.dtype == draw.sources.dtype == np.int64
    # shares
    counts = np.bincount(groups, minlength=num_groups)
    if balance:
        assert counts.max() - counts.min() <= 1
    else:
        for rank, draw in enumerate(draws):
            mine = counts[draw.local_groups.start : draw.local_groups.stop]
            assert mine.sum() == sizes[rank]
            assert mine.max() - mine.min() <= 1
            assert len(draw.sources) == sizes[rank]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("balance", [True, False])
def test_a_draw_keeps_its_promises_for_all_small_sizes(world_size, balance):
    for sizes in itertools.product(range(4), repeat=world_size):
        for num_groups in range(1 if balance else world_size, 6):
            _check_draw(sizes, num_groups, balance)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 40), st.booleans(), st.integers(0, 10**9))
def test_a_draw_keeps_its_promises(sizes, num_groups, balance, index):
    assume(balance or num_groups >= len(sizes))
    _check_draw(tuple(sizes), num_groups, balance, index)


def test_ranks_that_keep_their_rows_need_a_group_each():
    with pytest.raises(ValueError, match="num_groups=2 is less than 3 ranks"):
        GroupDraw((1, 1, 1), 0, 2, 0, 0, balance=False)
    GroupDraw((1, 1, 1), 0, 2, 0, 0)


def test_one_rank_of_thousands_knows_its_own_rows_alone():
    sizes, rank = np.full(4096, 512), 77
    draw = GroupDraw(sizes, rank, 4096, 0, 0)
    assert len(draw.positions) == len(draw.sources) == 512
    met = draw.rank_of_row(draw.sources)
    for source in np.unique(met)[:3]:  # the sender agrees on who comes here
        there = GroupDraw(sizes, int(source), 4096, 0, 0)
        rows = np.arange(there.bounds[source], there.bounds[source + 1])
        assert set(rows[there.rank_of_group(there.groups) == rank]) == set(draw.sources[met == source])


def test_no_group_is_refused():
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        GroupDraw((3, 2), 0, 0, 1, 0)
