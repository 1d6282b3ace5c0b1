"""The processes of a run: one per GPU, or several on the CPU of this machine.

``run_ranks`` starts them and watches over them: the first that fails ends all, Ctrl-C ends all, and
when this process dies they die with it. A signal to stop is handed on to them, and they end by themselves.
Where the processes exist already (torchrun, a Slurm task), it joins them instead. Torch-free until a rank
starts, so the watching process stays small.
Not here: what a rank does.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from leakfree import errors
from leakfree.config.schema import TrainerConfig
from leakfree.errors import ConfigError, LeakfreeError
from leakfree.signals import STOP_SIGNALS, held_back
from leakfree.training.stopping import EXIT_STOPPED, Stopped, listening, received

__all__ = ["RankError", "RankPlan", "plan_ranks", "run_ranks", "threads_per_rank", "usable_cores"]

_GRACE = 3.0  # seconds the other ranks have to tell what they saw, once one has failed
_STOPPING = 15.0  # seconds the other ranks have to end, once one has stopped with everything saved
_LOOK = 0.2  # seconds between two looks for a signal
_LONGEST = 20_000  # characters of a traceback; a pipe holds 64 KiB


class RankError(RuntimeError):
    """A rank failed or was killed; the message names it and holds its traceback."""


@dataclass(frozen=True)
class RankPlan:
    """How many processes a run has, and where.

    Attributes:
        world_size: ranks over all machines.
        local_size: ranks on this machine.
        gpus: each rank has a GPU of its own.
        joined: the ranks exist already (RANK, LOCAL_RANK and WORLD_SIZE are set); this is one of them.
    """

    world_size: int
    local_size: int
    gpus: bool
    joined: bool

    @property
    def num_nodes(self) -> int:
        return max(1, self.world_size // self.local_size)


def plan_ranks(trainer: TrainerConfig) -> RankPlan:
    """The ranks that ``trainer`` asks for, or those that a launcher such as torchrun has made.

    Raises:
        ConfigError: more GPUs than this machine has, several machines without a launcher, a total batch that the
            ranks cannot share, or a launcher's RANK, LOCAL_RANK, WORLD_SIZE or LOCAL_WORLD_SIZE that is no number.
    """
    gpus = trainer.num_gpus > 0
    local_size = trainer.ranks_per_machine
    world_size = local_size
    joined = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if joined:
        world_size = _from_launcher("WORLD_SIZE", low=1)
        here = "LOCAL_WORLD_SIZE" in os.environ
        local_size = _from_launcher("LOCAL_WORLD_SIZE", low=1) if here else min(local_size, world_size)
        for name in ("RANK", "LOCAL_RANK"):
            _from_launcher(name, low=0)
    elif trainer.num_machines > 1:
        raise ConfigError(
            f"trainer.num_machines: {trainer.num_machines} machines need a launcher that starts the ranks on all of "
            "them: leakfree launch, or torchrun on each machine"
        )
    if gpus:
        import torch

        if (found := torch.cuda.device_count()) < local_size:
            raise ConfigError(
                f"trainer.num_gpus: {local_size} GPUs asked for, this machine has {found}; "
                "use at most that many, or trainer.num_gpus=0 with trainer.num_processes on the CPU"
            )
    if trainer.total_batch_size % world_size:
        raise ConfigError(
            f"trainer.total_batch_size: {trainer.total_batch_size} images cannot be shared evenly by {world_size} ranks"
        )
    return RankPlan(world_size, local_size, gpus, joined)


def _from_launcher(name: str, low: int) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit()) or int(text) < low:
        raise ConfigError(
            f"environment variable {name}: got {os.environ[name]!r}, must be a whole number of at least {low}; "
            "a launcher such as torchrun sets it: without one, unset RANK, LOCAL_RANK and WORLD_SIZE"
        )
    return int(text)


def threads_per_rank(plan: RankPlan, wanted: int) -> int:
    """CPU threads of each rank: ``wanted``, or its cores: those Slurm gave it, or a local rank's share of all."""
    if not wanted and plan.joined and (own := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return max(1, math.floor(min(int(own), usable_cores())))  # a task sees its own cores alone, or those of all
    return wanted or max(1, math.floor(usable_cores() / plan.local_size))


def usable_cores() -> float:
    """CPU cores this process may use: those it may run on, or its container's share where that is less."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    limit = Path("/sys/fs/cgroup/cpu.max")  # a container may own fewer cores than it sees
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
        if quota.isdigit():
            cores = min(cores, int(quota) / int(period))
    return cores


def run_ranks(plan: RankPlan, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(*args)`` on every rank, with a process group where there are several.

    One rank runs in this process, as does each rank that a launcher has made. Otherwise the ranks are
    new processes: ``function`` and ``args`` must be picklable, and a script that calls this needs the
    usual ``if __name__ == "__main__":``.

    Raises:
        LeakfreeError: raised by ``function`` on a rank, as it was there.
        Stopped: raised by ``function`` on a rank, as it was there. While this process is listening
            (:mod:`leakfree.training.stopping`), a signal to it is one to every rank.
        RankError: a rank failed otherwise or was killed; all others have been ended.
        KeyboardInterrupt: Ctrl-C; all ranks have been ended.
    """
    if plan.joined:
        with _process_group(plan, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), "env://"):
            function(*args)
    elif plan.world_size == 1:
        with _process_group(plan, 0, 0, ""):
            function(*args)
    else:
        with tempfile.TemporaryDirectory(prefix="leakfree-") as folder:
            _supervise(plan, f"file://{folder}/store", function, args)


