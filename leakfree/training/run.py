"""``train`` and ``evaluate``: from a config to a record. Loads no torch until a rank starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from leakfree.config.schema import RunConfig
from leakfree.errors import LeakfreeError, RunError
from leakfree.records import RunRecord, read_record
from leakfree.training.checkpoints import list_checkpoints
from leakfree.training.endings import Ending, RankError
from leakfree.training.folder import (
    Start,
    interrupted_record,
    start_of_evaluation,
    start_of_training,
    trained_step,
)
from leakfree.training.lock import locked
from leakfree.training.ranks import RankPlan, plan_ranks, run_ranks
from leakfree.training.stopping import Stopped, listening, what_is_saved
from leakfree.training.watchdog import at_end

__all__ = ["evaluate", "train"]

Decide = Callable[[Path], Start]
Work = Callable[[RunConfig, RankPlan, Start], None]


def train(config: RunConfig, *, resume: bool = False, convert_ranks: bool = False) -> RunRecord:
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

    SIGUSR2 and SIGTERM, to this process, to any rank or to all processes, stop the run between two steps: all ranks
    save the same step and end, and the exit code of ``leakfree train`` is 75. A stop before the first step has nothing
    to save. An evaluation is left at its next batch: one during training is then begun anew by the resume, as is the
    one at the end. More of these signals change nothing: the run stops once, and never dies of them. While this
    function runs they do nothing else, and what they did before holds again when it returns; both need it to be
    called in the main thread. Ctrl-C ends the run at once (exit code 130), as do the signals that cannot be caught;
    either loses the steps since the newest checkpoint.

    Another number of ranks than the run had is refused, unless ``convert_ranks`` asks for it. Then what is normalized
    together is kept: by ghost groups (``model.images_per_group``) where it was a rank's batch, and as many random
    groups. The weights of a run with local, ghost or synchronized norms stay those of the undisturbed one but for
    rounding; random numbers that a rank draws for itself (dropout, sampled RoIs), and losses that it averages over
    its own RoIs, do not. The record tells it, and afterwards the same config goes on with the new number of ranks.

    Raises:
        Stopped: on every rank, after such a signal: what is saved is on disk, and the record's status is
            "interrupted".
        ConfigError, DataError, CheckpointError, RunError: a mistake to correct, told in one line; for the
            output folder: another process writes to it, it holds another run, or this one and ``resume`` was not
            asked for, or this one of another number of ranks.
        RankError: a rank failed or was killed; it is named, and no other rank is left running.
        KeyboardInterrupt: Ctrl-C, after a line that tells which step is saved.
    """
    plan = plan_ranks(config.trainer)

    def decide(folder: Path) -> Start:
        return start_of_training(config, folder, plan.world_size, resume=resume, convert_ranks=convert_ranks)

    with listening():
        return _run(config, plan, _train_on_rank, decide)


def evaluate(config: RunConfig) -> RunRecord:
    """Evaluate ``model.weights``, or the newest checkpoint of the training in ``output_dir``.

    The measurements are those at the end of :func:`train`, of a checkpoint loaded whole
    (``model.weights_parts`` is for trainings). They are shown as a table and, where ``output_dir`` holds
    the training, added to its ``record.json``: other statistics of the same checkpoint on the same images.

    Raises:
        CheckpointError: there are no weights to evaluate, or they are of another model.
        RunError: ``output_dir`` holds another run, numbers measured otherwise or of another step, or the
            weights are not those of the run in it.
        Stopped: SIGUSR2 or SIGTERM, see :func:`train`; nothing is recorded.
    """
    plan = plan_ranks(config.trainer)
    with listening():
        return _run(config, plan, _evaluate_on_rank, lambda folder: start_of_evaluation(config, folder))


def _train_on_rank(config: RunConfig, plan: RankPlan, start: Start) -> None:
    from leakfree.training.work import train_on_rank

    train_on_rank(config, plan, start)


def _evaluate_on_rank(config: RunConfig, plan: RankPlan, start: Start) -> None:
    from leakfree.training.work import evaluate_on_rank

    evaluate_on_rank(config, plan, start)


def _run(config: RunConfig, plan: RankPlan, work: Work, decide: Decide) -> RunRecord:
    held: list[Path] = []  # the output folder, once this process may write there
    try:
        if plan.joined:
            run_ranks(plan, _joined, config, plan, work, decide, held)
        else:
            with locked(config.output_dir) as folder:
                held.append(folder)
                start = _decided(decide, folder)
                if start.finished:
                    print(*start.notices, sep="\n")
                else:
                    with _guarded(config), at_end(partial(_note_end, folder)):
                        run_ranks(plan, work, config, plan, start)
    except RankError as error:
        for folder in held:
            with suppress(OSError):  # perhaps the disk is full
                _log(folder, f"failed: {error}")
        raise
    return read_record(config.output_dir)


def _joined(config: RunConfig, plan: RankPlan, work: Work, decide: Decide, held: list[Path]) -> None:
    """One of the ranks that a launcher has made: rank 0 looks at the folder for all."""
    from leakfree.distributed import broadcast_object, get_rank

    with ExitStack() as stack:
        found: Start | LeakfreeError | None = None
        if get_rank() == 0:
            try:
                held.append(stack.enter_context(locked(config.output_dir)))
                found = _decided(decide, held[0])
                stack.enter_context(at_end(partial(_note_end, held[0])))
            except LeakfreeError as error:
                found = error
        found = broadcast_object(found)
        if isinstance(found, LeakfreeError):
            raise found
        if not found.finished:
            with _guarded(config) if get_rank() == 0 else nullcontext():
                work(config, plan, found)


def _decided(decide: Decide, folder: Path) -> Start:
    try:
        return decide(folder)
    except OSError as error:  # it clears what an interrupted session has left there
        raise RunError(
            f"output_dir: {folder} cannot be read or written ({error.strerror}): make room, or see to its files, then "
            "continue with --resume"
        ) from error


@contextmanager
def _guarded(config: RunConfig) -> Iterator[None]:
    """Whatever ends the work early, the record says so; Ctrl-C and a stop also tell the user how to go on."""
    folder, began = Path(config.output_dir), time.time()
    try:
        yield
    except BaseException as error:
        with suppress(OSError, LeakfreeError):  # perhaps the disk is full: the first error is the one to tell
            interrupted_record(folder, error, began)
        with suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                _tell_interrupted(config, folder)
            elif isinstance(error, Stopped):
                _log(folder, str(error))
        raise


def _note_end(folder: Path, ending: Ending) -> None:
    """The watchdog is about to end this process."""
    report = ending.spoken()
    with suppress(OSError, LeakfreeError):  # perhaps the disk is full
        interrupted_record(folder, RankError(report))
    with suppress(OSError):
        _log(folder, report)


def _log(folder: Path, line: str) -> None:
    """Add a line to the log of a run whose ranks no longer write there."""
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def _tell_interrupted(config: RunConfig, folder: Path) -> None:
    saved = list_checkpoints(folder)
    done = what_is_saved(trained_step(saved[0], config), config.schedule.max_steps, folder) if saved else ""
    line = f"interrupted: {done or 'nothing is saved yet'}; the same command with --resume goes on from there"
    print(("\n" if sys.stderr.isatty() else "") + line, file=sys.stderr)  # below what a bar left
    _log(folder, line)
