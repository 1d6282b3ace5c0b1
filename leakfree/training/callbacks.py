"""The moments of a training at which something else happens: rows, evaluations, checkpoints, in this order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.plugins.io import CheckpointIO

from leakfree.config.schema import TrainerConfig
from leakfree.distributed import get_rank
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

__all__ = ["AtomicCheckpoints", "Moments"]


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
