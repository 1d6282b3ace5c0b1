import pytest
import torch

from leakfree.distributed import all_gather_ints, all_to_all_rows, get_rank, get_world_size
from tests.ranks import run_ranks


def test_one_process_is_world_of_one():
    x = torch.randn(3)
    assert (get_rank(), get_world_size()) == (0, 1)
    assert all_gather_ints([3, 4]) == [[3, 4]]
    assert all_to_all_rows(x, [3], [3]) is x


def _uneven(rank, world_size):
    send = {0: [1, 2], 1: [0, 1]}[rank]
    receive = {0: [1, 0], 1: [2, 1]}[rank]
    x = (torch.arange(sum(send) * 2, dtype=torch.float64).view(-1, 2) + 100 * rank).requires_grad_(True)
    out = all_to_all_rows(x, send, receive)
    (out * (rank + 1)).sum().backward()
    return out.detach(), x.grad


def test_uneven_exchange_and_its_way_back():
    (out0, grad0), (out1, grad1) = run_ranks(_uneven, 2)
    assert out0[:, 0].tolist() == [0.0]
    assert out1[:, 0].tolist() == [2.0, 4.0, 100.0]
    assert grad0[:, 0].tolist() == [1.0, 2.0, 2.0]  # each row collects the weight of the rank it went to
    assert grad1[:, 0].tolist() == [2.0]


def _raise_on_rank_one(rank, world_size):
    if rank == 1:
        raise RuntimeError("planted")
    return rank


def test_a_failing_rank_fails_the_caller():
    with pytest.raises(AssertionError, match="planted"):
        run_ranks(_raise_on_rank_one, 2)
