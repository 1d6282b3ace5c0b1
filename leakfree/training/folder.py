"""The output folder of a run: who may write into it, and where a run in it goes on.

Finished or half-finished work is never overwritten: a folder takes one run of one config, and one
process at a time. Torch-free: it runs before any rank starts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfree.config import config_to_dict, diff_configs
from leakfree.config.schema import RunConfig
from leakfree.errors import CheckpointError, RunError
from leakfree.records import RunRecord, read_metrics, read_record, write_atomic, write_record
from leakfree.training.checkpoints import FINAL, list_checkpoints, newest_valid

__all__ = ["Start", "interrupted_record", "locked", "start_of_evaluation", "start_of_training", "trained_step"]

# What may change between the sessions of one run: it does not reach the weights or the results.
_FREE = {
    "output_dir",
    "data.root",
    "data.num_workers",
    "trainer.num_machines",  # the number of ranks is compared by itself
    "trainer.num_gpus",
    "trainer.num_processes",
    "trainer.num_threads",
    "trainer.checkpoint_period",
    "trainer.keep_checkpoints",
    "trainer.log_period",
    "trainer.eval_period",
    "trainer.stuck_after",
}


# Names that records.atomic_file gives to files of ours before they are whole.
_HALF_WRITTEN = [
    f".{name}.*.tmp"
    for name in ("checkpoint_*.pt", FINAL, "last_checkpoint", "record.json", "config.yaml", "metrics.json")
]


@dataclass(frozen=True)
class Start:
    """Where a session begins.

    Attributes:
        step: completed steps.
        weights: checkpoint to go on from (training) or to evaluate; "" = fresh weights.
        finished: nothing is left to do.
        notices: what the user should read at the top of the log.
    """

    step: int = 0
    weights: str = ""
    finished: bool = False
    notices: tuple[str, ...] = ()


@contextmanager
def locked(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """Make the folder and hold it for this process; a second process is refused.

    The lock belongs to the process, not to its children, and the kernel drops it when the process dies.

    Raises:
        RunError: another process holds it, or it cannot be made or written.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"output_dir: {folder} cannot be used as an output folder ({error.strerror})") from None
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise RunError(
                    f"output_dir: {folder} cannot be locked ({error.strerror}); choose a file system with locks"
                ) from None
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            raise RunError(
                f"output_dir: another process (pid {holder or 'unknown'}) is writing to {folder}; "
                "wait for it, or choose another output_dir"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield folder
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------- training


def start_of_training(config: RunConfig, folder: Path, world_size: int, *, resume: bool) -> Start:
    """Decide where a training in ``folder`` begins, and clear what an interrupted write left behind.

    Raises:
        RunError: the folder holds other work, or this run's and ``resume`` was not asked for.
        CheckpointError: every checkpoint is damaged.
    """
    if not str(folder).isascii() and os.fsencode(folder).decode(errors="replace") != str(folder):
        raise RunError(f"output_dir: {folder} has bytes that are no UTF-8: TensorBoard cannot write there; rename it")
    for pattern in _HALF_WRITTEN:
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)
    record = _record_of(folder)
    has_work = bool(list_checkpoints(folder)) or (record is not None and record.status == "finished")
    if not has_work:
        _cut_metrics(folder, 0)
        notice = f"--resume: {folder} holds no checkpoint, starting from the beginning"
        return Start(notices=(notice,) if resume else ())
    if record is None:
        raise RunError(f"output_dir: {folder} holds checkpoints but no record.json; choose another output_dir")
    if not _is_training(record):
        raise RunError(f"output_dir: {folder} holds the results of an evaluation; choose another output_dir")
    _same_run(config, record, folder, world_size)
    if not resume:
        state = "finished" if record.status == "finished" else f"stopped, newest {list_checkpoints(folder)[0].name}"
        remedy = "" if record.status == "finished" else "add --resume to go on from there, or "
        raise RunError(f"output_dir: {folder} already holds this run ({state}); {remedy}choose another output_dir")
    if record.status == "finished":
        return Start(step=config.schedule.max_steps, finished=True, notices=(f"{folder}: this run is finished",))
    path, notices = newest_valid(folder)
    assert path is not None  # has_work
    step = trained_step(path, config)
    _cut_metrics(folder, step)
    return Start(step, str(path), notices=(*notices, f"continuing from {path} ({step} steps done)"))


