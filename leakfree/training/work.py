"""What each rank does in a training and in an evaluation. Imports torch and Lightning: only ranks load it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from leakfree.config import config_to_dict, save_config
from leakfree.config.schema import RunConfig, ScheduleConfig
from leakfree.distributed import all_gather_objects, barrier, get_rank
from leakfree.errors import CheckpointError, ConfigError, LeakfreeError, RunError, one_line
from leakfree.leakage import check_config
from leakfree.norms import BatchRenorm, CrossIterationBatchNorm, MemorizedBatchNorm
from leakfree.records import RunRecord, read_record, write_record
from leakfree.schedules import BurnInSchedule, RenormSchedule
from leakfree.sealed import disk_is_full, read_checkpoint
from leakfree.training.agreement import Agreement
from leakfree.training.buffers import share_buffers
from leakfree.training.callbacks import DoubleForwardCallback, Moments, ScheduleCallback
from leakfree.training.checkpoints import Shelf
from leakfree.training.classification import ClassificationTask
from leakfree.training.conversion import Conversion, amended
from leakfree.training.detection import DetectionTask
from leakfree.training.endings import RankError
from leakfree.training.folder import Start
from leakfree.training.journal import Journal, peak_memory_mib, timing_of
from leakfree.training.lock import slurm_job
from leakfree.training.logs import LOG, StepBar, environment, first_lines, logging_to, result_lines
from leakfree.training.module import TrainingModule, freeze_as_trained, seed_step
from leakfree.training.ranks import RankPlan, threads_per_rank
from leakfree.training.saving import BackgroundCheckpoints
from leakfree.training.stopping import StopAsked, Stopped, what_is_saved
from leakfree.training.tasks import Task
from leakfree.training.watchdog import at_end, progress

__all__ = ["evaluate_on_rank", "train_on_rank"]


def _task(name: str) -> Callable[..., Task]:
    """The kind of run that ``config.task`` names."""
    if name == "contrastive":
        from leakfree.training.contrastive import ContrastiveTask  # its libraries take seconds to import

        return ContrastiveTask
    return {"classification": ClassificationTask, "detection": DetectionTask}[name]


def train_on_rank(config: RunConfig, plan: RankPlan, start: Start) -> None:
    """Train from ``start`` to the end, evaluate, and record it; every rank runs this."""
    config = amended(config, start.changes)
    with _session(config, plan, start, saved=start.step) as session:
        task = _build(config, *(("", ()) if start.weights else _initial_weights(config)))
        session.open(task, steps=start.step)
        module = TrainingModule(task, config)
        if start.step < config.schedule.max_steps:
            _fit(config, plan, start, session, module)
            task.model.to(session.device)  # Lightning has moved it to the CPU
            share_buffers(task.model)
        else:
            with _restoring(module, start.weights):
                checkpoint = read_checkpoint(start.weights)
                module.load_state_dict(checkpoint["state_dict"])
                _as_trained(task, config, checkpoint)
        session.saved = config.schedule.max_steps
        session.evaluate(task)
        session.close(task)


def evaluate_on_rank(config: RunConfig, plan: RankPlan, start: Start) -> None:
    """Evaluate the weights of ``start`` and record it; every rank runs this."""
    config = amended(config, start.changes)
    with _session(config, plan, start, saved=None) as session:
        task = _build(config, start.weights, ())  # the whole of it, whatever a training would start from
        try:
            _as_trained(task, config, read_checkpoint(start.weights))
        except CheckpointError as error:
            raise CheckpointError(f"{start.weights}: {error}") from error
        session.open(task, steps=None)
        session.evaluate(task)
        session.close(task)


def _as_trained(task: Task, config: RunConfig, checkpoint: dict[str, Any]) -> None:
    """Set what norms keep beside their buffers as it was when ``checkpoint`` was written: frozen, on their ramps."""
    freeze_as_trained(task.model, checkpoint)
    for callback in _norm_callbacks(task, config.schedule):
        if isinstance(callback, ScheduleCallback) and callback.state_key in checkpoint.get("callbacks", {}):
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
            callback.schedule.step(task.model, checkpoint["leakfree"]["step"], config.schedule.max_steps)


def _initial_weights(config: RunConfig) -> tuple[str, Sequence[str]]:
    """The checkpoint that a training starts from, and the parts it takes of it."""
    model: Any = getattr(config, "model", None)
    return str(getattr(model, "weights", "")), getattr(model, "weights_parts", ())


def _build(config: RunConfig, weights: str, parts: Sequence[str]) -> Task:
    progress("building the model and opening the data", slow=True)
    seed_step(config.seed, 0, 0)  # the same initial weights on every rank
    return _task(config.task)(config, weights, parts)


# -------------------------------------------------------------------------------------- session


@contextmanager
def _session(config: RunConfig, plan: RankPlan, start: Start, saved: int | None) -> Iterator[_Session]:
    """Threads, device, log and determinism of this rank, put back afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), os.environ.get("OMP_NUM_THREADS")
    threads = threads_per_rank(plan, config.trainer.num_threads)
    device = torch.device("cuda", torch.cuda.current_device()) if plan.gpus else torch.device("cpu")
    folder = Path(config.output_dir)
    with logging_to(folder, get_rank()):
        try:
            torch.set_num_threads(threads)
            # Where it is not set, Lightning overrules the line above, and waiting threads of several runs spin
            # against each other: a step took ten times as long.
            os.environ["OMP_NUM_THREADS"] = str(threads)
            if not plan.gpus:  # cheap there, and a resumed run is then the uninterrupted one bit for bit
                torch.use_deterministic_algorithms(True, warn_only=True)
            session = _Session(config, folder, device, threads, start, Agreement(ahead=int(plan.gpus)), saved)
            try:
                session.agreement.meet()  # before minutes go into reading data
                yield session
            except StopAsked as stop:
                raise session.stopped(stop) from None
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of GPU memory on rank {get_rank()}: {str(error).splitlines()[0]} Use a smaller "
                "trainer.total_batch_size, more GPUs, or trainer.precision=16-mixed"
            ) from error
        except Exception as error:
            if isinstance(error, LeakfreeError) or (full := disk_is_full(error)) is None:
                raise
            raise RunError(
                f"{folder}: cannot be written ({full.strerror}): make room, then continue with --resume"
            ) from error
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])
            if before[2] is None:
                os.environ.pop("OMP_NUM_THREADS", None)
            else:
                os.environ["OMP_NUM_THREADS"] = before[2]