@contextmanager
def _process_group(plan: RankPlan, rank: int, local_rank: int, init_method: str) -> Iterator[None]:
    """This rank's device and, among several ranks, the process group (or the one that is there)."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local_rank) if plan.gpus else None
    if device is not None:
        torch.cuda.set_device(device)
    made = plan.world_size > 1 and not dist.is_initialized()
    if made:
        backend = "nccl" if plan.gpus else "gloo"
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=plan.world_size, device_id=device
        )
    yield
    # Only on success: after a failure the peers may be gone, and closing would wait for them.
    if made:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------- in a rank


@dataclass
class _Report:
    """What a failed rank tells: the name of a LeakfreeError, or "" with a traceback; or that it stopped."""

    when: float
    kind: str
    text: str
    stopped: Stopped | None = None


def _serve(
    rank: int,
    plan: RankPlan,
    init_method: str,
    parent: int,
    pipe: Connection,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)  # its loader processes can be ended with it
    _die_with(parent)
    # Else its loaders start their processes as it was started, and each imports torch again: seconds per loader.
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(plan.world_size),
        LOCAL_WORLD_SIZE=str(plan.local_size),
        GROUP_RANK="0",
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    try:
        with listening(to_the_end=True):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # those that came since this process was started
            with _process_group(plan, rank, rank, init_method):
                function(*args)
    except Stopped as stop:
        pipe.send(_Report(time.time(), "", str(stop), stop))
        _leave(EXIT_STOPPED)
    except LeakfreeError as error:
        pipe.send(_Report(time.time(), type(error).__name__, str(error)))
    except BaseException:
        pipe.send(_Report(time.time(), "", traceback.format_exc()[-_LONGEST:]))
    else:
        return
    _leave(1)


def _leave(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # not the ordinary way out: threads of a broken process group may wait for ever


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, so that ``kill -9`` leaves no rank behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


# ------------------------------------------------------------------------- in the watching process


def _supervise(plan: RankPlan, init_method: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    processes, pipes = _start(plan, init_method, function, args)
    try:
        reports = _watch(processes, pipes)
    finally:
        _end(processes)
    if reports is not None:
        raise _failure(reports, [process.exitcode for process in processes])


def _start(
    plan: RankPlan, init_method: str, function: Callable[..., None], args: tuple[Any, ...]
) -> tuple[list[BaseProcess], list[Connection]]:
    context = multiprocessing.get_context("spawn")
    with held_back(), _tracker_silenced():
        resource_tracker.ensure_running()  # here, since on its way it lets SIGTERM through
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with _interrupts_ignored(), held_back():  # the ranks inherit it: Ctrl-C is for this process alone
        for rank in range(plan.local_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(rank, plan, init_method, os.getpid(), there, function, args), name=f"rank {rank}"
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
    return processes, pipes


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may, and gets them
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _tracker_silenced() -> Iterator[None]:
    """multiprocessing's tracker removes the semaphores of killed loader processes; it need not call that a leak."""
    option = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(option)  # the tracker starts with the warning options of this process
    try:
        yield
    finally:
        sys.warnoptions.remove(option)


def _watch(processes: list[BaseProcess], pipes: list[Connection]) -> dict[int, _Report | None] | None:
    """Wait until all ranks are done (None), or one has failed (the reports of those that ended)."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    failed: dict[int, _Report | None] = {}
    deadline: float | None = None
    handed_on = False
    while running:
        if received() and not handed_on:
            handed_on = True
            _hand_on(received(), [processes[rank] for rank in running.values()])
        left = _LOOK if deadline is None else deadline - time.monotonic()
        if left <= 0:
            break
        for sentinel in wait(list(running), timeout=min(left, _LOOK)):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            if processes[rank].exitcode != 0:
                report = failed[rank] = _received(pipes[rank])
                grace = _STOPPING if report and report.stopped else _GRACE
                deadline = deadline or time.monotonic() + grace
    return failed or None


def _hand_on(signal_name: str, processes: list[BaseProcess]) -> None:
    """Tell the ranks to stop; until they have, this process only waits."""
    for process in processes:
        if process.is_alive() and process.pid is not None:  # not reaped: its id cannot be anybody else's
            os.kill(process.pid, signal.Signals[signal_name])


def _received(pipe: Connection) -> _Report | None:
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:  # it died without a word
        return None


def _end(processes: list[BaseProcess]) -> None:
    """Kill what still runs, loader processes included."""
    killed = False
    for process in processes:
        if process.is_alive() and process.pid is not None:  # not reaped: its id cannot be anybody else's
            killed = True
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # it does not lead a group yet
                process.kill()
    for process in processes:
        process.join()
    if killed and sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor


def _failure(reports: dict[int, _Report | None], exit_codes: list[int | None]) -> Exception:
    """The error to raise: the user's mistake, else that the run stopped (what it says is saved), else a rank that died,
    else the first traceback.

    The others mostly saw only that their peer was gone.
    """
    told = sorted(((report.when, rank, report) for rank, report in reports.items() if report), key=lambda item: item[0])
    for _, _, failure in told:
        if failure.kind:
            return getattr(errors, failure.kind, LeakfreeError)(failure.text)
    for _, _, end in told:
        if end.stopped is not None:
            return end.stopped
    for rank, report in reports.items():
        if report is None:
            return RankError(f"rank {rank} {_death(exit_codes[rank])}; the other ranks have been ended")
    _, rank, first = told[0]
    return RankError(f"rank {rank} failed; the other ranks have been ended. Its traceback:\n{first.text}")


def _death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"was killed by {name}" + (" (by hand, or the machine ran out of memory)" if name == "SIGKILL" else "")
