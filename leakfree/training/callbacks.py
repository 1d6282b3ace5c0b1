"""The moments of a training at which something else happens: rows, evaluations, checkpoints, in this order.

And callbacks for any Lightning training of yours: the schedules of ``leakfree.schedules``, Double-Forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from leakfree.config.schema import TrainerConfig
from leakfree.distributed import broadcast_object, get_rank
from leakfree.errors import ConfigError, LeakfreeError
from leakfree.input_moments import default_forward
from leakfree.norms.memorized import double_forward
from leakfree.schedules import BurnInSchedule, FreezeBN, RenormSchedule
from leakfree.training.agreement import Agreement
from leakfree.training.buffers import pooled_statistics
from leakfree.training.checkpoints import FINAL, checkpoint_name
from leakfree.training.journal import Journal
from leakfree.training.logs import LOG, StepBar
from leakfree.training.module import TrainingModule, seed_step
from leakfree.training.saving import BackgroundCheckpoints
from leakfree.training.stopping import StopAsked, Stopped, what_is_saved
from leakfree.training.watchdog import progress

__all__ = ["DoubleForwardCallback", "FreezeBNCallback", "Moments", "ScheduleCallback"]


class Moments(L.Callback):
    """After each step: the journal's row, then a checkpoint if one is due, then an evaluation if one is due.

    In this order, because rows after a checkpoint are dropped when training goes on from it, and an evaluation can be
    long: one that did not come to its row is done first when training goes on.

    After a signal to any rank all save the same step, and raise Stopped.

    Args:
        checkpoints: the trainer's; they are on disk some time after the step that saved them: see
            :meth:`saved_to_disk`.
        validate_first: the evaluation after the last step of the session before is still to do.
    """

    def __init__(
        self,
        folder: Path,
        trainer: TrainerConfig,
        journal: Journal,
        bar: StepBar,
        agreement: Agreement,
        checkpoints: BackgroundCheckpoints,
        *,
        validate_first: bool,
    ) -> None:
        self.folder = folder
        self.config = trainer
        self.journal = journal
        self.bar = bar
        self.agreement = agreement
        self.checkpoints = checkpoints
        self.validate_first = validate_first
        self._lr = 0.0
        self._first = True

    def state_dict(self) -> dict[str, Any]:
        return self.journal.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.journal.load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        self.agreement.meet()  # for signals that came while it was loading
        self.bar.start()
        self.journal.waiting()

    def on_train_batch_start(self, trainer: L.Trainer, module: TrainingModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.validate_first:  # here, since each rank has its own statistics only now
            self.validate_first = False
            self._validate(module, trainer.global_step)
            self.journal.waiting()
        self.journal.fetched()
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # of this step: the scheduler moves on before it ends

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: torch.Tensor) -> None:
        self.agreement.before_exchange(trainer.global_step + 1)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: TrainingModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.checkpoints.check()
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        self.journal.stepped(step, module.losses, self._lr)
        self.bar.show(step, module.losses["loss"])
        signal_name = self.agreement.after_step(step)
        saved = last or step % self.config.checkpoint_period == 0 or bool(signal_name)
        if saved:
            self._save(trainer, module, step, FINAL if last else checkpoint_name(step))
        elif self._first and get_rank() == 0:
            self.checkpoints.prepare(_tensors_of(trainer, module))  # optimizers have their state by now
        self._first = False
        if signal_name:
            raise self._stopped(signal_name, trainer)
        if self.config.eval_period and step % self.config.eval_period == 0 and not last:
            try:
                self._validate(module, step)
            except StopAsked as stop:
                if not saved:
                    self._save(trainer, module, step, checkpoint_name(step))
                raise self._stopped(stop.signal_name, trainer) from None
        self.journal.waiting()
        progress("the end of training" if last else f"step {step + 1}", slow=last)

    def _stopped(self, signal_name: str, trainer: L.Trainer) -> Stopped:
        """Once what was saved is on disk, on every rank."""
        self.saved_to_disk()
        return Stopped(signal_name, what_is_saved(trainer.global_step, trainer.max_steps, self.folder))

    def _validate(self, module: TrainingModule, step: int) -> None:
        self.bar.stop()  # the evaluation shows its own
        seed_step(module.config.seed, step, get_rank())  # whether this session has done the step or not
        with pooled_statistics(module.model):
            metrics = module.task.validate(self.agreement.track)
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

    def saved_to_disk(self) -> None:
        """Wait, on every rank, until what was saved last is on disk. Every rank calls it.

        Raises:
            RunError: it could not be written.
        """
        failure: LeakfreeError | None = None
        try:
            self.checkpoints.saved_to_disk()
        except LeakfreeError as error:
            failure = error
        failure = broadcast_object(failure)  # rank 0 is the one that writes
        if failure is not None:
            raise failure

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar.stop()
        self.saved_to_disk()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.bar.stop()


def _tensors_of(trainer: L.Trainer, module: TrainingModule) -> Iterator[torch.Tensor]:
    """The bulk of what a checkpoint holds."""
    yield from module.state_dict().values()
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (item for item in state.values() if isinstance(item, torch.Tensor))


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
