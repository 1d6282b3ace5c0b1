"""Before the training: do all ranks of this allocation stand where they should, and can they work together?

Every rank runs it. What can be seen alone (ranks, CPUs, GPUs) comes first; then all meet at a small store on rank 0's
machine, tell each other what they saw, reduce one number together and read one file. A rank that is missing, or hangs,
is named by the others after a time limit, and every failure is one line with what to do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from leakfree.config import RunConfig
from leakfree.errors import LeakfreeError
from leakfree.training.meeting import interface_towards
from leakfree.training.ranks import usable_cores

__all__ = ["Place", "Preflight", "PreflightError", "address_of", "place_in_slurm", "port_of", "preflight"]

CLOCK_SECONDS = 5.0  # clocks that differ by more are warned of
LEAST_FREE = 100 * 2**20  # bytes: less is an error
LITTLE_FREE = 5 * 2**30  # bytes: less is warned of
_FILE_SECONDS = 10.0  # a network file system may take so long to show a new file


class PreflightError(LeakfreeError):
    """The allocation cannot carry the run; the message tells why, and what to do."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks of its job.

    Attributes:
        hosts: the machines of the job, in order; rank 0 is on the first.
        address, port: where rank 0 can be met; ``port + 1`` is free for the preflight.
        cpus: CPUs that this rank was given; None = not said.
    """

    rank: int
    local_rank: int
    world_size: int
    node: int
    hosts: tuple[str, ...]
    address: str
    port: int
    cpus: int | None

    @property
    def ranks_per_machine(self) -> int:
        return self.world_size // len(self.hosts)

    def host_of(self, rank: int) -> str:
        return self.hosts[min(rank // max(1, self.ranks_per_machine), len(self.hosts) - 1)]

    def environment(self) -> dict[str, str]:
        """The variables by which a rank of a launcher is known."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_machine),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def port_of(job_id: int) -> int:
    """The port of a job: ``10000 + 2 * (job_id mod 10000)``.

    Even, below the ports that Linux gives to clients (32768 and up), and another one for jobs that share a machine: an
    element of an array has a job id of its own. The preflight uses the odd one after it.
    """
    return 10000 + 2 * (job_id % 10000)


def place_in_slurm(environ: Mapping[str, str], hosts: tuple[str, ...]) -> Place:
    """The place of a Slurm task, from its environment.

    Args:
        hosts: those of SLURM_JOB_NODELIST.

    Raises:
        PreflightError: this is no Slurm task.
    """
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID")
    missing = [name for name in names if not environ.get(name, "").isdigit()]
    if missing:
        raise PreflightError(f"preflight: {', '.join(missing)} not set: each rank must be a task of srun")
    cpus = environ.get("SLURM_CPUS_PER_TASK", "")
    return Place(
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world_size=int(environ["SLURM_NTASKS"]),
        node=int(environ["SLURM_NODEID"]),
        hosts=hosts,
        address=address_of(hosts[0], environ),
        port=port_of(int(environ["SLURM_JOB_ID"])),
        cpus=int(cpus) if cpus.isdigit() else None,
    )


def address_of(host: str, environ: Mapping[str, str]) -> str:
    """A name or number under which ``host`` can be reached from here: its name, or what Slurm knows it by."""
    with suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["scontrol", "show", "node", "-o", host], capture_output=True, text=True, timeout=20, check=False
        )
        if match := re.search(r"\bNodeAddr=(\S+)", done.stdout):
            return match[1]
    return environ.get("SLURM_LAUNCH_NODE_IPADDR", host)  # srun runs on the first machine


@dataclass
class Preflight:
    """What a preflight that went well has found.

    Attributes:
        one_machine: all ranks are on one machine, whatever its nodes are called.
        signals: of all ranks, names of signals that came so far.
        lines: for the log of rank 0.
    """

    seconds: float
    one_machine: bool
    signals: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class _Asked:
    machines: int
    per_machine: int
    gpus: int
    cpus: int | None


