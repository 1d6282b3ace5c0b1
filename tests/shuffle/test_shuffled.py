import copy
import os
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leakfree.norms import build_norm, normalization_scope
from leakfree.partition import current_scope, image_partition
from leakfree.shuffle import Shuffled
from tests.ranks import run_ranks
from tests.wire import recorded, told_by


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


# --- virtual groups in one process, groups on ranks ---

_GROUP_SIZES = [(4, 4), (7, 0), (2, 3, 4), (0, 11, 0), (3, 0, 5, 2), (1, 1, 9, 1)]


def _two_norms(num_groups, balance=True):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), build_norm("BN", 4, dim=1), nn.ReLU(), nn.Linear(4, 2), build_norm("BN", 2, dim=1)]
    return Shuffled(nn.Sequential(*layers).double(), num_groups, seed=9, balance=balance)


def _everyone(sizes, step=0):
    return torch.randn(sum(sizes), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + step


def _with_norms(rank, world_size, sizes, num_groups, balance=True):
    """Two steps: outputs, gradients, buffers, and the rows that met here in the first."""
    head, out, met = _two_norms(num_groups, balance), [], []
    head.module.register_forward_pre_hook(lambda module, args: met.append(len(args[0])))
    buffers = []
    for step in range(2):
        x = _everyone(sizes, step).split(sizes)[rank].clone().requires_grad_(True)
        y = head(x)
        (y * torch.arange(1.0, 3)).sin().sum().backward()
        out += [y.detach(), x.grad]
        buffers.append({name: value.clone() for name, value in head.named_buffers()})
    weights = {name: value.grad for name, value in head.named_parameters()}
    return out, weights, buffers, met


def _assert_same_training(ranks, one):
    for parts, whole in zip(zip(*(result[0] for result in ranks), strict=True), one[0], strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)
    for name, whole in one[1].items():
        torch.testing.assert_close(sum(result[1][name] for result in ranks), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", _GROUP_SIZES, ids=str)
def test_as_many_virtual_groups_as_ranks_equal_the_ranks(sizes):
    ranks = run_ranks(_with_norms, len(sizes), sizes, len(sizes))
    one = _with_norms(0, 1, [sum(sizes)], len(sizes))
    _assert_same_training(ranks, one)
    for _, _, buffers, _ in ranks:
        for mine, whole in zip(buffers, one[2], strict=True):
            for name in mine:
                if "running" not in name:  # counts of draws and of batches
                    assert torch.equal(mine[name], whole[name]), name


@pytest.mark.parametrize("sizes", _GROUP_SIZES, ids=str)
def test_running_averages_of_the_ranks_pool_to_those_of_one_process(sizes):
    """A rank's buffers follow its own group; the one process sees all groups, and pools them by their rows."""
    ranks = run_ranks(_with_norms, len(sizes), sizes, len(sizes))
    whole = _with_norms(0, 1, [sum(sizes)], len(sizes))[2][0]
    rows = torch.tensor([met[0] for *_, met in ranks], dtype=torch.float64)[:, None]
    total = rows.sum()
    for layer in ("module.1", "module.4"):
        means = torch.stack([buffers[0][f"{layer}.running_mean"] for _, _, buffers, _ in ranks]) / 0.1
        variances = (torch.stack([buffers[0][f"{layer}.running_var"] for _, _, buffers, _ in ranks]) - 0.9) / 0.1
        mean = (rows * means).sum(0) / total
        torch.testing.assert_close(0.1 * mean, whole[f"{layer}.running_mean"], rtol=0, atol=1e-9)
        variance = ((rows - 1) * variances + rows * (means - mean) ** 2).sum(0) / (total - 1)
        torch.testing.assert_close(0.9 + 0.1 * variance, whole[f"{layer}.running_var"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "num_groups"), [((5, 4), 4), ((7, 0), 3), ((3, 5, 4), 5), ((6, 3, 0, 4), 5)], ids=str
)
def test_any_number_of_groups_on_any_ranks_equals_one_process(sizes, num_groups):
    ranks = run_ranks(_with_norms, len(sizes), sizes, num_groups)
    _assert_same_training(ranks, _with_norms(0, 1, [sum(sizes)], num_groups))


@pytest.mark.parametrize(("sizes", "num_groups"), [((5, 2), 2), ((2, 0, 6), 3), ((6, 3, 4), 4)], ids=str)
def test_ranks_may_keep_their_number_of_rows(sizes, num_groups):
    ranks = run_ranks(_with_norms, len(sizes), sizes, num_groups, False)
    assert [met for *_, met in ranks] == [[n, n] for n in sizes]
    balanced = run_ranks(_with_norms, len(sizes), sizes, num_groups, True)
    assert [met for *_, met in ranks] != [met for *_, met in balanced]


def _groups_kept(rank, world_size):
    """Unbalanced, one group a rank: the norm inside sees as many rows as came, and they are strangers."""
    sizes = (6, 2)
    x = torch.arange(8.0).split(sizes)[rank][:, None]
    seen = []
    module = nn.Identity()
    module.register_forward_pre_hook(lambda module, args: seen.extend(args[0][:, 0].tolist()))
    y = Shuffled(module, 2, balance=False)(x)
    assert torch.equal(y, x)
    return seen


def test_unbalanced_shares_are_random_rows_of_everyone():
    first, second = run_ranks(_groups_kept, 2)
    assert (len(first), len(second)) == (6, 2)
    assert sorted(first + second) == list(range(8))
    assert sorted(first) != list(range(6))


# --- what goes in and what comes out ---


class _Rich(nn.Module):
    """Every kind of output, None and numbers inside; tells what it was given."""

    def forward(self, x, *, boxes, names=None, scale=1, mode="plain"):
        assert len(boxes) == len(x)
        logits = x * scale + 1
        return {
            "logits": logits,
            "pair": (boxes * 2, [names, None, {"deep": (logits.sum(1), 3.5)}]),
            "mode": mode,
            "maps": logits[:, :, None, None].expand(-1, -1, 2, 2),
            "scale": scale,
        }


def _rich(rank, world_size, sizes):
    n = sizes[rank]
    x = (torch.arange(2.0 * n).view(n, 2) + 100 * rank).requires_grad_(True)
    boxes = torch.arange(4 * n).view(n, 4) + 100 * rank
    head = Shuffled(_Rich(), 2)
    with recorded() as calls:
        out = head(x, boxes=boxes, names=(torch.arange(n) % 2 == 0), scale=2, mode="fancy")
    logits = 2 * x.detach() + 1
    assert torch.equal(out["logits"], logits)
    assert torch.equal(out["pair"][0], boxes * 2)
    names, nothing, deep = out["pair"][1]
    assert torch.equal(names, torch.arange(n) % 2 == 0)
    assert nothing is None
    assert torch.equal(deep["deep"][0], logits.sum(1))
    assert deep["deep"][1] == 3.5
    assert (out["mode"], out["scale"]) == ("fancy", 2)
    assert torch.equal(out["maps"], logits[:, :, None, None].expand(-1, -1, 2, 2))
    assert (type(out["pair"]), type(out["pair"][1])) == (tuple, list)
    with recorded() as back:
        (out["logits"].sum() + out["pair"][1][2]["deep"][0].sum() + out["maps"].sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2 * (1 + 1 + 4)))
    with recorded() as again:
        head(x, boxes=boxes)
    return [[call.name for call in part] for part in (calls, back, again)]


@pytest.mark.parametrize("sizes", [(4, 3), (0, 5), (2, 0, 4)], ids=str)
def test_a_rich_output_comes_home_whole_in_one_exchange(sizes):
    for forward, backward, again in run_ranks(_rich, len(sizes), sizes):
        # sizes; rows; the first time also whether the outputs can be restored anywhere; rows
        assert forward == ["all_gather_into_tensor", "all_to_all_single"] * 2
        assert backward == ["all_to_all_single"] * 2
        assert [name for name in again if name == "all_to_all_single"] == ["all_to_all_single"] * 2


def test_a_rich_output_in_one_process():
    assert _rich(0, 1, (5,)) == [[], [], []]


class _Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.wanted = "plain"

    def forward(self, x):
        return {"plain": x, "pair": (x, x.sum(1)), "mean": (x, x.mean(0, keepdim=True)), "none": None}[self.wanted]


def _second_kind(rank, world_size):
    head = Shuffled(_Kinds(), world_size)
    x = torch.randn(3 + rank, 2, generator=torch.Generator().manual_seed(rank))
    told = []
    for wanted in ("plain", "pair", "mean", "plain", "none", "pair"):
        head.module.wanted = wanted
        try:
            out = head(x)
        except ValueError as error:
            told.append(str(error))
            continue
        if wanted == "none":
            assert out is None
        elif wanted == "pair":
            assert torch.equal(out[0], x)
            assert torch.equal(out[1], x.sum(1))
        else:
            assert torch.equal(out, x)
    (message,) = told
    assert message.startswith(f"Shuffled: output[1] has shape (1, 2), but {message.split('but ')[1][0]} rows went in")
    return int(head.num_draws)


def test_another_kind_of_output_later_is_restored_or_refused_like_the_first():
    assert run_ranks(_second_kind, 3) == [6, 6, 6]


class _Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.linear(x) if len(x) else x.new_zeros(0, 2)


def _cut_off(rank, world_size, sizes, needs):
    torch.manual_seed(0)
    head = Shuffled(_Guarded())
    x = _everyone(sizes).split(sizes)[rank].clone().requires_grad_(needs)
    with recorded() as calls:
        y = head(x)
        (y * (1 + x.detach()[:, :2])).sum().backward()
    weight = head.module.linear.weight
    if needs:
        torch.testing.assert_close(x.grad, (1 + x.detach()[:, :2]) @ weight.detach(), rtol=0, atol=1e-12)
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    dist.all_reduce(gradient)
    whole = _everyone(sizes)
    torch.testing.assert_close(gradient, (1 + whole[:, :2]).T @ whole, rtol=0, atol=1e-12)
    return [call.name for call in calls]


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("sizes", [(1, 0), (0, 1), (0, 2, 0), (0, 0)], ids=str)
def test_a_head_that_returns_zeros_for_no_rows_holds_up_nobody(sizes, needs):
    names = run_ranks(_cut_off, len(sizes), sizes, needs, timeout=10)
    assert all(mine == names[0] for mine in names)


def _frozen(rank, world_size):
    head = Shuffled(nn.Linear(3, 2)).requires_grad_(False)
    frozen = head(torch.randn(3, 3))
    x = torch.randn(3, 3, requires_grad=rank == 0)
    head(x).sum().backward()
    with torch.no_grad():
        silent = head(x)
    trained = Shuffled(nn.Linear(3, 2))
    return frozen.requires_grad, x.grad is not None, silent.requires_grad, trained(torch.randn(3, 3)).requires_grad


def test_only_what_can_be_trained_requires_a_gradient():
    assert run_ranks(_frozen, 2) == [(False, True, False, True), (False, False, False, True)]
    assert _frozen(0, 1) == (False, True, False, True)


def _autocast(rank, world_size):
    torch.manual_seed(0)
    n = [4, 0, 3][rank]
    head = Shuffled(nn.Sequential(nn.Linear(8, 8), build_norm("BN", 8, dim=1), nn.ReLU(), nn.Linear(8, 4)), 3, seed=2)
    twin = copy.deepcopy(head.module)
    x = torch.randn(7, 8).split([4, 0, 3])[rank].clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = head(x)
        z = twin[-1](twin[0](x[:0]))
    assert (y.dtype, y.shape) == (torch.bfloat16, (n, 4))
    y.float().square().sum().backward()
    assert (x.grad.dtype, x.grad.isfinite().all().item()) == (torch.float32, True)
    assert z.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in head.parameters())
    head = Shuffled(nn.Linear(8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(x), head.module(x), rtol=0.02, atol=0.02)
    return y.detach()


def test_autocast_keeps_its_dtypes_on_the_way():
    ranks = run_ranks(_autocast, 3)
    assert [len(y) for y in ranks] == [4, 0, 3]
    assert torch.cat(ranks).isfinite().all()


def _channels_last(rank, world_size):
    torch.manual_seed(0)
    head = Shuffled(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), build_norm("BN", 4)).to(dtype=torch.float64), 2)
    seen = []
    head.module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    outs = []
    for layout in (torch.channels_last, torch.contiguous_format):
        head.num_draws.zero_()
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        x = x[: 4 * rank].contiguous(memory_format=layout).requires_grad_(True)  # the first rank has no rows
        y = head(x)
        y.square().sum().backward()
        outs.append((y, x.grad))
    for left, right in zip(*outs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
    assert not len(outs[0][0]) or outs[0][0].is_contiguous(memory_format=torch.channels_last)
    return seen


def test_channels_last_goes_in_and_comes_out():
    assert run_ranks(_channels_last, 2) == [[True, False], [True, False]]


def _modes(rank, world_size):
    torch.manual_seed(0)
    head = Shuffled(nn.Sequential(nn.Linear(3, 3), build_norm("BN", 3, dim=1)), 2, seed=4)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(rank))
    head(x)
    head.eval()
    with recorded() as calls:
        assert torch.equal(head(x), head.module(x))
        assert torch.equal(head(x[: rank + 1]), head.module(x[: rank + 1]))
    assert not calls
    assert int(head.num_draws) == 1
    head.train()
    twin, pickled = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    fresh = Shuffled(nn.Sequential(nn.Linear(3, 3), build_norm("BN", 3, dim=1)), 2, seed=4)
    missing, unexpected = fresh.load_state_dict(head.state_dict())
    assert not missing
    assert not unexpected
    first = [module(x) for module in (head, twin, pickled, fresh)]
    second = [module(x) for module in (head, twin, pickled, fresh)]
    for results in (first, second):
        assert all(torch.equal(results[0], other) for other in results[1:])
    return [int(module.num_draws) for module in (head, twin, pickled, fresh)], first[0].detach(), second[0].detach()


