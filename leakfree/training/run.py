"""``train`` and ``evaluate``: from a config to a record. Loads no torch until a rank starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from leakfree.config.schema import RunConfig
from leakfree.errors import LeakfreeError
from leakfree.records import RunRecord, read_record
from leakfree.training.checkpoints import list_checkpoints
from leakfree.training.folder import (
    Start,
    interrupted_record,
    locked,
    start_of_evaluation,
    start_of_training,
    trained_step,
)
from leakfree.training.ranks import RankPlan, plan_ranks, run_ranks

__all__ = ["evaluate", "train"]

Decide = Callable[[Path], Start]
Work = Callable[[RunConfig, RankPlan, Start], None]


def train(config: RunConfig, *, resume: bool = False) -> RunRecord:
    """Train the model of ``config``, evaluate it, and return what ``record.json`` then holds.

    Starts the ranks that ``config.trainer`` asks for on this machine, or joins those of a launcher.
    Everything is written to ``config.output_dir``: ``config.yaml``, ``log.txt``, ``metrics.json``,
    TensorBoard events, checkpoints (``checkpoint_0001000.pt`` after 1000 steps, ``model_final.pt``,
    ``last_checkpoint``) and ``record.json``. A checkpoint is of the step in its name, but is on disk, whole
    and under its name, only some steps later; the last one before the evaluation begins.

    With ``resume`` the newest undamaged checkpoint in ``output_dir`` is continued: optimizer, schedule,
    step, running statistics of every rank, frozen layers. On the CPU the weights are then bitwise those of
    a run that was never interrupted. Without a checkpoint it starts from the beginning; a finished run
    returns its record; one interrupted while evaluating goes on there. So the same command can be given
    again after any interruption.

    Raises:
        ConfigError, DataError, CheckpointError, RunError: a mistake to correct, told in one line; for the
            output folder: it holds another run, or this one and ``resume`` was not asked for.
        RankError: a rank failed or was killed; it is named, and no other rank is left running.
        KeyboardInterrupt: Ctrl-C, after a line that tells which step is saved.
    """
    plan = plan_ranks(config.trainer)
    return _run(
        config, plan, _train_on_rank, lambda folder: start_of_training(config, folder, plan.world_size, resume=resume)
    )


def evaluate(config: RunConfig) -> RunRecord:
    """Evaluate ``model.weights``, or the newest checkpoint of the training in ``output_dir``.

    The measurements are those at the end of :func:`train`, of a checkpoint loaded whole
    (``model.weights_parts`` is for trainings). They are shown as a table and, where ``output_dir`` holds
    the training, added to its ``record.json``: other statistics of the same checkpoint on the same images.

    Raises:
        CheckpointError: there are no weights to evaluate, or they are of another model.
        RunError: ``output_dir`` holds another run, numbers measured otherwise or of another step, or the
            weights are not those of the run in it.
    """
    plan = plan_ranks(config.trainer)
    return _run(config, plan, _evaluate_on_rank, lambda folder: start_of_evaluation(config, folder))


def _train_on_rank(config: RunConfig, plan: RankPlan, start: Start) -> None:
    from leakfree.training.work import train_on_rank

    train_on_rank(config, plan, start)


def _evaluate_on_rank(config: RunConfig, plan: RankPlan, start: Start) -> None:
    from leakfree.training.work import evaluate_on_rank

    evaluate_on_rank(config, plan, start)


def _run(config: RunConfig, plan: RankPlan, work: Work, decide: Decide) -> RunRecord:
    if plan.joined:
        run_ranks(plan, _joined, config, plan, work, decide)
    else:
        with locked(config.output_dir) as folder:
            start = decide(folder)
            if start.finished:
                print(*start.notices, sep="\n")
            else:
                with _guarded(config):
                    run_ranks(plan, work, config, plan, start)
    return read_record(config.output_dir)


def _joined(config: RunConfig, plan: RankPlan, work: Work, decide: Decide) -> None:
    """One of the ranks that a launcher has made: rank 0 looks at the folder for all."""
    from leakfree.distributed import broadcast_object, get_rank

    with ExitStack() as stack:
        found: Start | LeakfreeError | None = None
        if get_rank() == 0:
            try:
                found = decide(stack.enter_context(locked(config.output_dir)))
            except LeakfreeError as error:
                found = error
        found = broadcast_object(found)
        if isinstance(found, LeakfreeError):
            raise found
        if not found.finished:
            with _guarded(config) if get_rank() == 0 else nullcontext():
                work(config, plan, found)


@contextmanager
def _guarded(config: RunConfig) -> Iterator[None]:
    """Whatever ends the work early, the record says so; Ctrl-C also tells the user how to go on."""
    folder = Path(config.output_dir)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # perhaps the disk is full: the first error is the one to tell
            interrupted_record(folder)
            if isinstance(error, KeyboardInterrupt):
                _tell_interrupted(config, folder)
        raise


def _tell_interrupted(config: RunConfig, folder: Path) -> None:
    saved = list_checkpoints(folder)
    done = f"step {trained_step(saved[0], config)} of {config.schedule.max_steps} is saved in {folder}" if saved else ""
    line = f"interrupted: {done or 'nothing is saved yet'}; the same command with --resume goes on from there"
    print(("\n" if sys.stderr.isatty() else "") + line, file=sys.stderr)  # below what a bar left
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(line + "\n")
