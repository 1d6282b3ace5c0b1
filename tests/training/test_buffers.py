"""Statistics pooled over ranks, and buffers that belong to one rank."""

import torch
from torch import nn

from leakfree.norms import build_norm, domain
from leakfree.state import load_buffers
from leakfree.training.buffers import (
    differing_buffers,
    pool_statistics,
    pooled_statistics,
    pooled_values,
    share_buffers,
)
from tests.ranks import run_ranks


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), build_norm("BN", 4, dim=1), nn.BatchNorm1d(4, track_running_stats=False))


def _pool(rank, world_size, batches):
    model = _model()
    for batch in batches[rank]:
        model(batch)
    own = {name: value.clone() for name, value in model.named_buffers()}
    differing = differing_buffers(model)
    with pooled_statistics(model):
        inside = {name: value.clone() for name, value in model.named_buffers()}
    after = {name: value.clone() for name, value in model.named_buffers()}
    pool_statistics(model)
    load_buffers(model, {})
    return own, inside, after, dict(model.named_buffers()), differing


def test_pooled_statistics_are_the_moving_average_over_steps_and_ranks():
    batches = [torch.randn(2, 5, 3) for _ in range(2)]
    (own0, inside, after, pooled, differing), (own1, *others) = run_ranks(_pool, 2, [list(item) for item in batches])
    for name in ("1.running_mean", "1.running_var"):
        assert torch.allclose(inside[name], (own0[name] + own1[name]) / 2)
        assert torch.equal(inside[name], others[0][name])
        assert torch.equal(after[name], own0[name])
        assert torch.equal(pooled[name], inside[name])
    assert pooled["1.num_batches_tracked"] == 2
    assert [set(item) for item in differing] == [{"1.running_mean", "1.running_var"}] * 2
    assert torch.equal(differing[1]["1.running_mean"], own1["1.running_mean"])


def test_a_rank_whose_layer_saw_nothing_does_not_count():
    (own0, inside, *_), (own1, *_) = run_ranks(_pool, 2, [[torch.randn(5, 3)], []])
    assert own1["1.num_batches_tracked"] == 0
    assert torch.equal(inside["1.running_mean"], own0["1.running_mean"])
    assert inside["1.num_batches_tracked"] == 1


def test_one_process_has_nothing_to_pool():
    model = _model()
    model(torch.randn(4, 3))
    before = model[1].running_mean.clone()
    pool_statistics(model)
    assert torch.equal(model[1].running_mean, before)
    assert differing_buffers(model) == [{}]


def _pool_domains(rank, world_size):
    norm = build_norm("DomainBN", 3, num_domains=3)
    generator = torch.Generator().manual_seed(rank)
    for key in (rank, 1):
        with domain(key):
            norm(torch.randn(4, 3, 2, 2, generator=generator) + rank)
    own = norm.running_mean.clone()
    pool_statistics(norm)
    return own, norm.running_mean, norm.num_batches_tracked.tolist()


def test_each_domain_is_pooled_over_the_ranks_that_saw_it():
    (one, pooled, counts), (other, alike, _) = run_ranks(_pool_domains, 2)
    assert torch.equal(pooled, alike)
    assert counts == [1, 2, 0]
    assert torch.equal(pooled[0], one[0])  # rank 1 did not see it
    torch.testing.assert_close(pooled[1], (one[1] + other[1]) / 2)
    assert not pooled[2].any()


def _pool_shared(rank, world_size):
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    model.register_buffer("odd", torch.tensor([True, False, rank == 1]))
    model.register_buffer("wide", torch.arange(8.0).view(2, 4).t() + rank)
    model.register_buffer("none", torch.empty(0))
    shared(torch.randn(5, 3, generator=torch.Generator().manual_seed(rank)))
    own = shared.running_mean.clone()
    return own, pooled_values(model), shared.running_mean.clone(), differing_buffers(model), list(model.state_dict())


def test_pooled_values_have_every_name_and_change_nothing():
    (one, pooled, after, differing, names), (two, *_) = run_ranks(_pool_shared, 2)
    assert set(names) - set(pooled) == {
        "odd",
        "wide",
        "none",
        *(f"{x}.{y}" for x in ("a", "b.0") for y in ("weight", "bias")),
    }
    torch.testing.assert_close(pooled["b.0.running_mean"], (one + two) / 2)
    assert torch.equal(pooled["a.running_mean"], pooled["b.0.running_mean"])
    assert torch.equal(one, after)
    assert [item["odd"].tolist() for item in differing] == [[True, False, False], [True, False, True]]
    assert torch.equal(differing[1]["wide"], torch.arange(8.0).view(2, 4).t() + 1)
    assert "none" not in differing[0]


def _alike(rank, world_size):
    torch.manual_seed(0)
    norm = build_norm("SyncBN", 300, dim=1).double()
    norm(torch.randn(5, 300, dtype=torch.float64))
    own = norm.running_mean.clone()
    (mine, *_) = differing_buffers(norm)
    pool_statistics(norm)
    return own, norm.running_mean.clone(), mine


def test_statistics_that_the_mean_of_equal_ones_would_change_are_kept_beside_it():
    """(a + a + a) / 3 is not always a."""
    own, pooled, kept = run_ranks(_alike, 3)[0]
    assert not torch.equal(own, pooled)
    assert torch.equal(kept["running_mean"], own)


def _shared(rank, world_size):
    norm = build_norm("MBN", 3, dim=1, memory=2)
    norm(torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)))
    own = {name: value.clone() for name, value in norm.named_buffers()}
    share_buffers(norm)
    return own, dict(norm.named_buffers())


def test_shared_buffers_are_those_of_a_checkpoint():
    (own, shared), (other, alike) = run_ranks(_shared, 2)
    assert all(torch.equal(value, alike[name]) for name, value in shared.items())
    assert torch.equal(shared["memory_mean"], own["memory_mean"])
    assert not torch.equal(shared["memory_mean"], other["memory_mean"])
    torch.testing.assert_close(shared["running_mean"], (own["running_mean"] + other["running_mean"]) / 2)


def _without_buffers(rank, world_size):
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
    share_buffers(model)
    return differing_buffers(model)


def test_a_model_without_buffers_has_none_that_differ():
    assert run_ranks(_without_buffers, 2) == [[{}, {}]] * 2