@pytest.mark.parametrize("world_size", [1, 2])
def test_modes_copies_pickles_and_checkpoints_go_on_with_the_same_draws(world_size):
    for draws, first, second in run_ranks(_modes, world_size):
        assert draws == [3] * 4
        assert not torch.equal(first, second)


def test_a_copy_in_use_shares_nothing_with_the_original():
    head = Shuffled(build_norm("BN", 3, dim=1), 2)
    head(torch.randn(8, 3))
    twin = copy.deepcopy(head)
    twin(torch.randn(8, 3))
    assert (int(head.num_draws), int(twin.num_draws)) == (1, 2)


def _all_empty(rank, world_size):
    head = Shuffled(nn.Sequential(nn.Linear(3, 2), build_norm("BN", 2, dim=1)), 2)
    before = copy.deepcopy(head.state_dict())
    x = torch.zeros(0, 3, requires_grad=True)
    y = head(x)
    y.sum().backward()
    assert y.shape == (0, 2)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    return [float(parameter.grad.abs().sum()) for parameter in head.parameters()]


@pytest.mark.parametrize("world_size", [1, 3])
def test_no_rows_anywhere_change_nothing(world_size):
    assert run_ranks(_all_empty, world_size) == [[0.0] * 4] * world_size


# --- mistakes, told on every rank ---


