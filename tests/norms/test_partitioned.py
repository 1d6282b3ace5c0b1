import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leakfree.norms import batch_statistics, build_norm, image_partition, normalization_scope
from leakfree.shuffle import Shuffled
from tests.ranks import run_ranks

KINDS = {"BN": {}, "SyncBN": {}, "GhostBN": {"group_size": 4}, "ShuffleBN": {"num_groups": 3}, "BatchStatBN": {}}


def _x(num_rows=12, seed=0, dtype=torch.float64):
    return torch.randn(num_rows, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def _norm(kind, **options):
    torch.manual_seed(0)
    norm = build_norm(kind, 3, **(KINDS[kind] | options)).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def _torch_twin(norm):
    twin = nn.BatchNorm2d(3, eps=norm.eps, momentum=norm.momentum).double()
    twin.load_state_dict(norm.state_dict())
    return twin


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "BatchStatBN"])
def test_eval_is_torchs_batch_norm_and_state_dicts_are_interchangeable(kind):
    norm = _norm(kind)
    norm(_x())
    twin = _torch_twin(norm).eval()
    assert torch.equal(norm.eval()(_x(seed=5)), twin(_x(seed=5)))


@pytest.mark.parametrize("kind", ["GhostBN", "ShuffleBN"])
def test_groups_are_normalized_apart_and_buffers_pool_them(kind):
    norm = _norm(kind)
    x = _x()
    y = norm(x)
    groups = norm.last_groups
    assert groups.bincount().tolist() == [4, 4, 4]
    for group in range(3):
        expected = F.batch_norm(x[groups == group], None, None, norm.weight, norm.bias, True)
        torch.testing.assert_close(y[groups == group], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=1))
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize(("num_rows", "sizes"), [(0, []), (3, [3]), (8, [4, 4]), (11, [6, 5]), (13, [5, 4, 4])])
def test_ghost_groups_are_consecutive_and_never_smaller_than_asked(num_rows, sizes):
    norm = _norm("GhostBN")
    norm(_x(num_rows))
    groups = norm.last_groups
    if len(sizes) < 2:
        assert groups is None
    else:
        assert groups.bincount().tolist() == sizes
        assert (groups.diff() >= 0).all()


def test_bn_in_a_scope_follows_images():
    norm, x = _norm("BN"), _x()
    with normalization_scope(image_partition([5, 0, 7], 1)):
        y = norm(x)
    torch.testing.assert_close(y[:5], F.batch_norm(x[:5], None, None, norm.weight, norm.bias, True))
    torch.testing.assert_close(y[5:], F.batch_norm(x[5:], None, None, norm.weight, norm.bias, True))
    assert norm.last_groups.tolist() == [0] * 5 + [2] * 7


def test_layers_in_one_scope_share_a_draw_and_forwards_do_not():
    layers = [_norm("ShuffleBN"), _norm("ShuffleBN")]
    draws = []
    for _ in range(2):
        with normalization_scope():
            for layer in layers:
                layer(_x())
        assert torch.equal(layers[0].last_groups, layers[1].last_groups)
        draws.append(layers[0].last_groups)
    assert not torch.equal(*draws)


def test_shuffle_defaults_to_the_scopes_groups_then_to_two():
    norm = build_norm("ShuffleBN", 3).double()
    with normalization_scope(image_partition([3] * 4, 1)):
        norm(_x())
    assert norm.last_groups.bincount().tolist() == [3] * 4
    norm(_x())
    assert norm.last_groups.bincount().tolist() == [6, 6]


def test_a_shuffle_into_one_group_says_so_once():
    norm = _norm("ShuffleBN", num_groups=1)
    with pytest.warns(UserWarning, match="no effect"):
        norm(_x())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm(_x())


def test_the_draw_continues_from_a_checkpoint():
    norm = _norm("ShuffleBN")
    norm(_x())
    again = _norm("ShuffleBN")
    again.load_state_dict(norm.state_dict())
    norm(_x())
    again(_x())
    assert torch.equal(norm.last_groups, again.last_groups)