@dataclass
class _Session:
    """One start of a run on this rank; rank 0 keeps the record.

    Attributes:
        saved: steps of the training that are on disk; None = this is an evaluation alone.
    """

    config: RunConfig
    folder: Path
    device: torch.device
    threads: int
    start: Start
    agreement: Agreement
    saved: int | None
    record: RunRecord | None = None

    def open(self, task: Task, steps: int | None) -> None:
        """Write the config and the record as they stand, and the head of the log, with what the config lets leak."""
        if get_rank() != 0:
            return
        known = (self.folder / "record.json").exists()
        found = environment(self.device, self.threads)
        warnings: list[str] = []
        if known and steps is None:
            self.record = read_record(self.folder)  # an evaluation adds to what is there; the config stays the run's
        else:
            earlier = read_record(self.folder) if known and steps else None
            conversions = [*(earlier.conversions if earlier else [])]
            if self.start.conversion is not None:
                conversions.append(self.start.conversion.to_dict())
            findings = check_config(self.config, found["world_size"])
            warnings = [str(finding) for finding in findings if finding.verdict != "safe"]
            self.record = RunRecord(
                name=self.folder.resolve().name,
                task=self.config.task,
                status="running",
                seed=self.config.seed,
                config=config_to_dict(self.config),
                environment=found,
                timing={**(earlier.timing if earlier else {}), "steps": steps},
                batch=task.describe_batch(found["world_size"]),
                notes=[*warnings, *(str(Conversion.from_dict(item)) for item in conversions)],
                sessions=[*self.start.sessions, self._session(found["world_size"])],
                conversions=conversions,
            )
            save_config(self.config, self.folder / "config.yaml")
            write_record(self.folder, self.record)
        batch = task.describe_batch(found["world_size"])
        for line in (*first_lines(found, batch, self.folder), *self.start.notices):
            (LOG.warning if "damaged" in line else LOG.info)("%s", line)
        converted = [str(self.start.conversion)] if self.start.conversion else []
        for line in (*converted, *warnings, *task.faults()):
            LOG.warning("%s", line)

    def _session(self, world_size: int) -> dict[str, Any]:
        return {
            "started": time.time(),
            "from_step": self.start.step,
            "host": socket.gethostname(),
            "job": slurm_job(),
            "world_size": world_size,
            "ended": "",
        }

    def note_steps(self, steps: int, seconds: float) -> None:
        """A checkpoint of ``steps`` steps, which took so long, is on disk."""
        assert self.record is not None
        self.record.timing |= timing_of(self.folder, steps, seconds)
        write_record(self.folder, self.record)

    def evaluate(self, task: Task) -> None:
        """Measure everything the config asks for; rank 0 adds it to the record."""
        task.model.to(self.device)
        progress("the evaluation", slow=True)
        began = time.perf_counter()
        found = task.evaluate(self.agreement.track)
        if self.record is not None:
            self.record.results |= found.results
            self.record.leakage |= found.leakage
            self.record.notes = list(dict.fromkeys([*self.record.notes, *found.notes]))
            self.record.timing["evaluation_seconds"] = time.perf_counter() - began
            self.record.timing.setdefault("peak_memory_mib", peak_memory_mib(self.device))

    def stopped(self, stop: StopAsked) -> Stopped:
        if self.saved is None:
            return Stopped(stop.signal_name, "nothing of this evaluation is recorded", "give the same command again")
        return Stopped(stop.signal_name, what_is_saved(self.saved, self.config.schedule.max_steps, self.folder))

    def close(self, task: Task) -> None:
        """Record the end, and show the results; all ranks leave together."""
        faults = [line for lines in all_gather_objects(task.faults()) for line in lines]
        if self.record is not None:
            if self.record.timing["steps"] in (None, self.config.schedule.max_steps):
                self.record.status = "finished"
                if self.record.timing["steps"] is not None and self.record.sessions:
                    self.record.sessions[-1]["ended"] = "finished"
            self.record.notes = list(dict.fromkeys([*self.record.notes, *faults]))
            write_record(self.folder, self.record)
            for line in (*result_lines(self.record), f"results: {self.folder / 'record.json'}"):
                LOG.info("%s", line)
        barrier()