def _shuffled_mistakes(rank, world_size):
    def draws_apart():
        head = Shuffled(nn.Identity(), 2)
        if rank:
            head.num_draws += 1
        head(x)

    x, y = torch.zeros(3, 2), torch.zeros(3, 5)
    trips = {
        "seed": lambda: Shuffled(nn.Identity(), 2, seed=rank)(x),
        "draws": draws_apart,
        "groups": lambda: Shuffled(nn.Identity(), 2 + rank)(x),
        "balance": lambda: Shuffled(nn.Identity(), 2, balance=bool(rank))(x),
        "too few groups": lambda: Shuffled(nn.Identity(), 1, balance=False)(x),
        "dtype": lambda: Shuffled(nn.Identity(), 2)((x, x.double())[rank]),
        "row shape": lambda: Shuffled(nn.Identity(), 2)((x, y)[rank]),
        "keywords": lambda: Shuffled(_Rich(), 2)(x, **({"boxes": x, "names": x} if rank else {"names": x, "boxes": x})),
        "value": lambda: Shuffled(_Rich(), 2)(x, boxes=torch.zeros(3, 4), names={1}),
        "rows": lambda: Shuffled(_Rich(), 2)(x, boxes=torch.zeros(4, 4)),
        "output value": lambda: Shuffled(_Something({"a": [object()]}), 2)(x),
        "output rows": lambda: Shuffled(_Something({"a": [torch.zeros(7, 2)]}), 2)(x),
        "output number": lambda: Shuffled(_Something((torch.tensor(1.0),)), 2)(x),
    }
    z = torch.arange(4.0)[:, None] + rank
    return told_by(trips, in_step=lambda: torch.equal(Shuffled(nn.Identity(), 2)(z), z))


