"""Shuffled heads under DistributedDataParallel: the training of one process on the batch of all ranks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leakfree.norms import build_norm, normalization_scope
from leakfree.partition import Partition
from leakfree.shuffle import Shuffled, batch_shuffle, batch_unshuffle
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:batch_shuffle over one rank")

_STEPS = 4


def _head() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6), build_norm("BN", 6, dim=1), nn.ReLU(), nn.Linear(6, 5), build_norm("BN", 5, dim=1)
    )


class _Model(nn.Module):
    """backbone -> shuffled head, with a skip connection around it; returns (head's output, backbone's features)."""

    def __init__(self, how: str, num_groups: int, *, alone: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.num_groups, self.alone = how, num_groups, alone
        self.backbone = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        head = _head()
        self.head = Shuffled(head, num_groups, seed=3) if how == "wrapper" else head
        self.last = nn.Linear(5, 2)
        self.generator = torch.Generator().manual_seed(1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x)
        if self.how == "wrapper":
            out = self.head(features)
        else:
            met, ticket = batch_shuffle(features, generator=self.generator)
            # what meets on a rank is a range of the permuted rows: in one process, a group of them
            ranges = torch.arange(len(met)) * self.num_groups // max(len(met), 1)
            with normalization_scope(Partition(ranges, self.num_groups)) if self.alone else nullcontext():
                out = batch_unshuffle(self.head(met), ticket)
        return self.last(features + out), features


def _batch(step: int, total: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(total, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(total, 2, dtype=torch.float64, generator=generator)


def _loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Two losses, summed over the rows: on what the head returned, and on the features before it."""
    out, features = model(x)
    return (out - target).square().sum() + 0.3 * (features.sin() * features).sum()


def _train(
    rank: int, world_size: int, sizes: tuple[int, ...], how: str, num_groups: int, accumulate: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The parameters after some steps of SGD, and the ranks' losses; world size 1 is the plain model."""
    total = sum(sizes)
    model = _Model(how, num_groups, alone=world_size == 1)
    wrapped = model if world_size == 1 else DistributedDataParallel(model, bucket_cap_mb=1e-4)  # several buckets
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(_STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, target = (each.split(sizes)[rank] for each in _batch(step * accumulate + part, total))
            last = part == accumulate - 1
            with nullcontext() if last or world_size == 1 else wrapped.no_sync():
                loss = _loss(wrapped, x, target) / total
                (loss * world_size).backward()  # DDP averages over the ranks; the one process sums over all rows
            losses.append(float(loss.detach()))
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}, losses


@pytest.mark.parametrize("accumulate", [1, 2], ids=["each step", "no_sync"])
@pytest.mark.parametrize("how", ["wrapper", "by hand"])
@pytest.mark.parametrize("sizes", [(6, 5), (8, 0), (5, 0, 4), (1, 2, 8)], ids=str)
def test_training_on_ranks_is_training_in_one_process(sizes, how, accumulate):
    num_groups = len(sizes)
    one, losses = _train(0, 1, (sum(sizes),), how, num_groups, accumulate)
    start = dict(_Model(how, num_groups, alone=True).named_parameters())
    ranks = run_ranks(_train, len(sizes), sizes, how, num_groups, accumulate)
    for parameters, _ in ranks:
        for name, value in parameters.items():
            torch.testing.assert_close(
                value, one[name], rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert [sum(parts) for parts in zip(*(mine for _, mine in ranks), strict=True)] == pytest.approx(losses, abs=1e-9)
    for name, value in one.items():
        if value.ndim == 2:
            assert (value - start[name]).abs().max() > 1e-3, f"{name} was not trained"


def test_more_groups_than_ranks_train_alike_too():
    one, _ = _train(0, 1, (14,), "wrapper", 5, 1)
    for parameters, _ in run_ranks(_train, 2, (5, 9), "wrapper", 5, 1):
        for name, value in parameters.items():
            torch.testing.assert_close(value, one[name], rtol=0, atol=1e-9)


def test_the_shuffle_matters_to_this_training():
    """What the tests above compare depends on who meets whom: with other groups the parameters differ."""
    one, _ = _train(0, 1, (11,), "wrapper", 2, 1)
    with pytest.warns(UserWarning, match="a single group"):
        other, _ = _train(0, 1, (11,), "wrapper", 1, 1)
    assert max((one[name] - other[name]).abs().max() for name in one) > 1e-3


class _Blocked(nn.Module):
    """A head that is not run for no rows, under DDP that looks for unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 3).double()
        self.head = Shuffled(_Guarded())

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        return self.head(features) + features


class _Guarded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if len(x) else x.new_zeros(0, 3)


def _blocked(rank: int, world_size: int, sizes: tuple[int, ...]) -> list[Tensor]:
    model = _Blocked()
    wrapped = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    x = _batch(0, sum(sizes))[0].split(sizes)[rank]
    (wrapped(x).square().sum() * world_size).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1), (0, 2, 0)], ids=str)
def test_a_head_that_skips_ranks_without_rows_trains_under_ddp(sizes):
    one = _blocked(0, 1, (sum(sizes),))
    for mine in run_ranks(_blocked, len(sizes), sizes, timeout=10):
        for left, right in zip(mine, one, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
