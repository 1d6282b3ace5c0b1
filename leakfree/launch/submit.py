"""From runs to jobs, through submitit: the only place that knows its executors and their parameters."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfree.config import save_config
from leakfree.launch.job import Training
from leakfree.launch.options import JobOptions, LaunchError
from leakfree.launch.runs import Run
from leakfree.records import write_atomic

if TYPE_CHECKING:
    from submitit import SlurmExecutor

__all__ = ["FORMAT", "Submitted", "run_here", "script_of", "submit"]

FORMAT = 1  # of launch.json
_FOREVER = 10 * 365 * 24 * 60  # minutes: submitit wants a limit, a process in the background has none


@dataclass(frozen=True)
class Submitted:
    """A run that has become a job (or an element of one); ``log`` is that of rank 0."""

    run: Run
    job_id: str
    log: Path


def script_of(runs: Sequence[Run], options: JobOptions) -> str:
    """The sbatch script of a submission, to the letter; nothing is written. Its folder is named by the time."""
    executor = _slurm_executor(_folder_name(runs, options), runs, options)
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def submit(
    runs: Sequence[Run], options: JobOptions, command: Sequence[str], *, convert_ranks: bool = False
) -> list[Submitted]:
    """Queue the runs with Slurm, one array for several, or start them in the background of this machine, in turn.

    Args:
        runs: checked by :mod:`leakfree.launch.validate`.
        command: the line that asked for it, for ``launch.json`` in each output folder.
        convert_ranks: go on with runs of another number of ranks.

    Raises:
        LaunchError: Slurm refuses; its message. Nothing is queued, and nothing is left behind.
    """
    folder = _make_folder(_folder_name(runs, options))
    made = [_make_output(run) for run in runs]
    try:
        if options.launcher == "slurm":
            job_ids = _submit_to_slurm(folder, runs, options, convert_ranks)
        else:
            job_ids = [_start_locally(folder, runs, options, convert_ranks)] * len(runs)
    except BaseException:
        shutil.rmtree(folder)
        for path in reversed([path for paths in made for path in paths]):
            path.rmdir()
        raise
    submitted = [
        Submitted(run, job_id, folder / f"{job_id}_0_log.out") for run, job_id in zip(runs, job_ids, strict=True)
    ]
    for item in submitted:
        _note(item.run, options, item.job_id, folder, command)
    return submitted


def run_here(runs: Sequence[Run], options: JobOptions, command: Sequence[str], *, convert_ranks: bool = False) -> int:
    """Train the runs in this process, one after the other, as a job would; the exit code.

    Raises:
        Stopped, KeyboardInterrupt: a signal; no further run is begun.
    """
    from submitit import DebugExecutor

    folder = _make_folder(_folder_name(runs, options))
    for run in runs:
        _make_output(run)
        _note(run, options, str(os.getpid()), folder, command)
    os.environ.update(options.env)
    job = DebugExecutor(folder).submit(_training(folder, runs, options, convert_ranks))
    error = job.exception()  # its result() would open a debugger
    if error is not None:
        raise error
    return int(job.result())


# ---------------------------------------------------------------------------------------- folders


def _folder_name(runs: Sequence[Run], options: JobOptions) -> Path:
    """The folder of this submission; every submission has its own."""
    return Path(options.log_dir).absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}_{_job_name(runs, options)}"


def _job_name(runs: Sequence[Run], options: JobOptions) -> str:
    return options.name or (runs[0].name if len(runs) == 1 else "leakfree")


def _make_folder(folder: Path) -> Path:
    """Make it, for this user alone: who can write submitit's files can have code run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place, number = folder, 1
    while True:
        try:
            place.mkdir(mode=0o700)
            return place
        except FileExistsError:  # another submission of this second
            number += 1
            place = folder.with_name(f"{folder.name}-{number}")


def _make_output(run: Run) -> list[Path]:
    """The folders that had to be made, outermost first."""
    missing = [run.folder, *run.folder.parents]
    missing = [path for path in missing if not path.exists()]
    run.folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _note(run: Run, options: JobOptions, job_id: str, folder: Path, command: Sequence[str]) -> None:
    facts: dict[str, Any] = {
        "format": FORMAT,
        "launcher": options.launcher,
        "job_id": job_id,
        "folder": str(folder),
        "submitted": time.time(),
        "command": list(command),
    }
    write_atomic(run.folder / "launch.json", json.dumps(facts, indent=2) + "\n")


