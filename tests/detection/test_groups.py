import pytest
import torch
from torch import nn

from leakfree.detection import RoiGroups
from leakfree.norms import build_norm
from leakfree.partition import current_scope


class _Pool(nn.Module):
    def forward(self, features, boxes, shapes):
        return torch.cat([features[:1].expand(len(item), *features.shape[1:]) for item in boxes])


def _run(groups, pool, head, sizes):
    rows = pool(torch.randn(1, 3, 2, 2), [torch.zeros(size, 4) for size in sizes], [])
    return head(rows + torch.randn_like(rows))


def _setup(images_per_group):
    pool, head = _Pool(), nn.Sequential(build_norm("BN", 3))
    return RoiGroups(pool, head, images_per_group), pool, head


def test_training_groups_follow_images():
    groups, pool, head = _setup(1)
    _run(groups, pool, head, [2, 3, 0])
    assert head[0].last_groups.tolist() == [0, 0, 1, 1, 1]
    assert current_scope() is None


def test_without_images_per_group_the_rank_is_one_group():
    groups, pool, head = _setup(0)
    _run(groups, pool, head, [2, 3])
    assert head[0].last_groups is None


def test_random_groups_are_as_many_as_images_fresh_each_time_and_repeatable():
    groups, pool, head = _setup(1)

    def draw():
        _run(groups, pool, head, [4, 4, 4])
        return head[0].last_groups

    groups.measure("random", seed=3)
    first, second = draw(), draw()
    groups.measure("random", seed=3)
    assert first.bincount().tolist() == [4, 4, 4]
    assert not torch.equal(first, second)
    assert torch.equal(draw(), first)


def test_the_scope_closes_when_the_head_fails():
    _, _, head = _setup(1)
    with pytest.raises(ValueError, match="expects"):
        head(torch.zeros(2, 4, 2, 2))
    assert current_scope() is None
