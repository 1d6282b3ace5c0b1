import os

import pytest
import torch

from leakfree.distributed import (
    _resolve,
    all_gather_ints,
    all_reduce_sum_,
    all_to_all_bytes,
    broadcast_rows,
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


def _rows(rank, world_size, counts, piece):
    mine = torch.arange(counts[rank] * 2).view(-1, 2) + 100 * rank
    seen = list(broadcast_rows(mine, counts, piece=piece))
    assert all(len(part) <= piece for _, _, part in seen)
    return [(other, start, part.tolist()) for other, start, part in seen]


@pytest.mark.parametrize("piece", [1, 2, 10])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 1], [0, 0, 0]])
def test_rows_of_all_ranks_come_piece_by_piece(counts, piece):
    expected = []
    for rank, count in enumerate(counts):
        rows = (torch.arange(count * 2).view(-1, 2) + 100 * rank).tolist()
        expected += [(rank, start, rows[start : start + piece]) for start in range(0, count, piece)]
    assert run_ranks(_rows, 3, counts, piece) == [expected] * 3
    assert _rows(0, 1, counts[:1], piece) == [entry for entry in expected if entry[0] == 0]


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
