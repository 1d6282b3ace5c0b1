import pytest
import torch

from leakfree.partition import current_scope, image_partition, normalization_scope
from tests.ranks import run_ranks


def test_groups_follow_images():
    partition = image_partition([2, 0, 3, 1], 2)
    assert partition.groups.tolist() == [0, 0, 1, 1, 1, 1]
    assert partition.num_groups == 2


def test_one_group_needs_no_ids():
    for rows, images_per_group in (([4, 5], 2), ([], 1)):
        partition = image_partition(rows, images_per_group)
        assert (partition.groups, partition.num_groups, partition.synchronized) == (None, 1, False)


@pytest.mark.parametrize("bad", [0, -1])
def test_images_per_group_must_be_positive(bad):
    with pytest.raises(ValueError, match="at least 1"):
        image_partition([1], bad)


def _three_images_to_a_group(rank, world_size):
    partition = image_partition([[1, 2], [3, 1]][rank], 3)
    return partition.groups, partition.num_groups, partition.across_ranks


def test_groups_span_ranks_as_one_process_would_form_them():
    whole = image_partition([1, 2, 3, 1], 3)
    results = run_ranks(_three_images_to_a_group, 2)
    assert torch.cat([groups for groups, _, _ in results]).tolist() == whole.groups.tolist()
    assert all(count == whole.num_groups and across for _, count, across in results)


def _fail_inside():
    with normalization_scope():
        raise RuntimeError("planted")


def test_scopes_nest_and_close_after_an_exception():
    with normalization_scope() as outer:
        with normalization_scope() as inner:
            assert current_scope() is inner
        with pytest.raises(RuntimeError, match="planted"):
            _fail_inside()
        assert current_scope() is outer
        assert outer.share("a", lambda: 1) == outer.share("a", lambda: 2) == 1
    assert current_scope() is None
