import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.shuffle import batch_shuffle, batch_unshuffle
from tests.ranks import run_ranks


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _rows(sizes, rank):
    start = sum(sizes[:rank])
    return torch.arange(start, start + sizes[rank], dtype=torch.float64)[:, None].expand(-1, 3).clone()


def _round_trip(rank, world_size, sizes):
    x = _rows(sizes, rank).requires_grad_(True)
    shuffled, ticket = batch_shuffle(x, generator=_generator())
    home = batch_unshuffle(shuffled * 2, ticket)
    (home * (x.detach() + 1)).sum().backward()
    return shuffled.detach(), torch.equal(home, 2 * x), x.grad, x.detach()


@pytest.mark.parametrize("sizes", [[5, 5], [3, 0], [0, 0], [1, 6, 0], [2, 3, 1]])
def test_round_trip_is_bitwise_and_differentiable_on_uneven_ranks(sizes):
    results = run_ranks(_round_trip, len(sizes), sizes)
    everyone = torch.cat([shuffled for shuffled, *_ in results])
    assert sorted(everyone[:, 0].tolist()) == list(range(sum(sizes)))
    counts = [len(shuffled) for shuffled, *_ in results]
    assert max(counts) - min(counts) <= 1
    for _, same, gradient, x in results:
        assert same
        assert torch.equal(gradient, 2 * (x + 1))
    alone = batch_shuffle(torch.arange(sum(sizes), dtype=torch.float64)[:, None].expand(-1, 3), generator=_generator())[
        0
    ]
    assert torch.equal(everyone, alone)  # the same permutation as one process draws


@given(st.integers(0, 20), st.integers(0, 100))
def test_one_process_permutes_and_returns(num_rows, seed):
    x = torch.randn(num_rows, 2, generator=_generator(seed))
    shuffled, ticket = batch_shuffle(x, generator=_generator(seed))
    assert torch.equal(batch_unshuffle(shuffled, ticket), x)


def test_the_default_generator_moves_on():
    x = torch.arange(50.0)[:, None]
    assert not torch.equal(batch_shuffle(x)[0], batch_shuffle(x)[0])


def test_wrong_number_of_rows_is_refused():
    _, ticket = batch_shuffle(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"output of shape \(3, 1\): the shuffle returned 4 rows"):
        batch_unshuffle(torch.zeros(3, 1), ticket)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6))
def test_gradcheck(num_rows):
    def round_trip(x):
        shuffled, ticket = batch_shuffle(x, generator=_generator())
        return batch_unshuffle(shuffled.sin(), ticket)

    assert torch.autograd.gradcheck(round_trip, torch.randn(num_rows, 2, dtype=torch.float64, requires_grad=True))


def _disagreeing(rank, world_size):
    with pytest.raises(RuntimeError, match="drew different shuffles"):
        batch_shuffle(torch.zeros(2, 1), generator=_generator(rank))
    return True


def test_ranks_with_different_generators_are_told_and_do_not_hang():
    assert run_ranks(_disagreeing, 2) == [True, True]