def trained_step(path: Path, config: RunConfig) -> int:
    """The completed steps that the name of a checkpoint tells."""
    return config.schedule.max_steps if path.name == FINAL else int(path.stem.rpartition("_")[2])


def _record_of(folder: Path) -> RunRecord | None:
    return read_record(folder) if (folder / "record.json").exists() else None


def _is_training(record: RunRecord) -> bool:
    return record.timing.get("steps") is not None


def _same_run(config: RunConfig, record: RunRecord, folder: Path, world_size: int) -> None:
    differing = [item for item in diff_configs(record.config, config_to_dict(config)) if item[0] not in _FREE]
    if differing:
        raise RunError(
            f"output_dir: {folder} holds a run of another config: {_listed(differing)}; "
            "choose another output_dir, or go back to that config"
        )
    before = record.environment.get("world_size")
    if before is not None and before != world_size:
        raise RunError(
            f"output_dir: the run in {folder} was started on {before} ranks and cannot go on with {world_size}: "
            f"each rank would have {config.trainer.total_batch_size // world_size} images in place of "
            f"{config.trainer.total_batch_size // before}, which changes what shares batch statistics"
        )


def _listed(differing: list[tuple[str, Any, Any]], most: int = 6) -> str:
    shown = [f"{key} was {before!r}, now {now!r}" for key, before, now in differing[:most]]
    return "; ".join(shown) + (f"; and {len(differing) - most} more" if len(differing) > most else "")


def _cut_metrics(folder: Path, step: int) -> None:
    """Drop the rows after ``step``: they are about to be written again."""
    rows = read_metrics(folder)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if (folder / "metrics.json").exists():
        write_atomic(folder / "metrics.json", "".join(json.dumps(row) + "\n" for row in kept))


def interrupted_record(folder: Path) -> None:
    """Mark the record of a run that did not come to its end."""
    record = _record_of(folder)
    if record is not None and record.status == "running":
        record.status = "interrupted"
        write_record(folder, record)


# ------------------------------------------------------------------------------------ evaluation


def start_of_evaluation(config: RunConfig, folder: Path) -> Start:
    """Decide which weights an evaluation that writes to ``folder`` is of.

    ``model.weights``, unless the folder holds a training of this config: then its newest checkpoint, since
    ``model.weights`` is what that training started from.

    Raises:
        RunError: the folder holds another run.
        CheckpointError: there is nothing to evaluate.
    """
    asked = str(getattr(getattr(config, "model", None), "weights", ""))
    record = _record_of(folder)
    path, notices = newest_valid(folder)
    if record is None:
        if not asked:
            raise CheckpointError(
                f"model.weights: nothing to evaluate: it is empty, and output_dir {folder} holds no training"
            )
        return Start(weights=asked)
    differing = [item for item in diff_configs(record.config, config_to_dict(config)) if not _evaluation_key(item[0])]
    if differing:
        raise RunError(
            f"output_dir: {folder} holds a run of another config: {_listed(differing)}; choose another output_dir "
            f"(and name the checkpoint in model.weights)"
        )
    own = str(record.config.get("model", {}).get("weights", ""))
    if not _is_training(record):
        if asked != own:
            raise RunError(f"output_dir: {folder} holds the evaluation of {own}; choose another output_dir")
        return Start(weights=asked)
    if path is None:
        raise CheckpointError(f"model.weights: nothing to evaluate: the training in {folder} has no checkpoint yet")
    if asked not in ("", own) and not os.path.samefile(_existing(asked), path):
        raise RunError(
            f"output_dir: {folder} holds a training, whose record is about {path.name}; "
            f"to evaluate {asked} choose another output_dir"
        )
    step, recorded = trained_step(path, config), record.timing["steps"]
    if step != recorded and record.results:
        raise RunError(
            f"output_dir: {folder} has numbers of step {recorded:.0f}, but its newest undamaged checkpoint is "
            f"{path.name}; choose another output_dir, with model.weights={path}"
        )
    return Start(step, str(path), notices=(*notices, f"evaluating {path}"))


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise CheckpointError(f"model.weights: no file {path}")
    return path


def _evaluation_key(key: str) -> bool:
    """What to measure may differ from the record's; how, on which images say, may not: numbers stand side by side."""
    return key in _FREE or key in ("model.weights", "evaluation.statistics", "leakage.enabled")