# ------------------------------------------------------------------------------------- training


class _Steps:
    """The training batches as Lightning wants them to resume in the middle of its one epoch."""

    def __init__(self, task: Task, start_step: int, max_steps: int) -> None:
        self.task = task
        self.start_step = start_step
        self.max_steps = max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[Any]:
        return iter(self.task.train_batches(self.start_step))

    def state_dict(self) -> dict[str, Any]:
        return {}  # the step is all there is to know

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _fit(config: RunConfig, plan: RankPlan, start: Start, session: _Session, module: TrainingModule) -> None:
    journal = Journal(session.folder, config.trainer.log_period, config.schedule.max_steps, start.step, session.device)
    bar = StepBar(config.schedule.max_steps, start.step)
    checkpoints = BackgroundCheckpoints(Shelf(session.folder, config.trainer.keep_checkpoints), session.note_steps)
    moments = Moments(
        session.folder,
        config.trainer,
        journal,
        bar,
        session.agreement,
        checkpoints,
        validate_first=start.validate,
    )
    # before the moments: what a checkpoint holds must be complete
    trainer = _trainer(config, plan, [*_norm_callbacks(module.task, config.schedule), moments], checkpoints)
    batches = _Steps(module.task, start.step, config.schedule.max_steps)
    progress(f"step {start.step + 1}, the first of this session", slow=True)
    try:
        with (
            _interrupt_raised(),
            checkpoints,
            at_end(lambda _: checkpoints.saved_to_disk()),
            _restoring(module, start.weights),
        ):
            trainer.fit(module, train_dataloaders=batches, ckpt_path=start.weights or None, weights_only=True)
    finally:
        journal.close()
    assert trainer.global_step == config.schedule.max_steps, "the training ended early"