def test_batch_statistics_measures_any_layer_in_eval_under_the_scopes_groups():
    model = nn.Sequential(_norm("SyncBN"), _norm("ShuffleBN"), _norm("BN")).eval()
    model[2].frozen = True
    before = copy.deepcopy(model.state_dict())
    x = _x()
    with batch_statistics(model), normalization_scope(image_partition([6, 6], 1)):
        y = model(x)
    halves = []
    for part in x.split(6):
        for norm in model:
            part = F.batch_norm(part, None, None, norm.weight, norm.bias, True)
        halves.append(part)
    torch.testing.assert_close(y, torch.cat(halves))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not torch.equal(model(x), y)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"BatchNorm\(3, dim=2\) expects .* got \(2, 4, 5, 5\)"):
        build_norm("BN", 3)(torch.zeros(2, 4, 5, 5))
    with (
        pytest.raises(ValueError, match="cover 4 rows, the input has 5"),
        normalization_scope(image_partition([2, 2], 1)),
    ):
        build_norm("BN", 3)(torch.zeros(5, 3, 2, 2))


def _k_ranks(rank, world_size, kind, options, sizes):
    """(y, dx), summed parameter gradients and buffers of one training step on this rank's shard."""
    norm = _norm(kind, **options)
    x = _x(sum(sizes)).split(sizes)[rank].clone().requires_grad_(True)
    y = norm(x)
    (y.square() * torch.arange(1, 5)).sum().backward()
    return y.detach(), x.grad, torch.stack([norm.weight.grad, norm.bias.grad]), norm.running_mean, norm.running_var


def _assert_shards_equal(shards, one, buffers=True):
    torch.testing.assert_close(torch.cat([shard[0] for shard in shards]), one[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([shard[1] for shard in shards]), one[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(sum(shard[2] for shard in shards), one[2], rtol=0, atol=1e-9)
    for shard in shards if buffers else ():
        torch.testing.assert_close(shard[3], one[3], rtol=0, atol=1e-9)
        torch.testing.assert_close(shard[4], one[4], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[6, 6], [12, 0], [3, 4, 5]])
@pytest.mark.parametrize("kind", ["SyncBN", "ShuffleBN"])
def test_norms_over_all_ranks_equal_one_process(kind, sizes):
    _assert_shards_equal(run_ranks(_k_ranks, len(sizes), kind, {}, sizes), _k_ranks(0, 1, kind, {}, [sum(sizes)]))


def test_two_ranks_equal_one_process_with_two_virtual_groups():
    shards = run_ranks(_k_ranks, 2, "BN", {}, [6, 6])
    _assert_shards_equal(shards, _k_ranks(0, 1, "GhostBN", {"group_size": 6}, [12]), buffers=False)


def _all_empty(rank, world_size):
    norm = _norm("SyncBN")
    norm(_x(0)).sum().backward()
    return int(norm.num_batches_tracked), norm.weight.grad.abs().sum().item()


def test_all_ranks_empty_neither_hangs_nor_counts():
    assert run_ranks(_all_empty, 2) == [(0, 0.0), (0, 0.0)]


def _groups_over_spanning_images(rank, world_size, images_per_rank, images_per_group):
    norm = build_norm("ShuffleBN", 3).double()
    shuffled = Shuffled(build_norm("BN", 3).double())
    with normalization_scope(image_partition([8] * images_per_rank[rank], images_per_group)):
        norm(_x(8 * images_per_rank[rank]))
        shuffled(_x(8 * images_per_rank[rank]))
    here = shuffled.module.last_groups
    return norm.last_groups, 1 if here is None else int(here.max()) + 1


@pytest.mark.parametrize(("images_per_rank", "images_per_group"), [([1, 1, 1, 1], 2), ([2, 2], 3), ([2, 2], 1)])
def test_as_many_random_groups_as_base_groups_however_images_lie_on_ranks(images_per_rank, images_per_group):
    expected = -(-sum(images_per_rank) // images_per_group)
    results = run_ranks(_groups_over_spanning_images, len(images_per_rank), images_per_rank, images_per_group)
    counts = torch.cat([groups for groups, _ in results]).bincount()
    assert len(counts) == expected
    assert counts.max() - counts.min() <= 1
    assert sum(here for _, here in results) >= expected  # ranks without a group report one


def _uneven_eval(rank, world_size):
    norm = build_norm("SyncBN", 3, track_running_stats=False).eval()
    return [norm(_x(dtype=torch.float32)).shape for _ in range(1 + rank)]


def test_eval_without_buffers_communicates_nothing():
    run_ranks(_uneven_eval, 2, timeout=20)
