import pytest
import torch
from torch import nn

from leakfree.leakage import cross_sample_influence
from leakfree.norms import build_norm, image_partition, normalization_scope
from tests.ranks import run_ranks

IMAGES = torch.arange(12) // 3


def _x(seed=0):
    return torch.randn(12, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.Identity(), nn.BatchNorm2d(4).eval(), build_norm("FrozenBN", 4)]
)
def test_batch_independent_models_read_exactly_zero(norm):
    result = cross_sample_influence(nn.Sequential(nn.Conv2d(4, 4, 3), norm).double(), _x(), groups=IMAGES)
    assert (result.total, result.within, result.between) == (0.0, 0.0, 0.0)


def test_a_planted_leak_has_the_known_share():
    # f_i = x_i + a * mean over the image: the energy on each of the n - 1 companions is (a/n)^2
    n, a = 3, 2.0

    def planted(x):
        means = torch.zeros(4, *x.shape[1:], dtype=x.dtype).index_add(0, IMAGES, x) / n
        return x + a * means[IMAGES]

    result = cross_sample_influence(planted, _x(), groups=IMAGES)
    others = (n - 1) * (a / n) ** 2
    assert result.within == pytest.approx(others / (others + (1 + a / n) ** 2))
    assert result.between == 0.0
    assert result.total == result.within


def test_batch_norm_leaks_inside_its_group_only():
    model = build_norm("BN", 4).double()
    assert cross_sample_influence(model, _x(), groups=IMAGES).between > 0
    with normalization_scope(image_partition([3] * 4, 1)):
        inside = cross_sample_influence(model, _x(), groups=IMAGES)
    assert inside.within > 0.01
    assert inside.between == 0.0


def test_it_leaves_the_model_as_it_was():
    model = build_norm("ShuffleBN", 4, num_groups=2).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = cross_sample_influence(model, _x())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.weight.grad is None
    assert cross_sample_influence(model, _x()) == first


def test_an_output_that_is_not_per_sample_is_refused():
    with pytest.raises(ValueError, match="12 samples went in, 1 outputs came out"):
        cross_sample_influence(lambda x: x.mean(0, keepdim=True), _x())


def _on_ranks(rank, world_size, kind, sizes):
    x, groups = _x().split(sizes)[rank], IMAGES.split(sizes)[rank]
    return cross_sample_influence(build_norm(kind, 4).double(), x, groups=groups, num_probes=6)


@pytest.mark.parametrize("sizes", [[6, 6], [12, 0], [2, 7, 3]])
def test_ranks_that_share_statistics_are_counted_as_one_batch(sizes):
    one = cross_sample_influence(build_norm("SyncBN", 4).double(), _x(), groups=IMAGES, num_probes=6)
    for result in run_ranks(_on_ranks, len(sizes), "SyncBN", sizes):
        assert result.within == pytest.approx(one.within, rel=1e-9)
        assert result.between == pytest.approx(one.between, rel=1e-9)