def preflight(
    config: RunConfig,
    place: Place,
    *,
    cpus_per_task: int | None = None,
    seconds: float = 60.0,
    signals: Callable[[], list[str]] = list,
) -> Preflight:
    """Check the allocation, together with all other ranks.

    Args:
        cpus_per_task: what was asked for each rank; None = nothing.
        seconds: how long ranks wait for each other, for each step of it.
        signals: what signals this rank has got so far.

    Raises:
        PreflightError: on every rank that got here, with the same message on all where they could talk.
    """
    began = time.monotonic()
    trainer = config.trainer
    asked = _Asked(trainer.num_machines, trainer.ranks_per_machine, trainer.num_gpus, cpus_per_task)
    _right_size(place, asked)
    if place.world_size == 1:
        found = {0: _mine(place, asked, signals)}
        _no_problems(found, place)
        free = _shared_folder(config, place, None, seconds)
        return _summary(began, place, found, None, free)
    with _meeting(place, seconds) as store:
        mine = _mine(place, asked, signals)
        try:
            found = store.gather("arrived", mine)
        except PreflightError:
            _no_problems({place.rank: mine}, place)  # perhaps why the others are not here
            raise
        _no_problems(found, place)
        one_machine = len({facts["machine"] for facts in found.values()}) == 1
        if not trainer.num_gpus:
            _choose_interface(place, one_machine)
        took = _reduce(place, store, gpus=trainer.num_gpus > 0)
        clocks = store.gather("clock", time.time())
        free = _shared_folder(config, place, store, seconds)
        result = _summary(began, place, found, took, free)
        spread = max(clocks.values()) - min(clocks.values())
        if spread > CLOCK_SECONDS:
            slow = min(clocks, key=lambda rank: clocks[rank])
            result.lines.append(
                f"preflight: warning: clocks differ by {spread:.0f} s (that of {place.host_of(slow)} is behind): "
                "times in logs and locks will mislead; ask for NTP"
            )
    return result


def _right_size(place: Place, asked: _Asked) -> None:
    expected = asked.machines * asked.per_machine
    if place.world_size != expected or len(place.hosts) != asked.machines:
        raise PreflightError(
            f"preflight: the job has {place.world_size} tasks on {len(place.hosts)} machines, the run was launched for "
            f"{expected} on {asked.machines} (trainer.num_machines, num_gpus or num_processes); launch it again with "
            "the numbers that you want, and leave ntasks and nodes to it"
        )


def _mine(place: Place, asked: _Asked, signals: Callable[[], list[str]]) -> dict[str, Any]:
    """What this rank sees, and what is wrong about it."""
    problems = []
    if place.local_rank >= asked.per_machine:
        problems.append(f"is task {place.local_rank} of its machine, where {asked.per_machine} were asked for")
    if asked.cpus is not None and place.cpus != asked.cpus:
        problems.append(
            f"was asked to have {asked.cpus} CPUs and was given {place.cpus or 'no number of them'}: "
            "srun must be told (export SRUN_CPUS_PER_TASK)"
        )
    cores = usable_cores()
    if asked.cpus is not None and cores < asked.cpus:
        problems.append(f"was asked to have {asked.cpus} CPUs, but may use {cores:g}: look at --cpu-bind and cgroups")
    if asked.gpus:
        import torch

        if (count := torch.cuda.device_count()) < asked.per_machine:
            problems.append(
                f"sees {count} GPUs, and needs to see the {asked.per_machine} of its machine: give --num-gpus what the "
                "machine has, and no --sbatch gpu-bind; after that look at the driver (nvidia-smi)"
            )
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "cpus": min(cores, place.cpus or cores),
        "problems": problems,
        "signals": signals(),
    }