class _Something(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.fixture(scope="module")
def told():
    return run_ranks(_shuffled_mistakes, 2, timeout=20)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("seed", "RuntimeError: ranks drew different shuffles"),
        ("draws", "RuntimeError: ranks drew different shuffles"),
        ("groups", "RuntimeError: ranks drew different shuffles"),
        ("balance", "RuntimeError: ranks drew different shuffles"),
        ("too few groups", "ValueError: .*need a group each: num_groups=1 is less than 2 ranks"),
        ("dtype", "ValueError: ranks shuffle .*; on this rank"),
        ("row shape", "ValueError: ranks shuffle .*; on this rank"),
        ("keywords", "ValueError: ranks shuffle "),
        ("value", r"TypeError: cannot shuffle input\[1\]\['names'\] of type set; use tensors"),
        ("rows", r"ValueError: .*same number of rows, got .*input\[1\]\['boxes'\].*4"),
        ("output value", r"TypeError: cannot shuffle output\['a'\]\[0\] of type object"),
        ("output rows", r"ValueError: Shuffled: output\['a'\]\[0\] has shape \(7, 2\), but 3 rows went in: it is not"),
        ("output number", r"ValueError: Shuffled: output\[0\] has shape \(\), but 3 rows went in"),
    ],
)
def test_mistakes_are_told_on_every_rank(told, mistake, words):
    for words_here in told:
        assert re.match(words, words_here[mistake], flags=re.DOTALL), words_here[mistake]


