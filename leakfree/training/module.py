"""The training step as a Lightning module: losses, optimizer, schedule, frozen batch norms, checkpoint content."""

from __future__ import annotations

import inspect
import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn

from leakfree import __version__
from leakfree.config import config_to_dict
from leakfree.config.schema import OptimizerConfig, RunConfig, ScheduleConfig
from leakfree.distributed import get_rank, get_world_size
from leakfree.errors import CheckpointError, ConfigError, RunError
from leakfree.norms import NORMS, ProxyNorm
from leakfree.schedules import Epochs, FreezeBN, Point, freeze_step, lr_factor
from leakfree.state import load_buffers
from leakfree.training.buffers import buffers_of_rank, differing_buffers, pool_statistics, pooled_values
from leakfree.training.entry import FORMAT, training_entry
from leakfree.training.logs import LOG
from leakfree.training.tasks import Task
from leakfree.training.watchdog import progress

__all__ = ["TrainingModule", "build_optimizer", "freeze_as_trained", "seed_step"]

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class TrainingModule(L.LightningModule):
    """Trains the model of a task.

    Every step draws its randomness from (seed, step, rank) alone, so a resumed run is the
    uninterrupted one.

    Attributes:
        losses: of the last step, without graph, and the task's monitors.
        seconds: spent in training steps before this session.
        began: what a checkpoint holds is restored, and steps follow.
    """

    def __init__(self, task: Task, config: RunConfig) -> None:
        super().__init__()
        self.task = task
        self.config = config
        self.model = task.model
        self.losses: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.began = False
        self._own_buffers: dict[str, Tensor] = {}
        self.freeze_bn = FreezeBN(at=_freeze_point(config.schedule))
        self._steps_per_epoch = task.num_train_images() / config.trainer.total_batch_size
        self._check_freezing()

    def _check_freezing(self) -> None:
        schedule, at = self.config.schedule, self.freeze_bn.at
        step = freeze_step(at, schedule.max_steps, self._steps_per_epoch)
        known = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        if step is not None and not known:
            raise ConfigError(
                f"schedule.freeze_bn_at: is {schedule.freeze_bn_at:g} ({schedule.freeze_bn_unit}), but the model has "
                "no batch norm to freeze; use 1 as a share (never), or a batch norm"
            )
        if step is None and isinstance(at, Epochs) and get_rank() == 0:
            LOG.warning(
                "schedule.freeze_bn_at: has no effect: the run ends after %.4g epochs, before epoch %g",
                schedule.max_steps / self._steps_per_epoch,
                at.number,
            )

    # ------------------------------------------------------------------------------------- a step

    def on_train_start(self) -> None:
        # Not with the rest of the checkpoint: DDP copies rank 0's buffers to all ranks when it wraps the model.
        load_buffers(self.model, self._own_buffers)
        self.began = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.config.seed, self.global_step, get_rank())
        precise = self.config.schedule.freeze_bn_statistics == "precise"
        self.freeze_bn.step(
            self.model,
            self.global_step,
            self.config.schedule.max_steps,
            steps_per_epoch=self._steps_per_epoch,
            before=self._estimate if precise else pool_statistics,
        )

    def _estimate(self, _: nn.Module) -> None:
        progress(f"estimating the statistics to freeze at step {self.global_step}", slow=True)
        self.task.estimate_statistics()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.task.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.losses = {"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}
        if not torch.isfinite(total):
            raise RunError(self._not_finite())
        self.losses |= {name: value.detach().to(total) for name, value in self.task.monitors().items()}
        return total

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        self.task.after_step()  # here, so that it is done when callbacks save a checkpoint

    def _not_finite(self) -> str:
        bad = [f"{name} is {value.item()}" for name, value in self.losses.items() if not torch.isfinite(value)]
        rank = f" on rank {get_rank()}" if get_world_size() > 1 else ""
        parts = [text for text in bad if not text.startswith("loss ")] or bad
        return (
            f"training diverged at step {self.global_step}{rank}: {', '.join(parts)}; the weights of the last "
            f"checkpoint are intact. Lower optimizer.lr (now {self.config.optimizer.lr}), lengthen "
            "schedule.warmup_steps, or set optimizer.clip_gradients"
        )

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optimizer)
        schedule = self.config.schedule

        def factor(step: int) -> float:
            return lr_factor(
                step,
                max_steps=schedule.max_steps,
                warmup_steps=schedule.warmup_steps,
                warmup_factor=schedule.warmup_factor,
                decay=schedule.decay,
                milestones=schedule.milestones,
                gamma=schedule.gamma,
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Pooled statistics for whoever reads the weights; each rank's own beside them, for the resume."""
        pooled = pooled_values(self.model)
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: pooled.get(name.removeprefix("model."), value) for name, value in state}
        checkpoint["leakfree"] = {
            "format": FORMAT,
            "version": __version__,
            "step": self.global_step,
            "seconds": self.seconds,
            "world_size": get_world_size(),
            "freeze_bn": self.freeze_bn.state_dict(),
            "rank_buffers": differing_buffers(self.model, pooled),
            "config": config_to_dict(self.config),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = training_entry(checkpoint)
        if state is None:
            raise CheckpointError("the checkpoint to resume from was not written by a leakfree training")
        self.freeze_bn.load_state_dict(state["freeze_bn"])
        self.seconds = state["seconds"]
        self._own_buffers = buffers_of_rank(state["rank_buffers"], get_rank(), get_world_size())


def _freeze_point(schedule: ScheduleConfig) -> Point:
    at, unit = float(schedule.freeze_bn_at), schedule.freeze_bn_unit
    return Epochs(at) if unit == "epoch" else int(at) if unit == "step" else at


def freeze_as_trained(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Freeze the batch norms that were frozen when ``checkpoint`` was written; weights of others freeze none."""
    entry = training_entry(checkpoint)
    state = {"frozen_at": None} if entry is None else entry["freeze_bn"]
    if state["frozen_at"] is not None:
        freeze = FreezeBN(at=0)
        freeze.load_state_dict(state)
        freeze.step(model, state["frozen_at"], state["frozen_at"] + 1)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, numpy and torch (all devices) for one step of one rank."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD, AdamW or LARS over the trainable parameters; those of norm layers have a weight decay of their own.

    A norm that has ``proxy_parameters`` gives the decay of the weights to these and none to its others (Labatie et
    al. 2021).

    Raises:
        ConfigError: everything is frozen.
    """
    norms = (*_NORM_LAYERS, *(norm for _, norm in NORMS if inspect.isclass(norm)))
    decay: dict[int, float] = {}
    for module in model.modules():
        if not isinstance(module, norms):
            continue
        proxies = {id(item) for item in module.proxy_parameters()} if isinstance(module, ProxyNorm) else None
        for item in module.parameters(recurse=False):
            if proxies is None:
                decay[id(item)] = config.weight_decay_norm
            else:
                decay[id(item)] = config.weight_decay if id(item) in proxies else 0.0
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("model.freeze: every weight is frozen, there is nothing to train")
    parts = [  # as many as there were before ProxyNorm, where it is not used: optimizers' states are by group
        (config.weight_decay, [item for item in trainable if id(item) not in decay]),
        *((of, [item for item in trainable if decay.get(id(item)) == of]) for of in dict.fromkeys(decay.values())),
    ]
    groups = [{"params": members, "weight_decay": of} for of, members in parts]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.name == "lars":
        from leakfree.contrastive.optimizers import lars  # takes seconds to import

        return lars(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