def _machine() -> str:
    """The same text in two processes only if they are on one machine."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _no_problems(found: dict[int, Any], place: Place) -> None:
    told = [
        f"rank {rank} on {place.host_of(rank)} {problem}"
        for rank, facts in found.items()
        for problem in facts["problems"]
    ]
    if told:
        more = f" (and {len(told) - 1} like it)" if len(told) > 1 else ""
        raise PreflightError(f"preflight: {told[0]}{more}")


# ----------------------------------------------------------------------------------- the meeting


@dataclass
class _Store:
    """torch's key-value store on rank 0's machine, with waits that end and name who is missing."""

    raw: Any
    place: Place
    seconds: float

    def gather(self, key: str, value: Any) -> dict[int, Any]:
        """Every rank's value, by rank."""
        self.raw.set(f"{key}/{self.place.rank}", json.dumps(value))
        everyone = [f"{key}/{rank}" for rank in range(self.place.world_size)]
        missing = self.wait(everyone, self.seconds)
        if missing:
            ranks = [everyone.index(name) for name in missing]
            raise PreflightError(
                f"preflight: {_named(ranks, self.place)} did not arrive within {self.seconds:.0f} s ({key}): look at "
                "the end of its log and at its machine; where machines are only slow to start, give a larger "
                "--preflight-seconds"
            )
        return {rank: json.loads(self.raw.get(name)) for rank, name in enumerate(everyone)}

    def wait(self, keys: list[str], seconds: float) -> list[str]:
        """Those of ``keys`` that nobody has set in time."""
        end = time.monotonic() + seconds
        missing = list(keys)
        while missing:
            missing = [key for key in missing if not self.raw.check([key])]
            if not missing or time.monotonic() > end:
                break
            time.sleep(0.02)
        return missing


def _named(ranks: list[int], place: Place, most: int = 8) -> str:
    shown = [f"rank {rank} (on {place.host_of(rank)})" for rank in ranks[:most]]
    return ", ".join(shown) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


@contextmanager
def _meeting(place: Place, seconds: float) -> Iterator[_Store]:
    import torch.distributed as dist

    where = f"{place.address}:{place.port + 1}"
    try:
        raw = dist.TCPStore(
            place.address,
            place.port + 1,
            place.world_size,
            is_master=place.rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        if place.rank == 0:
            raise PreflightError(
                f"preflight: rank 0 cannot listen on {where} ({_first_line(error)}): another process has the port, "
                "which comes from the job id; launch again"
            ) from None
        raise PreflightError(
            f"preflight: rank {place.rank} on {place.host_of(place.rank)} could not reach rank 0 at {where} within "
            f"{seconds:.0f} s: rank 0 has not started (see its log), or a firewall is between their machines"
        ) from None
    store, leaving = _Store(raw, place, seconds), 1.0  # seconds
    try:
        yield store
        leaving = seconds
    except RuntimeError as error:  # the store itself is gone
        raise PreflightError(
            f"preflight: rank {place.rank} lost rank 0 at {where} ({_first_line(error)}): see the log of rank 0"
        ) from error
    finally:
        # The store lives in rank 0: it leaves last, or the others could not read what it wrote.
        with suppress(RuntimeError):
            raw.set(f"left/{place.rank}", "")
            if place.rank == 0:
                store.wait([f"left/{rank}" for rank in range(place.world_size)], leaving)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _choose_interface(place: Place, one_machine: bool) -> None:
    """gloo listens where the machine's own name leads, on many machines the loopback: say where, if need be."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if one_machine:
        if Path("/sys/class/net/lo").exists():
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"
    other = place.address if place.node else address_of(place.hosts[-1], os.environ)
    if own.startswith("127.") and (name := interface_towards(other)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _reduce(place: Place, store: _Store, *, gpus: bool) -> float:
    """One all-reduce over all ranks by the backend of the training; the seconds it took."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", place.local_rank) if gpus else torch.device("cpu")
    hint = (
        "give --env NCCL_SOCKET_IFNAME=..., and --env NCCL_DEBUG=INFO to see more"
        if gpus
        else "give --env GLOO_SOCKET_IFNAME=... (the network interface between the machines, see 'ip addr')"
    )
    began = time.monotonic()
    try:
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=dist.PrefixStore("reduce", store.raw),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=store.seconds),
            device_id=device if gpus else None,
        )
        one = torch.ones(1, device=device)
        work = dist.all_reduce(one, async_op=True)
        while not work.is_completed() and time.monotonic() < began + store.seconds:
            time.sleep(0.001)
        done = work.is_completed()
        total = float(one.item()) if done else 0.0
    except RuntimeError as error:
        raise PreflightError(
            f"preflight: rank {place.rank} on {place.host_of(place.rank)} cannot talk to the other ranks "
            f"({_first_line(error)}); {hint}"
        ) from error
    if done:
        store.raw.set(f"reduced/{place.rank}", "")
    late = store.wait([f"reduced/{rank}" for rank in range(place.world_size)], seconds=5.0)
    if late:
        ranks = [int(key.partition("/")[2]) for key in late]
        raise PreflightError(
            f"preflight: an all-reduce did not end within {store.seconds:.0f} s on {_named(ranks, place)}; {hint}"
        )
    if total != place.world_size:
        raise PreflightError(f"preflight: an all-reduce of ones over {place.world_size} ranks gave {total:g}; {hint}")
    took = time.monotonic() - began
    dist.destroy_process_group()
    return took


