"""One process with k groups is k processes; shuffles are alike however they are done."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from leakfree.config import load_config
from leakfree.distributed import get_world_size
from leakfree.training.contrastive import ContrastiveTask
from tests.ranks import run_ranks

BASE = Path(__file__).parents[2] / "configs" / "contrastive" / "digits" / "base.yaml"
SMALL = ["trainer.total_batch_size=24", "model.queue_size=40", "schedule.max_steps=4", "optimizer.lr=0.1"]


class _Losses(torch.nn.Module):
    """What DDP wraps: Lightning wraps a module that owns the model likewise."""

    def __init__(self, task: ContrastiveTask) -> None:
        super().__init__()
        self.task, self.model = task, task.model

    def forward(self, batch: object) -> Tensor:
        return self.task.losses(batch)["loss_contrast"]  # type: ignore[arg-type]


def train(rank: int, world_size: int, overrides: list[str], ddp: bool = True) -> tuple[dict[str, Tensor], list[float]]:
    """Four steps in float64: final weights and buffers, and the losses of the joint batch."""
    torch.manual_seed(0)
    config = load_config(BASE, [*SMALL, *overrides])
    task = ContrastiveTask(config)  # type: ignore[arg-type]
    task.model.double()
    module: torch.nn.Module = _Losses(task)
    if dist.is_initialized() and ddp:
        module = DistributedDataParallel(module, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in task.model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for batch in task.train_batches(0):
        assert len(batch.query) == 24 // get_world_size()
        loss = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step()
        joint = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(joint)
            joint /= world_size
        losses.append(float(joint))
    return {name: value.clone() for name, value in task.model.state_dict().items()}, losses


CASES = [
    ("moco", "bn", "bn"),
    ("moco", "bn", "shuffle_bn"),
    ("moco", "bn", "shuffle_images"),
    ("moco", "bn", "loader_shuffle"),
    ("moco", "bn", "eman"),
    ("moco", "sync_bn", "eman"),
    ("moco", "bn", "sync_bn"),
    ("moco", "shuffle_bn", "ghost_bn"),
    ("moco", "gn", "gn"),
    ("simclr", "bn", "bn"),
    ("simclr", "bn", "shuffle_bn"),
    ("simclr", "shuffle_images", "loader_shuffle"),
    ("simclr", "sync_bn", "sync_bn"),
]


@pytest.mark.parametrize(
    ("method", "query", "key", "world_size"),
    [*((*case, 2) for case in CASES), *((*case, 3) for case in CASES if case[2] in ("loader_shuffle", "eman"))],
)
def test_ranks_train_as_one_process_with_groups(method: str, query: str, key: str, world_size: int) -> None:
    words = [f"model.method={method}", f"model.query={query}", f"model.key={key}", "model.images_per_group=4"]
    words += ["model.norm_options.group_size=4"] if key == "ghost_bn" else []
    words += ["model.norm_options.num_groups=8"] if key == "gn" else []
    words += ["model.momentum=0.9"] if method == "moco" else []
    alone, losses = train(0, 1, words)
    ranks = run_ranks(train, world_size, words)
    assert len(set(losses)) == 4  # it trains
    for state, theirs in ranks:
        assert theirs == pytest.approx(losses, rel=1e-9)
        for name, value in alone.items():
            # running averages of BN are each rank's own
            if "running" not in name or "eman" in key:
                assert torch.allclose(state[name].double(), value.double(), rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_shuffles_are_one_remedy(world_size: int) -> None:
    found = []
    for key in ("shuffle_bn", "shuffle_images", "loader_shuffle"):
        words = ["model.method=moco", f"model.key={key}", "model.images_per_group=4"]
        found.append(train(0, 1, words) if world_size == 1 else run_ranks(train, world_size, words)[0])
    for state, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-9)
        for name, value in found[0][0].items():
            if "key." not in name or "running" not in name:
                assert torch.allclose(state[name].double(), value.double(), rtol=1e-7, atol=1e-9), name
    leaky = train(0, 1, ["model.key=bn", "model.images_per_group=4"])
    assert leaky[1][0] != pytest.approx(found[0][1][0], rel=1e-6)  # the check can fail
