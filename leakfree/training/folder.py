"""The output folder of a run: who may write into it, and where a run in it goes on.

Finished or half-finished work is never overwritten: a folder takes one run of one config, and one
process at a time. Torch-free: it runs before any rank starts.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfree.config import config_to_dict, diff_configs
from leakfree.config.schema import RunConfig
from leakfree.errors import CheckpointError, RunError
from leakfree.records import RunRecord, read_metrics, read_record, write_atomic, write_record
from leakfree.training.checkpoints import FINAL, list_checkpoints, newest_valid
from leakfree.training.conversion import Change, Conversion, amended, convert
from leakfree.training.stopping import Stopped

__all__ = ["Start", "interrupted_record", "start_of_evaluation", "start_of_training", "trained_step"]

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
        validate: the evaluation that is due after ``step`` has left no row yet.
        finished: nothing is left to do.
        notices: what the user should read at the top of the log.
        changes: of the config, by which this run was converted to another number of ranks, now or before.
        conversion: the one that begins here.
        sessions: the earlier starts of this training, as its record tells them.
    """

    step: int = 0
    weights: str = ""
    validate: bool = False
    finished: bool = False
    notices: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    conversion: Conversion | None = None
    sessions: tuple[dict[str, Any], ...] = ()


# ------------------------------------------------------------------------------------- training


def start_of_training(
    config: RunConfig,
    folder: Path,
    world_size: int,
    *,
    resume: bool,
    convert_ranks: bool = False,
    look_only: bool = False,
) -> Start:
    """Decide where a training in ``folder`` begins, and clear what an interrupted write left behind.

    A run that was converted to another number of ranks is known by the config it was begun with, too.

    Args:
        convert_ranks: go on with another number of ranks, if what is normalized together can be kept.
        look_only: change nothing: the training begins later, and somebody may be at work there.

    Raises:
        RunError: the folder holds other work, or this run's and ``resume`` was not asked for.
        CheckpointError: every checkpoint is damaged.
    """
    if not str(folder).isascii() and os.fsencode(folder).decode(errors="replace") != str(folder):
        raise RunError(f"output_dir: {folder} has bytes that are no UTF-8: TensorBoard cannot write there; rename it")
    if not look_only:
        for pattern in _HALF_WRITTEN:
            for leftover in folder.glob(pattern):
                leftover.unlink(missing_ok=True)
    record = _record_of(folder)
    has_work = bool(list_checkpoints(folder)) or (record is not None and record.status == "finished")
    if not has_work:
        if not look_only:
            _cut_metrics(folder, 0)
        notice = f"--resume: {folder} holds no checkpoint, starting from the beginning"
        return Start(notices=(notice,) if resume else (), sessions=_fruitless(record, config))
    if record is None:
        raise RunError(f"output_dir: {folder} holds checkpoints but no record.json; choose another output_dir")
    if not _is_training(record):
        raise RunError(f"output_dir: {folder} holds the results of an evaluation; choose another output_dir")
    changes = _changes_of(record)
    config = amended(config, changes)
    _same_run(config, record, folder)
    if not resume:
        state = "finished" if record.status == "finished" else f"stopped, newest {list_checkpoints(folder)[0].name}"
        remedy = "" if record.status == "finished" else "add --resume to go on from there, or "
        raise RunError(f"output_dir: {folder} already holds this run ({state}); {remedy}choose another output_dir")
    if record.status == "finished":
        return Start(step=config.schedule.max_steps, finished=True, notices=(f"{folder}: this run is finished",))
    before = record.environment.get("world_size", world_size)
    changed = _converted(config, folder, before, world_size, convert_ranks) if before != world_size else ()
    path, notices = newest_valid(folder)
    assert path is not None  # has_work
    step = trained_step(path, config)
    rows = read_metrics(folder) if look_only else _cut_metrics(folder, step)
    # journal rows have times, and rows of evaluations have not
    validated = any(row.get("step") == step and "seconds_per_step" not in row for row in rows)
    period = config.trainer.eval_period
    due = period > 0 and step % period == 0 and step < config.schedule.max_steps
    conversion = None if before == world_size else Conversion(step, before, world_size, changed)
    notices = [*notices, *_without_a_word(record), f"continuing from {path} ({step} steps done)"]
    return Start(
        step,
        str(path),
        validate=due and not validated,
        notices=tuple(notices),
        changes=(*changes, *changed),
        conversion=conversion,
        sessions=tuple(record.sessions),
    )


