import os

import pytest
import torch

from leakfree.distributed import (
    _resolve,
    all_gather_ints,
    all_reduce_sum_,
    all_to_all_bytes,
    get_rank,
    get_world_size,
)
from tests.ranks import run_ranks


def test_one_process_is_world_of_one():
    x = torch.randn(3)
    assert (get_rank(), get_world_size()) == (0, 1)
    assert all_gather_ints([3, 4]) == [[3, 4]]
    assert all_to_all_bytes(x, [3], [3]) is x


def _uneven(rank, world_size):
    send = {0: [1, 2], 1: [0, 1]}[rank]
    receive = {0: [1, 0], 1: [2, 1]}[rank]
    mine = torch.arange(sum(send), dtype=torch.uint8) + 100 * rank
    return all_to_all_bytes(mine, send, receive).tolist()


def test_uneven_exchange_in_rank_order():
    assert run_ranks(_uneven, 2) == [[0], [1, 2, 100]]


def _nodes(rank, world_size):
    os.environ["GROUP_RANK"] = str(rank // 2)
    try:
        numbers = torch.tensor([float(rank)])
        gathered = all_gather_ints([rank], "node")
        return get_rank("node"), get_world_size("node"), gathered, float(all_reduce_sum_(numbers, "node"))
    finally:
        del os.environ["GROUP_RANK"]


def test_the_ranks_of_a_node_are_a_group_by_name():
    expected = [(0, 2, [[0], [1]], 1.0), (1, 2, [[0], [1]], 1.0), (0, 1, [[2]], 2.0)]
    assert run_ranks(_nodes, 3) == expected


def test_an_unknown_group_name_is_refused():
    with pytest.raises(ValueError, match="unknown process group 'rack'"):
        _resolve("rack")


def _raise_on_rank_one(rank, world_size):
    if rank == 1:
        raise RuntimeError("planted")
    return rank


def test_a_failing_rank_fails_the_caller():
    with pytest.raises(AssertionError, match="planted"):
        run_ranks(_raise_on_rank_one, 2)