def _between_ranks(error: BaseException) -> bool:
    """Whether it came out of torch's collectives: a rank that is gone says nothing about a checkpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = ("torch/distributed/", "torch/nn/parallel/distributed.py")
    return bool(frames) and any(part in Path(frames[-1].filename).as_posix() for part in parts)


@contextmanager
def _restoring(module: TrainingModule, path: str) -> Iterator[None]:
    """A checkpoint that is whole may still hold what fits neither the model nor Lightning: told by its name, in a line.

    Raises:
        CheckpointError: in place of what the libraries raise for it, before the first step.
    """
    try:
        yield
    except CheckpointError as error:
        raise error if path in str(error) or module.began else CheckpointError(f"{path}: {error}") from error
    except (torch.OutOfMemoryError, torch.distributed.DistError, LeakfreeError, RankError, Stopped):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if module.began or not path or _between_ranks(error):
            raise
        raise CheckpointError(f"{path}: cannot be continued from: {type(error).__name__}: {one_line(error)}") from error


def _norm_callbacks(task: Task, schedule: ScheduleConfig) -> list[L.Callback]:
    """What the norms of the model want done around a step."""
    layers = list(task.model.modules())
    callbacks: list[L.Callback] = []
    if schedule.scale_ramps and any(isinstance(layer, BatchRenorm) for layer in layers):
        callbacks.append(ScheduleCallback(RenormSchedule()))
    if schedule.scale_ramps and any(isinstance(layer, CrossIterationBatchNorm) for layer in layers):
        callbacks.append(ScheduleCallback(BurnInSchedule(schedule.burn_in)))
    if schedule.double_forward:
        if not any(isinstance(layer, MemorizedBatchNorm) for layer in layers):
            raise ConfigError("schedule.double_forward: the model has no MBN, whose memory it keeps fresh; use false")
        callbacks.append(DoubleForwardCallback(forward=lambda _, batch: task.losses(batch)))
    return callbacks


@contextmanager
def _interrupt_raised() -> Iterator[None]:
    """Lightning turns Ctrl-C into exit code 1 and leaves the signal ignored; this gives both back."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


class _ReproducibleSums(DDPStrategy):
    """Sums gradients over ranks in an order that does not depend on when the session began.

    DDP packs the gradients of its first step otherwise than those after it, which it packs in the order in which that
    step's backward met them. Where in a pack a number lies decides the order in which three or more ranks add it up.
    Told an order beforehand, that of the parameters, DDP packs them so from the first step on. They are then sent when
    the backward is through: a GPU, where no run is exact to the bit, keeps sending during it.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        reducer: Any = self.model.reducer  # type: ignore[union-attr]
        reducer._push_all_rebuilt_params()


def _trainer(
    config: RunConfig, plan: RankPlan, callbacks: list[L.Callback], checkpoints: BackgroundCheckpoints
) -> L.Trainer:
    several = plan.world_size > 1
    strategy: Any = "auto"
    if several:
        # Buffers are each rank's own (leakfree.training.buffers). Every trainable parameter is reached on
        # every rank, also by ranks without RoIs, so DDP needs no search for unused ones.
        kind = _ReproducibleSums if plan.world_size > 2 and not plan.gpus else DDPStrategy
        strategy = kind(broadcast_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True)
    environment = TorchElasticEnvironment() if several else LightningEnvironment()
    local = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ and not several else None
    trainer = L.Trainer(
        accelerator="gpu" if plan.gpus else "cpu",
        devices=[local] if plan.gpus and local is not None else plan.local_size,
        num_nodes=plan.num_nodes,
        strategy=strategy,
        plugins=[environment, checkpoints],
        precision=config.trainer.precision,  # type: ignore[arg-type]
        max_steps=config.schedule.max_steps,
        max_epochs=-1,  # one epoch is the whole run
        gradient_clip_val=config.optimizer.clip_gradients or None,
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=config.output_dir,
    )
    # Lightning's handler of SIGTERM talks to the other ranks from inside the signal, which can hang for ever. Before
    # each step it broadcasts whether there was one, which waits for all ranks and hides that one is gone.
    # leakfree.training.agreement does all that is to be done.
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    return trainer


def _nothing() -> None:
    pass