class _OtherWithoutRows(nn.Module):
    """Zeros of another dtype, or of another shape, where there are no rows."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if len(x):
            return x.double()
        return x.new_zeros(0, 3) if self.how == "dtype" else x.new_zeros(0, dtype=torch.float64)


def _outputs_differ(rank, world_size, how, late):
    head = Shuffled(_OtherWithoutRows(how), 2)
    if late:  # all ranks know an output with rows by now
        head(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"^Shuffled: .*output"):
        head(torch.ones(rank, 3))  # one row, which meets on the first rank
    return True


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["dtype", "shape"])
def test_an_empty_rank_whose_output_differs_from_the_others_is_told_on_all(how, late):
    assert run_ranks(_outputs_differ, 2, how, late, timeout=10) == [True, True]


# --- the ranks of a node ---


def _in_nodes(rank, world_size, nodes):
    os.environ["GROUP_RANK"] = str(nodes[rank])
    try:
        head = Shuffled(build_norm("BN", 1, dim=1), group="node")
        met, scopes = [], []
        head.module.register_forward_pre_hook(lambda module, args: met.extend(args[0][:, 0].tolist()))
        head.module.register_forward_pre_hook(lambda module, args: scopes.append(current_scope().base.num_groups))
        x = (torch.arange(6.0)[:, None] + 100 * nodes[rank] + 10 * rank).requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = head(x)
        (y * torch.arange(6.0)[:, None]).sum().backward()
        groups = head.module.last_groups
        return met, scopes, None if groups is None else groups.tolist(), y.detach(), x.grad
    finally:
        del os.environ["GROUP_RANK"]


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 1]], ids=str)
def test_rows_stay_on_their_node_and_a_node_of_one_rank_takes_virtual_groups(nodes):
    results = run_ranks(_in_nodes, len(nodes), nodes)
    for node in set(nodes):
        ranks = [rank for rank, other in enumerate(nodes) if other == node]
        home = [row + 100.0 * node + 10 * rank for rank in ranks for row in range(6)]
        met = [row for rank in ranks for row in results[rank][0]]
        assert sorted(met) == home
        # what one process with these rows would compute with two virtual groups
        twin = Shuffled(build_norm("BN", 1, dim=1), 2)
        x = torch.tensor(home)[:, None].requires_grad_(True)
        y = twin(x)
        (y * torch.arange(6.0).repeat(len(ranks))[:, None]).sum().backward()
        torch.testing.assert_close(torch.cat([results[rank][3] for rank in ranks]), y.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat([results[rank][4] for rank in ranks]), x.grad, rtol=0, atol=1e-5)
        for rank in ranks:
            _, scopes, groups, *_ = results[rank]
            if len(ranks) == 1:
                assert scopes == [2]
                assert sorted(groups) == [0, 0, 0, 1, 1, 1]
            else:
                assert scopes == [1]
                assert groups is None


def test_a_seed_beyond_64_bits_is_refused():
    with pytest.raises(ValueError, match="seed must fit in 64 bits"):
        Shuffled(nn.Identity(), 2, seed=2**63)(torch.zeros(4, 1))
