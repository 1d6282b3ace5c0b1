"""What a job does: :class:`Training` is what submitit keeps in a file and calls on each task."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from leakfree.config import RunConfig, load_config
from leakfree.errors import LeakfreeError
from leakfree.launch.preflight import place_in_slurm, preflight
from leakfree.launch.requeue import judge, put_back, time_is_up
from leakfree.launch.slurm import job_facts
from leakfree.training import MachineLost, RankError, Stopped, train
from leakfree.training.endings import AWAY, Ending
from leakfree.training.stopping import EXIT_STOPPED, listening, received
from leakfree.training.watchdog import at_end

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

__all__ = ["Training"]

_GRACE = 2.0  # seconds that rank 0 has to tell what is wrong before another rank's end ends it
_LOST = "a lost machine"
_TAIL = 2**16  # bytes of rank 0's log that are searched for a line


@dataclass(frozen=True)
class Training:
    """The training of some resolved configs, one after the other. Plain data: it means the same after any requeue.

    Where a run goes on is decided when it starts, by the checkpoints in its output folder.

    Attributes:
        configs: files of resolved configs, in the job's own folder.
        folder: where the command was given; relative paths of the configs start there.
        convert_ranks: go on with runs of another number of ranks.
        cpus_per_task: CPUs asked for each rank; None = the cluster's default.
        preflight_seconds, signal_delay: see :class:`leakfree.launch.options.JobOptions`.
    """

    configs: tuple[str, ...]
    folder: str
    convert_ranks: bool = False
    cpus_per_task: int | None = None
    preflight_seconds: float = 60.0
    signal_delay: float = 90.0

    def __call__(self) -> int:
        """Train; the exit code of the command, with which a job that failed or stopped also ends the process."""
        os.chdir(self.folder)
        executor = os.environ.get("SUBMITIT_EXECUTOR")
        if executor == "slurm":
            _SlurmTask(self).run()
        if executor == "local":
            self._in_the_background()
        return self.here()

    def here(self) -> int:
        """Train on this machine, with ranks of our own; the exit code.

        A run that fails does not keep the others from running.

        Raises:
            Stopped, KeyboardInterrupt: no further run is begun.
        """
        codes = [0]
        for path in self.configs:
            try:
                self.start(load_config(path))
            except LeakfreeError as error:
                codes.append(2)
                _say(_one_line(error))
            except RankError as error:
                codes.append(1)
                _say(f"leakfree: failed: {error}")
            except Stopped:
                raise
            except Exception:
                codes.append(1)
                _say(f"leakfree: failed, with this traceback:\n{traceback.format_exc()}")
        return max(codes, key=lambda code: (code > 0, -code))  # a failure of ours before a mistake of the user's

    def _in_the_background(self) -> NoReturn:
        try:
            with listening(to_the_end=True):
                code = self.here()
        except Stopped as stop:
            code = EXIT_STOPPED
            _say(f"leakfree: {stop}")
        except KeyboardInterrupt:
            code = 130
            _say("leakfree: interrupted")
        sys.exit(code)

    def start(self, config: RunConfig) -> None:
        """Train one of them, or go on with it."""
        train(config, resume=True, convert_ranks=self.convert_ranks)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit keeps for the next start: the same, since the checkpoints are in the output folder."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


class _SlurmTask:
    """One rank of a Slurm job: its place, the preflight, the training, and how it ends."""

    def __init__(self, training: Training) -> None:
        import submitit

        self.training = training
        self.job = submitit.JobEnvironment()
        # Bound to this signal by submitit before it calls us; it knows the file and the countdown of this job.
        bound = signal.getsignal(signal.SIGUSR2)
        self.handler: Any = getattr(bound, "__self__", None)
        self.rank = self.job.global_rank
        self.ranks_per_machine = 1

    def run(self) -> NoReturn:
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before SIGTERM, and submitit tells of it
        try:
            # no signal reaches what is left to do afterwards, scontrol among it
            with listening(to_the_end=True), at_end(self._ended_by_watchdog):
                self._train()
            code = 0
        except Stopped as stop:
            code = self._stopped(stop)
        except LeakfreeError as error:
            code = self._failed(2, _one_line(error))
        except KeyboardInterrupt:
            code = self._failed(130, "leakfree: interrupted")
        except MachineLost as error:
            _say(f"leakfree: failed: {error}")
            code = self._machine_lost(error.rank)
        except RankError as error:
            code = self._failed(1, f"leakfree: failed: {error}")
        except BaseException:  # told here, in full: what holds other ranks must not hold this process
            code = self._failed(1, f"leakfree: failed, with this traceback:\n{traceback.format_exc()}")
        _leave(code)

    def _train(self) -> None:
        (path,) = self.training.configs
        config = load_config(path)
        place = place_in_slurm(os.environ, tuple(self.job.hostnames))
        self.ranks_per_machine = place.ranks_per_machine
        found = preflight(
            config,
            place,
            cpus_per_task=self.training.cpus_per_task,
            seconds=self.training.preflight_seconds,
            signals=lambda: [received()] if received() else [],
        )
        if self.rank == 0:
            print(*found.lines, sep="\n", flush=True)
        if found.signals:
            raise Stopped(found.signals[0], "it came before the first step, and nothing was begun")
        os.environ.update(place.environment())
        self.training.start(config)

    def _stopped(self, stop: Stopped) -> int:
        """All ranks have saved and are here. Rank 0 speaks for the job; the others go, without a word."""
        if self.rank != 0:
            return 0
        _say(f"leakfree: stopped by {stop.signal_name}: {stop.where}")
        return self._requeue(stop.signal_name, EXIT_STOPPED)

    def _requeue(self, cause: str, otherwise: int) -> int:
        """Put the job back if that is meant and possible: 0; else the exit code that tells it."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        facts = job_facts(self.job.job_id)
        verdict = judge(cause, facts, restarts)
        _say(f"leakfree: {verdict.why}")
        if not verdict.requeue:
            return verdict.exit_code
        up = cause != _LOST and time_is_up(facts, self.training.signal_delay)
        problem = put_back(self.handler, self.job.job_id, time_is_up=up)
        _say(f"leakfree: {problem}" if problem else f"leakfree: job {self.job.job_id} is back in the queue")
        return otherwise if problem else 0

    def _ended_by_watchdog(self, ending: Ending) -> None:
        if ending.kind == AWAY:
            _leave(self._machine_lost(ending.rank))

    def _machine_lost(self, rank: int) -> int:
        """The machine of ``rank`` does not answer: the first rank of the first other one speaks for the job.

        Slurm itself waits for minutes before it believes that a machine is down, and would until then take the end of
        the job for a failure, which it does not requeue.
        """
        speaker = self.ranks_per_machine if rank < self.ranks_per_machine else 0
        return self._requeue(_LOST, 1) if self.rank == speaker else 0

    def _failed(self, code: int, text: str) -> int:
        """Tell it here, and in the log of rank 0, where people look, unless it is there already."""
        _say(text)
        if self.rank != 0:
            time.sleep(_GRACE)
            _tell_rank_0(Path(self.job.paths.stdout), self.rank, text)
        return code


def _tell_rank_0(log: Path, rank: int, text: str) -> None:
    """``log``: of this rank; submitit names those of one job alike, but for the rank."""
    first = log.with_name(log.name.removesuffix(f"_{rank}_log.out") + "_0_log.out")
    try:
        with first.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            if text.splitlines()[-1] not in file.read().decode(errors="replace"):
                with first.open("a", encoding="utf-8") as end:
                    end.write(f"rank {rank}: {text}\n")
    except OSError as error:  # its own log has it
        _say(f"leakfree: rank 0's log {first} cannot be written: {error}")


def _one_line(error: LeakfreeError) -> str:
    return "leakfree: error: " + " ".join(str(error).splitlines())


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """End without Python's ordinary way out: threads of a broken process group may wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
