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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfree.config.schema import TrainerConfig
from leakfree.errors import ConfigError
from leakfree.signals import STOP_SIGNALS, held_back
from leakfree.training.endings import GONE, Ending, RankError, first_cause
from leakfree.training.meeting import from_launcher, interface_of_this_machine, meet, names_of_this_machine
from leakfree.training.stopping import listening, received
from leakfree.training.watchdog import Watchdog, longest_patience

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["RankError", "RankPlan", "plan_ranks", "run_ranks", "threads_per_rank", "usable_cores"]

_GRACE = 3.0  # seconds the other ranks have to tell what they saw, once one has failed,
_STOPPING = 20.0  # or to end too, once one has stopped as asked
_POLL = 0.2  # seconds between two looks for signals; a dead rank's loader processes can hide its end from the sentinel
_TIMEOUT_LATER = 300.0  # seconds by which the process group's own time limit is later than the watchdog's
_NEVER = 3.0e7  # seconds; a year


@dataclass(frozen=True)
class RankPlan:
    """How many processes a run has, and where.

    Attributes:
        world_size: ranks over all machines.
        local_size: ranks on this machine.
        gpus: each rank has a GPU of its own.
        joined: the ranks exist already (RANK, LOCAL_RANK and WORLD_SIZE are set); this is one of them.
        stuck_after: seconds without progress of a rank that end the run; 0 = never.
        join_within: seconds in which all ranks must have arrived.
    """

    world_size: int
    local_size: int
    gpus: bool
    joined: bool
    stuck_after: float = 1800.0
    join_within: float = 300.0

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
        world_size = from_launcher("WORLD_SIZE", low=1)
        here = "LOCAL_WORLD_SIZE" in os.environ
        local_size = from_launcher("LOCAL_WORLD_SIZE", low=1) if here else min(local_size, world_size)
        for name in ("RANK", "LOCAL_RANK"):
            from_launcher(name, low=0)
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
    return RankPlan(world_size, local_size, gpus, joined, trainer.stuck_after)


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
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        with _member(plan, rank, local_rank, None, lambda ending: _say(ending, rank)):
            function(*args)
    elif plan.world_size == 1:
        with _member(plan, 0, 0, None, lambda ending: _say(ending, 0)):
            function(*args)
    else:
        with tempfile.TemporaryDirectory(prefix="leakfree-") as folder:
            _supervise(plan, f"{folder}/store", function, args)


def _say(ending: Ending, rank: int) -> None:
    """What a command says of an end that is not its own; the whole of it once."""
    print("leakfree:", (ending if rank == 0 else ending.brief()).spoken(), file=sys.stderr)


# -------------------------------------------------------------------------- the process group


@contextmanager
def _member(
    plan: RankPlan, rank: int, local_rank: int, file: str | None, tell: Callable[[Ending], object]
) -> Iterator[None]:
    """This rank's device, its watchdog and, among several ranks, the process group (or the one that is there).

    The ranks find each other through ``file``, or where a launcher says.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local_rank) if plan.gpus else None
    if device is not None:
        torch.cuda.set_device(device)
    made = plan.world_size > 1 and not dist.is_initialized()
    store = meet(rank, plan.world_size, file, plan.join_within) if made else None
    watchdog = Watchdog(
        rank,
        plan.world_size,
        stuck_after=plan.stuck_after,
        names=["127.0.0.1"] if file is not None or plan.num_nodes == 1 else names_of_this_machine(),
        exchange=partial(_exchanged, store),
        tell=tell,
        several_machines=plan.num_nodes > 1,
    )
    with watchdog:
        if made:
            if plan.num_nodes > 1 and not plan.gpus and (interface := interface_of_this_machine()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            # later than the watchdog, who knows more
            patience = min(longest_patience(plan.stuck_after), _NEVER) + _TIMEOUT_LATER
            dist.init_process_group(
                "nccl" if plan.gpus else "gloo",
                store=store,
                rank=rank,
                world_size=plan.world_size,
                device_id=device,
                timeout=timedelta(seconds=patience),
            )
        yield
        # Only on success: after a failure the peers may be gone, and closing would wait for them.
        if made:
            dist.destroy_process_group()


def _exchanged(store: dist.Store | None, text: str) -> str:
    """Rank 0's text (the others give none), through the store or the process group that is there."""
    if store is None:
        from leakfree.distributed import broadcast_object

        return str(broadcast_object(text))
    if text:
        store.set("watchdog", text)
    return str(store.get("watchdog").decode())


# ---------------------------------------------------------------------------------- in a rank


def _serve(
    rank: int,
    plan: RankPlan,
    file: str,
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
            with _member(plan, rank, rank, file, pipe.send):
                function(*args)
    except BaseException as error:
        ending = Ending.of(rank, error)
        pipe.send(ending)
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending.exit_code)  # not the ordinary way out: threads of a broken process group may wait for ever


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, so that ``kill -9`` leaves no rank behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


# ------------------------------------------------------------------------- in the watching process


def _supervise(plan: RankPlan, file: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    processes, pipes = _start(plan, file, function, args)
    try:
        reports = _watch(processes, pipes)
    finally:
        _end(processes)
    if reports is not None:
        raise _failure(reports, [process.exitcode for process in processes])


def _start(
    plan: RankPlan, file: str, function: Callable[..., None], args: tuple[Any, ...]
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
                target=_serve, args=(rank, plan, file, os.getpid(), there, function, args), name=f"rank {rank}"
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


def _watch(processes: list[BaseProcess], pipes: list[Connection]) -> dict[int, Ending | None] | None:
    """Wait until all ranks are done (None), or one has failed (what those told that have ended)."""
    running = dict(enumerate(processes))
    failed: dict[int, Ending | None] = {}
    deadline = math.inf
    handed_on = False
    while running and time.monotonic() < deadline:
        if received() and not handed_on:
            handed_on = True
            _hand_on(received(), list(running.values()))
        left = min(_POLL, deadline - time.monotonic())
        wait([process.sentinel for process in running.values()], timeout=max(0.0, left))
        for rank in [rank for rank, process in running.items() if _has_ended(process)]:
            running[rank].join()
            if running.pop(rank).exitcode != 0:
                failed[rank] = told = _received(pipes[rank])
                grace = _STOPPING if told is not None and told.deliberate else _GRACE
                deadline = min(deadline, time.monotonic() + grace)
    return failed or None


def _hand_on(signal_name: str, processes: list[BaseProcess]) -> None:
    """Tell the ranks to stop; until they have, this process only waits."""
    for process in processes:
        assert process.pid is not None
        with suppress(ProcessLookupError):  # is_alive() would reap one that has ended; so its id is nobody else's
            os.kill(process.pid, signal.Signals[signal_name])


def _has_ended(process: BaseProcess) -> bool:
    """Whether it has; the loader processes that a failed rank has left are then ended too."""
    assert process.pid is not None
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is not None and found.si_status != 0:
        with suppress(ProcessLookupError, PermissionError):  # it led no group yet
            os.killpg(process.pid, signal.SIGKILL)  # not reaped: its id cannot be anybody else's
    return found is not None


def _received(pipe: Connection) -> Ending | None:
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


def _failure(told: dict[int, Ending | None], exit_codes: list[int | None]) -> BaseException:
    """The error to raise for what ended the ranks; they told it, or died without a word."""
    endings = [
        ending or Ending(rank, GONE, f"rank {rank} {_death(exit_codes[rank])}; the other ranks have been ended")
        for rank, ending in told.items()
    ]
    return first_cause(endings).error()


def _death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"was killed by {name}" + (" (by hand, or the machine ran out of memory)" if name == "SIGKILL" else "")