def _fruitless(record: RunRecord | None, config: RunConfig) -> tuple[dict[str, Any], ...]:
    """The sessions of ``record`` that left no checkpoint, if they were of this config."""
    if record is None or not _is_training(record):
        return ()
    differing = diff_configs(record.config, config_to_dict(config))
    return tuple(record.sessions) if all(key in _FREE for key, _, _ in differing) else ()


def _changes_of(record: RunRecord) -> tuple[Change, ...]:
    return tuple(change for raw in record.conversions for change in Conversion.from_dict(raw).changes)


def _without_a_word(record: RunRecord) -> list[str]:
    """What to say of a session that did not tell its end."""
    if not record.sessions or record.sessions[-1].get("ended"):
        return []
    last = record.sessions[-1]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last["started"]))
    return [f"the session before ({when} on {last['host']}) ended without a word: killed, or its machine died"]


def trained_step(path: Path, config: RunConfig) -> int:
    """The completed steps that the name of a checkpoint tells."""
    return config.schedule.max_steps if path.name == FINAL else int(path.stem.rpartition("_")[2])


def _record_of(folder: Path) -> RunRecord | None:
    return read_record(folder) if (folder / "record.json").exists() else None


def _is_training(record: RunRecord) -> bool:
    return record.timing.get("steps") is not None


def _same_run(config: RunConfig, record: RunRecord, folder: Path) -> None:
    differing = [item for item in diff_configs(record.config, config_to_dict(config)) if item[0] not in _FREE]
    if differing:
        raise RunError(
            f"output_dir: {folder} holds a run of another config: {_listed(differing)}; "
            "choose another output_dir, or go back to that config"
        )


def _converted(config: RunConfig, folder: Path, before: int, now: int, asked: bool) -> tuple[Change, ...]:
    """The changes of ``config`` with which ``now`` ranks can go on.

    Raises:
        RunError: it was not ``asked`` for, or statistics cannot be kept.
    """
    if type(before) is not int or before < 1:
        raise RunError(f"{folder / 'record.json'}: environment.world_size: expected a number of ranks, got {before!r}")
    total = config.trainer.total_batch_size
    refusal = (
        f"output_dir: the run in {folder} was started on {before} ranks and cannot go on with {now}: "
        f"each rank would have {total // now} images in place of {total // before}, which changes what shares batch "
        f"statistics; use {before} ranks again"
    )
    try:
        changes = convert(config, before, now)
    except RunError as error:
        raise RunError(f"{refusal}. It cannot be converted: {error}") from None
    if not asked:
        kept = ", ".join(f"{key}={value}" for key, _, value in changes)
        raise RunError(f"{refusal}, or add --convert-ranks, which keeps it" + (f" ({kept})" if kept else ""))
    return changes


def _listed(differing: list[tuple[str, Any, Any]], most: int = 6) -> str:
    shown = [f"{key} was {before!r}, now {now!r}" for key, before, now in differing[:most]]
    return "; ".join(shown) + (f"; and {len(differing) - most} more" if len(differing) > most else "")


def _cut_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after ``step``: they are about to be written again. Returns the others."""
    rows = read_metrics(folder)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if (folder / "metrics.json").exists():
        write_atomic(folder / "metrics.json", "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def interrupted_record(folder: Path, error: BaseException | None = None, since: float = 0.0) -> None:
    """Mark the record of a run that did not come to its end, and tell in its session what ended it.

    Args:
        error: what ended it; None and Ctrl-C are "interrupted".
        since: Unix time at which the work began: a session from before is another one's.
    """
    record = _record_of(folder)
    if record is None or record.status != "running":
        return
    record.status = "interrupted"
    if record.sessions and record.sessions[-1]["started"] >= since and not record.sessions[-1]["ended"]:
        record.sessions[-1]["ended"] = _ending(error)
    write_record(folder, record)


def _ending(error: BaseException | None) -> str:
    if isinstance(error, Stopped):
        return f"stopped by {error.signal_name}"
    if error is None or isinstance(error, KeyboardInterrupt):
        return "interrupted"
    lines = str(error).strip().splitlines()
    return f"failed: {lines[0][:300] if lines else type(error).__name__}"


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
    changes = _changes_of(record)
    config = amended(config, changes)
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
    return Start(step, str(path), notices=(*notices, f"evaluating {path}"), changes=changes)


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise CheckpointError(f"model.weights: no file {path}")
    return path


def _evaluation_key(key: str) -> bool:
    """What to measure may differ from the record's; how, on which images say, may not: numbers stand side by side."""
    return key in _FREE or key in ("model.weights", "evaluation.statistics", "leakage.enabled")
