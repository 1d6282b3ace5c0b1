"""The losses against lightly's, and over ranks against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leakfree.contrastive import nt_xent, queue_info_nce
from tests.ranks import run_ranks


def features(count: int, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, two = (F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)) for _ in range(2))
    return one.requires_grad_(), two.requires_grad_()


def directions(size: int, width: int = 7, seed: int = 9) -> Tensor:
    return F.normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


# ------------------------------------------------------------------------------------ against lightly


@given(st.integers(2, 12), st.sampled_from([0.07, 0.5, 1.0]), st.integers(0, 99))
def test_nt_xent_is_lightly_s(count: int, temperature: float, seed: int) -> None:
    ours, theirs = features(count, seed=seed), features(count, seed=seed)
    units = [F.normalize(x) for x in ours]  # lightly does it inside
    found, expected = nt_xent(*units, temperature), NTXentLoss(temperature)(*theirs)
    assert found.loss.dtype == torch.float64
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(found.loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.keys, units[1])
    assert not found.keys.requires_grad


@given(st.integers(1, 12), st.integers(13, 30), st.sampled_from([0.07, 0.2]), st.integers(0, 99))
def test_queue_info_nce_is_lightly_s(count: int, size: int, temperature: float, seed: int) -> None:
    (queries, keys), (others, positives) = features(count, seed=seed), features(count, seed=seed)
    queue = directions(size, seed=seed + 1)
    lightly = NTXentLoss(temperature, memory_bank_size=(size, 7))
    lightly.memory_bank.bank = queue.clone()
    found = queue_info_nce(F.normalize(queries), keys, queue, temperature)
    expected = lightly(others, positives.detach())
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    mine, other = (torch.autograd.grad(loss, x)[0] for loss, x in ((found.loss, queries), (expected, others)))
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    one, two = features(4)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3).loss, (one, two))
    assert torch.autograd.gradcheck(lambda a: queue_info_nce(a, two, directions(5), 0.3).loss, (one,))


def test_no_gradient_reaches_moco_s_keys() -> None:
    queries, keys = features(4)
    loss = queue_info_nce(queries, keys, directions(5), 0.2).loss
    assert torch.autograd.grad(loss, [queries, keys], allow_unused=True)[1] is None


# ------------------------------------------------------------------------------------------ by hand


def test_values_and_accuracy_by_hand() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    # both positives are found: similarities 1 against 0, 0
    found = nt_xent(axes[:2], axes[:2], 0.5)
    assert float(found.loss) == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert float(found.accuracy) == 1.0
    # the keys are those of the other image
    swapped = nt_xent(axes[:2], axes[:2].flip(0), 0.5)
    assert float(swapped.loss) == pytest.approx(math.log(2 + math.exp(2)))
    assert float(swapped.accuracy) == 0.0
    # one query of two finds its key: the other's is as far as the queue is near
    found = queue_info_nce(axes[:2], axes[[0, 2]], axes[1:2], 1.0)
    assert float(found.loss) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2)
    assert float(found.accuracy) == 0.5
    assert torch.equal(found.keys, axes[[0, 2]])


def test_a_colder_temperature_is_larger_similarities() -> None:
    one, two = (x.detach() for x in features(5))
    by_hand = [math.sqrt(4.0) * x for x in (one, two)]  # similarities x 4
    assert float(nt_xent(one, two, 0.25).loss) == pytest.approx(float(nt_xent(*by_hand, 1.0).loss))
    assert float(nt_xent(one, two, 0.25).loss) != pytest.approx(float(nt_xent(one, two, 1.0).loss))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_that_of_the_features(dtype: torch.dtype) -> None:
    one, two = (x.detach().to(dtype) for x in features(16))
    queue = directions(20).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(one, two, 0.07), queue_info_nce(one, two, queue, 0.07)
    outside = nt_xent(one.float(), two.float(), 0.07), queue_info_nce(one.float(), two.float(), queue, 0.07)
    for mine, other in zip(inside, outside, strict=True):
        assert mine.loss.dtype == torch.float32
        assert torch.equal(mine.loss, other.loss)
        assert torch.equal(mine.accuracy, other.accuracy)


# ---------------------------------------------------------------------------------------- over ranks


class Pair(nn.Module):
    """Both views through one network, and a loss: what DDP wraps."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7)).double()
        with torch.no_grad():
            for item in self.net.parameters():
                item.copy_(torch.randn(item.shape, generator=generator, dtype=torch.float64))
        self.loss = loss

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        queries, keys = F.normalize(self.net(one)), F.normalize(self.net(two))
        if self.loss == "nt_xent":
            return nt_xent(queries, keys, 0.3).loss
        return queue_info_nce(queries, keys, directions(9), 0.3).loss


def gradients(rank: int, world_size: int, loss: str, sizes: list[int], ddp: bool) -> tuple[float, list[Tensor]]:
    """The loss of the joint batch, and its gradients, of a rank that holds ``sizes[rank]`` of the images."""
    one, two = (x.detach()[:, :5] for x in features(sum(sizes)))
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    pair = Pair(loss)
    module = DistributedDataParallel(pair) if ddp else pair
    value = module(one[rows], two[rows])
    value.backward()
    found, joint = [item.grad for item in pair.parameters()], value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(joint)
        joint /= world_size
        if not ddp:
            for item in found:
                dist.all_reduce(item)
                item /= world_size  # as DDP does
    return float(joint), found  # type: ignore[return-value]


@pytest.mark.parametrize("loss", ["nt_xent", "queue_info_nce"])
@pytest.mark.parametrize("sizes", [[4, 4], [5, 2], [0, 6], [3, 0, 4], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "by hand"])
def test_ranks_are_one_process(loss: str, sizes: list[int], ddp: bool) -> None:
    value, expected = gradients(0, 1, loss, [sum(sizes)], False)
    assert all(item.abs().max() > 1e-3 for item in expected)
    for theirs, found in run_ranks(gradients, len(sizes), loss, sizes, ddp):
        assert theirs == pytest.approx(value, rel=1e-12)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def keys_and_accuracy(rank: int, world_size: int, sizes: list[int]) -> tuple[Tensor, float]:
    one, two = (x.detach() for x in features(sum(sizes), width=2, seed=5))
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = nt_xent(one[rows], two[rows], 0.3)
    return found.keys, float(found.accuracy) * sizes[rank]


def test_every_rank_gets_all_keys_and_its_own_accuracy() -> None:
    keys, hits = keys_and_accuracy(0, 1, [9])
    assert 0 < hits < 9
    found = run_ranks(keys_and_accuracy, 2, [7, 2])
    assert all(torch.equal(theirs, keys) for theirs, _ in found)
    assert sum(own for _, own in found) == pytest.approx(hits)
