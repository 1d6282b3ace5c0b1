"""The moments of a training at which something else happens: rows, evaluations, checkpoints, in this order.

And callbacks for any Lightning training of yours: the schedules of ``leakfree.schedules``, Double-Forward.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from leakfree.config.schema import TrainerConfig
from leakfree.distributed import get_rank
from leakfree.errors import ConfigError
from leakfree.input_moments import default_forward
from leakfree.norms.memorized import double_forward
from leakfree.schedules import BurnInSchedule, FreezeBN, RenormSchedule
from leakfree.training.buffers import pooled_statistics
from leakfree.training.checkpoints import (
    FINAL,
    checkpoint_name,
    point_to,
    read_checkpoint,
    remove_old,
    write_checkpoint,
)
from leakfree.training.journal import Journal
from leakfree.training.logs import LOG, StepBar, track
from leakfree.training.module import TrainingModule
from leakfree.training.watchdog import progress

__all__ = ["AtomicCheckpoints", "DoubleForwardCallback", "FreezeBNCallback", "Moments", "ScheduleCallback"]


class AtomicCheckpoints(CheckpointIO):
    """Lightning's checkpoints through :mod:`leakfree.training.checkpoints`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Moments(L.Callback):
    """After each step: the journal's row, then an evaluation if one is due, then a checkpoint if one is due.

    In this order, because rows after a checkpoint are dropped when training goes on from it.

    Args:
        saved: called on rank 0 with the number of steps that a checkpoint holds.
    """

    def __init__(
        self, folder: Path, trainer: TrainerConfig, journal: Journal, bar: StepBar, saved: Callable[[int], None]
    ) -> None:
        self.folder = folder
        self.config = trainer
        self.journal = journal
        self.bar = bar
        self.saved = saved
        self._lr = 0.0
        self._on_terminate = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        # Lightning's handler talks to the other ranks from inside the signal, which can hang for ever.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_terminate)
        self.bar.start()
        self.journal.waiting()

    def on_train_batch_start(self, trainer: L.Trainer, module: TrainingModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.journal.fetched()
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # of this step: the scheduler moves on before it ends

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: TrainingModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        self.journal.stepped(step, module.losses, self._lr)
        self.bar.show(step, module.losses["loss"])
        if self.config.eval_period and step % self.config.eval_period == 0 and not last:
            self._validate(module, step)
        if last or step % self.config.checkpoint_period == 0:
            self._save(trainer, module, step, FINAL if last else checkpoint_name(step))
        self.journal.waiting()
        progress("the end of training" if last else f"step {step + 1}", slow=last)

    def _validate(self, module: TrainingModule, step: int) -> None:
        self.bar.stop()  # the evaluation shows its own
        with pooled_statistics(module.model):
            metrics = module.task.validate(track)
        self.bar.start()
        self.journal.write({"step": step, **metrics})
        if get_rank() == 0:
            numbers = "  ".join(f"{name}: {value:.4f}" for name, value in metrics.items() if value is not None)
            LOG.info("step: %d/%d  %s", step, self.journal.max_steps, numbers)

    def _save(self, trainer: L.Trainer, module: TrainingModule, step: int, name: str) -> None:
        progress(f"saving step {step}", slow=True)
        module.seconds += self.journal.seconds
        self.journal.seconds = 0.0
        trainer.save_checkpoint(self.folder / name)
        if get_rank() == 0:
            point_to(self.folder / name)
            remove_old(self.folder, self.config.keep_checkpoints)
            self.saved(step)
            LOG.info("saved %s", self.folder / name)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.bar.stop()


# ------------------------------------------------------------------------------- for any Lightning training


class ScheduleCallback(L.Callback):
    """Steps a schedule of ``leakfree.schedules`` before each update, and keeps its state in Lightning's checkpoints.

    The length of the run and of an epoch are the trainer's. For automatic optimization. With
    ``accumulate_grad_batches=k`` give a ramp's schedule ``forwards_per_step=k``.

    Raises:
        ConfigError: the trainer has neither ``max_steps`` nor ``max_epochs``.

    Example:
        >>> Trainer(max_epochs=12, callbacks=[ScheduleCallback(RenormSchedule())])        # doctest: +SKIP
    """

    def __init__(self, schedule: FreezeBN | RenormSchedule | BurnInSchedule) -> None:
        self.schedule = schedule

    @property
    def state_key(self) -> str:
        return self._generate_state_key(schedule=type(self.schedule).__name__, where=self.schedule.where)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        max_steps = trainer.estimated_stepping_batches
        if math.isinf(max_steps):
            raise ConfigError(f"{type(self).__name__}: the trainer needs max_steps or max_epochs")
        batches = trainer.num_training_batches
        epoch = None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
        self._step(module, trainer.global_step, int(max_steps), epoch)

    def _step(self, module: L.LightningModule, step: int, max_steps: int, steps_per_epoch: int | None) -> None:
        self.schedule.step(module, step, max_steps, steps_per_epoch=steps_per_epoch)


class FreezeBNCallback(ScheduleCallback):
    """Freezes batch norms at a point of training, see :class:`leakfree.schedules.FreezeBN`.

    Args:
        freeze: when and which.
        before: called with the LightningModule just before it is frozen, once in a run: the place for
            ``precise_bn``. It must not move the training's own data loader on.

    Example:
        >>> callback = FreezeBNCallback(                                                  # doctest: +SKIP
        ...     FreezeBN(at=Epochs(80)), before=lambda module: precise_bn(module, loader)
        ... )
    """

    def __init__(self, freeze: FreezeBN, *, before: Callable[[torch.nn.Module], object] | None = None) -> None:
        super().__init__(freeze)
        self.freeze = freeze
        self.before = before

    def _step(self, module: L.LightningModule, step: int, max_steps: int, steps_per_epoch: int | None) -> None:
        self.freeze.step(module, step, max_steps, steps_per_epoch=steps_per_epoch, before=self.before)


class DoubleForwardCallback(L.Callback):
    """Runs each batch a second time after its update, for MBN: see :func:`leakfree.norms.memorized.double_forward`.

    Left out where no MBN layer is in training mode any more. One more forward per step, without gradients, in the
    trainer's precision.

    Args:
        forward: called as ``forward(module, batch)``; by default the module gets the batch if it is a tensor, the first
            item of a tuple or list, or a dict as keyword arguments. Only what runs the layers matters.

    Raises:
        ConfigError: gradients are accumulated: a memory's newest entry is that of one batch.
    """

    def __init__(self, forward: Callable[[torch.nn.Module, Any], object] = default_forward) -> None:
        self.forward = forward

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"DoubleForwardCallback: accumulate_grad_batches is {trainer.accumulate_grad_batches}, but of the "
                "batches of one update only the last could be run again; use 1"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with double_forward(module) as layers, trainer.precision_plugin.forward_context():
            if layers:
                self.forward(module, batch)
