"""Batch-mates: what replacing them does, and whether outputs tell who they were."""

import pytest
import torch
from torch import nn

from leakfree.errors import DataError
from leakfree.leakage import batchmate_probe, companion_swap
from leakfree.norms import build_norm
from leakfree.partition import Partition, normalization_scope


def _x(n, seed=0, width=6):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "leaks"), [("BN", True), ("GN", False), ("FrozenBN", False)])
def test_only_shared_statistics_move_an_output(name, leaks):
    torch.manual_seed(0)
    options = {"num_groups": 2} if name == "GN" else {}
    model = nn.Sequential(nn.Linear(6, 8), build_norm(name, 8, dim=1, **options), nn.Linear(8, 4)).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    result = companion_swap(model, _x(8).double(), 3 * _x(40, 1).double())
    assert (result.moved > 0.05) == leaks
    assert result.num_probes == 8
    if not leaks:
        assert result.moved < 1e-12
        assert result.flipped == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_measure_is_its_formula():
    def model(x):
        return x + x.sum(0, keepdim=True)

    batch, others = _x(3), torch.ones(2, 6)
    expected = [(((batch.sum(0) - batch[i]) - 2) / (batch[i] + batch.sum(0)).norm()).norm() for i in range(3)]
    result = companion_swap(model, batch, others, num_probes=3)
    assert result.moved == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_a_path_cut_off_from_the_gradient_is_seen():
    result = companion_swap(lambda x: x - x.mean(0).detach(), _x(4), _x(9, 1))
    assert result.moved > 0.1


def test_swap_mistakes_are_told():
    with pytest.raises(DataError, match="at least 3 others of the same shape"):
        companion_swap(nn.Identity(), _x(4), _x(2))
    with pytest.raises(DataError, match="4 samples went in, 1 outputs"):
        companion_swap(lambda x: x.mean(0, keepdim=True), _x(4), _x(4))
    with pytest.raises(DataError, match="empty"):
        companion_swap(nn.Identity(), _x(0), _x(4))


def test_the_probe_sees_the_groups_of_a_batch_norm_and_nothing_without_them():
    """In a group of three, centring makes each sample what the two others are not."""
    torch.manual_seed(0)
    groups = torch.arange(240) // 3
    x, layer = _x(240, width=16), build_norm("BN", 16, dim=1)
    with normalization_scope(Partition(groups, 80)):
        leaky = layer(x)
    assert batchmate_probe(leaky, groups).auc > 0.7
    assert abs(batchmate_probe(x, groups).auc - 0.5) < 0.05


def test_probe_mistakes_are_told():
    with pytest.raises(DataError, match="8 groups of two or more, got 2"):
        batchmate_probe(_x(8), torch.arange(8) // 4)
    with pytest.raises(DataError, match="not finite"):
        batchmate_probe(_x(8) / 0, torch.arange(8) // 2, folds=2)
    with pytest.raises(DataError, match="2 folds of 4 pairs or more, got folds=1"):
        batchmate_probe(_x(8), torch.arange(8) // 2, folds=1)
    with pytest.raises(DataError, match="expected features"):
        batchmate_probe(_x(8), torch.arange(7))