def _training(folder: Path, runs: Sequence[Run], options: JobOptions, convert_ranks: bool, first: int = 0) -> Training:
    files = tuple(
        str(save_config(run.config, folder / f"config_{number}.yaml")) for number, run in enumerate(runs, start=first)
    )
    return Training(
        files, os.getcwd(), convert_ranks, options.cpus_per_task, options.preflight_seconds, options.signal_delay
    )


# ------------------------------------------------------------------------------------------ Slurm


def _submit_to_slurm(folder: Path, runs: Sequence[Run], options: JobOptions, convert_ranks: bool) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _slurm_executor(folder, runs, options)
    trainings = [_training(folder, [run], options, convert_ranks, number) for number, run in enumerate(runs)]
    try:
        with redirect_stderr(StringIO()):  # submitit shows what sbatch wrote, and then raises it
            return [str(job.job_id) for job in executor.submit_array(trainings)]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise LaunchError(f"sbatch refuses: {_of_sbatch(str(error))}; nothing was submitted") from error


def _of_sbatch(text: str) -> str:
    """What sbatch wrote, without its own name, in one line."""
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.strip().splitlines())


def _slurm_executor(folder: Path, runs: Sequence[Run], options: JobOptions) -> SlurmExecutor:
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # whether Slurm is here has been asked, and a dry run needs none

    trainer = runs[0].config.trainer  # alike in all
    further: dict[str, str | bool] = dict(options.sbatch)
    if "no-requeue" not in further:
        further["requeue"] = True
    asked: dict[str, Any] = {
        "job_name": _job_name(runs, options),
        "time": options.minutes,
        "nodes": trainer.num_machines,
        "ntasks_per_node": trainer.ranks_per_machine,
        "gpus_per_node": trainer.num_gpus if trainer.num_gpus and "gres" not in further else None,
        "cpus_per_task": options.cpus_per_task,
        "mem": None if options.mem_gb is None else f"{round(1024 * options.mem_gb)}MB",
        "partition": options.partition or None,
        "constraint": options.constraint or None,
        "account": options.account or None,
        "qos": options.qos or None,
        "array_parallelism": options.array_parallelism,
        "signal_delay_s": options.signal_delay,
        "stderr_to_stdout": True,
        "setup": _setup(options),
        "additional_parameters": further,
    }
    executor = Executor(folder, max_num_timeout=options.max_requeues)
    # A wckey of submitit's own would be refused where keys are enforced.
    executor.update_parameters(wckey=None, **{name: value for name, value in asked.items() if value is not None})
    return executor


def _setup(options: JobOptions) -> list[str]:
    """Shell lines before srun; the user's own come last and may change what ours set."""
    lines = ["export PYTHONUNBUFFERED=1", "export SLURM_KILL_BAD_EXIT=1  # a task that fails ends all"]
    if options.cpus_per_task is not None:  # since Slurm 22.05 srun does not take it from sbatch
        lines.append(f"export SRUN_CPUS_PER_TASK={options.cpus_per_task}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in options.env.items()]
    return [*lines, *options.setup]


# ------------------------------------------------------------------------------------ this machine


def _start_locally(folder: Path, runs: Sequence[Run], options: JobOptions, convert_ranks: bool) -> str:
    from submitit import LocalExecutor
    from submitit.core.utils import environment_variables

    executor = LocalExecutor(folder)
    executor.update_parameters(
        timeout_min=_FOREVER,
        gpus_per_node=max(run.config.trainer.num_gpus for run in runs),
        visible_gpus=_visible_gpus(),
        stderr_to_stdout=True,
        setup=options.setup,
    )
    with environment_variables(PYTHONUNBUFFERED="1", **options.env), _detached():
        return str(executor.submit(_training(folder, runs, options, convert_ranks)).job_id)


def _visible_gpus() -> tuple[int, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves to us; () = all. submitit sets the variable anew."""
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return tuple(int(word) for word in words) if all(word.isdigit() for word in words) else ()


@contextmanager
def _detached() -> Iterator[None]:
    """What starts inside survives the terminal, and holds no pipe of ours."""
    numbers = (signal.SIGHUP, signal.SIGINT)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]  # what starts inherits it
    streams = [os.dup(stream) for stream in (0, 1, 2)]
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        yield
    finally:
        os.close(nothing)
        for stream, saved in enumerate(streams):
            os.dup2(saved, stream)
            os.close(saved)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
