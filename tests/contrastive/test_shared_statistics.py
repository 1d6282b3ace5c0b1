"""Running statistics of ranks that normalize by themselves, merged: those of one process with all images."""

import pytest
import torch
from torch import Tensor

from leakfree.contrastive.shared_statistics import SharedStatistics
from leakfree.errors import ConfigError
from leakfree.norms import build_norm
from leakfree.partition import Partition, normalization_scope
from tests.ranks import run_ranks


def buffers(rank: int, world_size: int, sizes: list[int], momentum: float, sync: bool) -> list[Tensor]:
    """The running statistics after three steps of two layers, one of which sees more values of each image."""
    layers = torch.nn.ModuleList(
        [build_norm("BN", 3, dim=1, momentum=momentum), build_norm("BN", 3, momentum=momentum)]
    )
    layers.double()
    shared = SharedStatistics(layers)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        x = (1 + step) * torch.randn(sum(sizes), 3, 2, 2, generator=generator, dtype=torch.float64) + step
        mine = x[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        shared.remember()
        with normalization_scope(Partition(across_ranks=True) if sync else None):
            for layer, rows in zip(layers, (mine[:, :, 0, 0], mine), strict=True):
                if len(rows) > 1 or sync or not len(rows):
                    layer(rows)
        shared.merge()
    return [item.clone() for item in layers.buffers() if item.is_floating_point()]


@pytest.mark.parametrize("sizes", [[4, 4], [6, 2], [0, 5], [2, 3, 4]], ids=str)
@pytest.mark.parametrize(("momentum", "sync"), [(0.1, False), (1.0, False), (0.1, True)])
def test_ranks_have_those_of_one_process(sizes: list[int], momentum: float, sync: bool) -> None:
    expected = buffers(0, 1, [sum(sizes)], momentum, False)
    assert all((item != start).all() for item, start in zip(expected, [0, 1, 0, 1], strict=True))
    for found in run_ranks(buffers, len(sizes), sizes, momentum, sync):
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_what_adds_nothing_changes_nothing() -> None:
    for sizes, momentum in (([0, 0], 0.1), ([3, 4], 0.0)):
        for found in run_ranks(buffers, 2, sizes, momentum, False):
            assert [item.tolist() for item in found] == [[0.0] * 3, [1.0] * 3] * 2


def test_an_average_over_all_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm_options\.momentum: null"):
        SharedStatistics(build_norm("BN", 3, momentum=None))