def _shared_folder(config: RunConfig, place: Place, store: _Store | None, seconds: float) -> int:
    """Rank 0 writes a file into the output folder, all others read it; the bytes that are free there."""
    folder = Path(config.output_dir).absolute()
    path = folder / f".preflight-{os.environ.get('SLURM_JOB_ID', os.getpid())}"
    word, problem, free = f"{time.time_ns()}", "", 0
    if place.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(word)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            problem = (
                f"rank 0 on {place.host_of(0)} cannot write to {folder} ({error.strerror}): choose another output_dir"
            )
        else:
            if free < LEAST_FREE:
                problem = f"{folder} has {free / 2**20:.0f} MiB left: make room, or choose another output_dir"
    try:
        if store is not None:
            first = store.gather("written", [word, problem] if place.rank == 0 else None)[0]
            word, problem = first
            seen = problem or place.rank == 0 or _reads(path, word, min(seconds / 2, _FILE_SECONDS))
            blind = [rank for rank, found in store.gather("read", bool(seen)).items() if not found]
            if blind:
                problem = (
                    f"{_named(blind, place)} cannot see what rank 0 on {place.host_of(0)} wrote to {folder}: "
                    "output_dir must be on a file system that all machines share"
                )
    finally:
        if place.rank == 0:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    if problem:
        raise PreflightError(f"preflight: {problem}")
    return free


def _reads(path: Path, word: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if path.read_text() == word:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _summary(began: float, place: Place, found: dict[int, Any], took: float | None, free: int) -> Preflight:
    seconds = time.monotonic() - began
    cpus = sorted({facts["cpus"] for facts in found.values()})
    shown = f"{cpus[0]:g}" + (f" to {cpus[-1]:g}" if len(cpus) > 1 else "")
    reduced = "" if took is None else f", all-reduce in {1000 * took:.0f} ms"
    lines = [
        f"preflight: {place.world_size} ranks on {len(place.hosts)} machines ({', '.join(place.hosts[:8])}"
        f"{', ...' if len(place.hosts) > 8 else ''}), {shown} CPUs each{reduced}, {free / 2**30:.0f} GiB free; "
        f"{seconds:.1f} s"
    ]
    if free < LITTLE_FREE and place.rank == 0:
        lines.append(f"preflight: warning: only {free / 2**30:.1f} GiB are free for checkpoints")
    signals = [name for facts in found.values() for name in facts["signals"]]
    return Preflight(seconds, len({facts["machine"] for facts in found.values()}) == 1, signals, lines)
