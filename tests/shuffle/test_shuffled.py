import pytest
import torch
from torch import nn

from leakfree.norms import build_norm, normalization_scope
from leakfree.partition import image_partition
from leakfree.shuffle import Shuffled
from tests.ranks import run_ranks


def _head(shuffle, seed=5, num_groups=4):
    torch.manual_seed(0)
    norm = {"statistics": "ShuffleBN", "features": "BN"}[shuffle]
    options = {"num_groups": num_groups, "seed": seed} if shuffle == "statistics" else {}
    layers = []
    for _ in range(2):
        layers += [nn.Conv2d(3, 3, 3, padding=1), build_norm(norm, 3, **options), nn.ReLU()]
    head = nn.Sequential(*layers).double()
    return Shuffled(head, num_groups, seed=seed) if shuffle == "features" else head


def _train(rank, world_size, shuffle, sizes):
    """Two forwards and backwards; everything a run would depend on."""
    head = _head(shuffle)
    out = []
    for step in range(2):
        everyone = torch.randn(sum(sizes), 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x = everyone.split(sizes)[rank].clone().requires_grad_(True)
        with normalization_scope():
            y = head(x)
        (y.square() * torch.arange(1, 5)).sum().backward()
        out.append((y.detach(), x.grad))
    gradients = torch.cat([p.grad.flatten() for p in head.parameters()])
    buffers = [b for n, b in head.named_buffers() if "running" in n]
    return [torch.cat([y for y, _ in out]), torch.cat([g for _, g in out])], gradients, buffers


@pytest.mark.parametrize("sizes", [[9, 9], [12, 6], [18, 0], [7, 5, 6]])
def test_moving_rows_equals_moving_statistics(sizes):
    moved = run_ranks(_train, len(sizes), "features", sizes)
    stayed = run_ranks(_train, len(sizes), "statistics", sizes)
    for a, b in zip(moved, stayed, strict=True):
        for left, right in zip(a[0], b[0], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
    # parameter gradients: each rank's share differs (rows were elsewhere), their sum over ranks does not
    torch.testing.assert_close(sum(a[1] for a in moved), sum(b[1] for b in stayed), rtol=0, atol=1e-8)
    one = _train(0, 1, "features", [sum(sizes)])
    torch.testing.assert_close(one[1], sum(b[1] for b in stayed), rtol=0, atol=1e-8)
    for b in stayed:
        for left, right in zip(b[2], one[2], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


class _Nested(nn.Module):
    def forward(self, x, other):
        return {"rows": x * 2, "pair": (other + 1, [x.sum(1)])}


def _nested(rank, world_size):
    x = torch.arange(4.0)[:, None] + 10 * rank
    module = Shuffled(_Nested(), 2)
    out = module(x, other=x.clone())
    return (
        torch.equal(out["rows"], 2 * x)
        and torch.equal(out["pair"][0], x + 1)
        and torch.equal(out["pair"][1][0], x[:, 0])
    )


def test_every_tensor_of_a_nested_output_comes_home():
    assert run_ranks(_nested, 2) == [True, True]


class _Mean(nn.Module):
    def forward(self, x):
        return {"rows": x, "mean": x.mean()}


def _unrestorable(rank, world_size):
    with pytest.raises(ValueError, match=r"output\['mean'\] has shape \(\)"):
        Shuffled(_Mean(), 2)(torch.ones(4, 1))
    return True


def test_an_output_that_is_not_per_row_is_refused_by_name():
    assert run_ranks(_unrestorable, 2) == [True, True]


def test_a_torch_batch_norm_cannot_hide_from_virtual_groups():
    with pytest.raises(ValueError, match="0 is a torch BatchNorm2d"):
        Shuffled(nn.Sequential(nn.BatchNorm2d(3)), 2)(torch.randn(8, 3, 2, 2))


def test_inputs_must_agree_in_rows():
    with pytest.raises(ValueError, match="same number of rows"):
        Shuffled(_Nested(), 2)(torch.zeros(4, 1), other=torch.zeros(3, 1))


def test_eval_is_the_module_itself():
    module = Shuffled(nn.Linear(2, 2), 4).eval()
    x = torch.randn(5, 2)
    assert torch.equal(module(x), module.module(x))
    assert int(module.num_draws) == 0


def test_default_groups_follow_the_scope_and_one_group_warns():
    module = Shuffled(nn.Sequential(build_norm("BN", 3)))
    with normalization_scope(image_partition([2] * 6, 1)):
        module(torch.randn(12, 3, 2, 2))
    assert module.module[0].last_groups.bincount().tolist() == [2] * 6
    with pytest.warns(UserWarning, match="no effect"):
        Shuffled(nn.Linear(2, 2), 1)(torch.zeros(2, 2))


def test_the_count_of_draws_continues_from_a_checkpoint():
    module, again = Shuffled(build_norm("BN", 3), 2, seed=1), Shuffled(build_norm("BN", 3), 2, seed=1)
    x = torch.randn(9, 3, 2, 2)
    module(x)
    again.load_state_dict(module.state_dict())
    assert torch.equal(module(x), again(x))


class _FourRows(nn.Module):
    def forward(self, x):
        return x.new_zeros(4, 1)


def _fits_by_chance(rank, world_size):
    with pytest.raises(ValueError, match="cannot be restored"):
        Shuffled(_FourRows(), 2)(torch.ones(4 - rank, 1))  # 7 rows: 4 meet on one rank, 3 on the other
    return True


def test_a_size_that_fits_on_some_ranks_by_chance_is_refused_on_all():
    assert run_ranks(_fits_by_chance, 2, timeout=20) == [True, True]


def _torch_norm_with_more_groups_than_ranks(rank, world_size):
    with pytest.raises(ValueError, match="0 is a torch BatchNorm2d"):
        Shuffled(nn.Sequential(nn.BatchNorm2d(3)), 3)(torch.randn(8, 3, 2, 2))
    return True


def test_a_torch_batch_norm_is_refused_on_all_ranks_at_once():
    assert run_ranks(_torch_norm_with_more_groups_than_ranks, 2, timeout=20) == [True, True]


def test_one_process_refuses_what_ranks_would():
    with pytest.raises(ValueError, match=r"output\['mean'\] has shape \(\)"):
        Shuffled(_Mean(), 2)(torch.ones(4, 1))
