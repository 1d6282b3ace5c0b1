"""How the benchmarks measure: alternating rounds, peak memory, bytes on the wire, machine facts, tables, JSON.

Times of one machine move; ratios move less. All variants of a comparison therefore run in one process (or on
the same ranks), one after the other in each round, in an order that changes from round to round, and what counts
is the ratio within a round. Before a sample its variant runs once untimed: the memory that the one before freed
or kept is not its doing. A round in which tasks had to wait for a core is counted, and left out where enough
others remain.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from leakfree.distributed import all_gather_objects, barrier, get_rank, get_world_size

Step = Callable[[], object]
Shape = tuple[int, int, int, int]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SAMPLE_SECONDS = 0.05  # a sample is as many steps as take about so long: a single short one says little
_LONG_SECONDS = 0.3  # a step so long need not be settled: what the one before left behind is nothing to it


# --- Time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure over rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        low, median, high = np.percentile(list(values), [25, 50, 75])
        return Spread(float(median), float(low), float(high))


@dataclass(frozen=True)
class Rounds:
    """Seconds per step of each variant, one value a round (the slowest rank's), and each round's CPU pressure."""

    seconds: dict[str, list[float]]
    pressure: list[float | None]  # share of the round in which a task waited for a core; None where not known
    max_pressure: float

    @property
    def pressured(self) -> int:
        return sum(value is not None and value > self.max_pressure for value in self.pressure)

    @property
    def used(self) -> list[int]:
        """Quiet rounds when at least half of the rounds (and three) are quiet, else all."""
        quiet = [i for i, value in enumerate(self.pressure) if value is None or value <= self.max_pressure]
        return quiet if len(quiet) >= max(3, len(self.pressure) / 2) else list(range(len(self.pressure)))

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name][i] for i in self.used)

    def ratio(self, name: str, to: str) -> Spread:
        """How many times as long as ``to`` it took, round by round."""
        return Spread.of(self.seconds[name][i] / self.seconds[to][i] for i in self.used)


def _cpu_wait() -> float | None:
    """Seconds since boot in which some task waited for a core (Linux pressure stall information)."""
    try:
        first = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:  # not Linux, or built without it
        return None
    return int(first.rpartition("total=")[2]) / 1e6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Step, times: int, device: torch.device, *, settle: bool = True) -> float:
    if settle:
        step()
    synchronize(device)
    barrier()
    start = time.perf_counter()
    for _ in range(times):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / times


def alternate(
    steps: dict[str, Step], repeats: int, device: torch.device, *, max_pressure: float, say: Callable[[str], None]
) -> Rounds:
    """Time every step once a round, in changing order. Every rank calls it with the same names and repeats."""
    about = {}
    for name, step in steps.items():
        say(f"warm-up: {name}")
        about[name] = max(all_gather_objects(_timed(step, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    pressure: list[float | None] = []
    names = list(steps)
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            say(f"round {number + 1}/{repeats}")
            waited, start = _cpu_wait(), time.perf_counter()
            for name in np.random.default_rng(number).permutation(names).tolist():  # alike on all ranks
                times = math.ceil(min(50, _SAMPLE_SECONDS / about[name]))
                taken = _timed(steps[name], times, device, settle=about[name] < _LONG_SECONDS)
                seconds[name].append(taken)
            now, length = _cpu_wait(), time.perf_counter() - start
            pressure.append(None if waited is None or now is None else (now - waited) / length)
    finally:
        gc.enable()
    ranks = all_gather_objects(seconds)
    slowest_rank = {name: [max(rank[name][i] for rank in ranks) for i in range(repeats)] for name in names}
    return Rounds(slowest_rank, all_gather_objects(pressure)[0], max_pressure)


# --- Memory -------------------------------------------------------------------------------------------------------


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes that one step holds at a time beyond what was there; the largest of all ranks.

    On the CPU the running sum of torch's allocations in this thread: numpy's and the transport's own are not seen.
    The least of a few steps counts, since a collective's worker may be the one to free a tensor, out of sight. The
    first does not: what a step replaces must have been allocated in sight.
    """
    if device.type == "cuda":
        step()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
            for _ in range(3):
                with record_function("counted step"):
                    step()
        events = profiler.profiler.kineto_results.events()
        starts = sorted(event.start_ns() for event in events if event.name() == "counted step")
        memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peaks = []
        for start, end in pairwise([*starts, math.inf]):
            held = np.cumsum([0, *(size for when, size in memory if start <= when < end)])
            peaks.append(int(held.max()))
        peak = min(peaks)
    return int(max(all_gather_objects(peak)))


# --- Wire ---------------------------------------------------------------------------------------------------------


@dataclass
class Wire:
    """What one rank sends in one step: mean over ranks (and over draws)."""

    sent: float = 0.0  # bytes of rows to other ranks: floating-point numbers, and raw bytes in an all-to-all
    numbers: float = 0.0  # floating-point numbers that the rank puts into all-reduces
    control: float = 0.0  # bytes of integers (sizes, checks, pickles) to other ranks
    permutation: float = 0.0  # of these, in pieces of as many integers as there are rows, or more
    total: float = 0.0  # all bytes, an all-reduce of n bytes taken as 2 (W-1)/W n
    sent_by_busiest_rank: float = 0.0
    kernel: float | None = None  # bytes per rank that the loopback device carried, headers and strangers' included


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class WireCounter(TorchDispatchMode):
    """Counts what this rank's collectives send to other ranks, below every Python interface to them.

    ``rows``: an integer tensor of that many entries or more counts as a permutation.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.wire = Wire()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            self._count(name.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        others = get_world_size() - 1
        if name in ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_"):
            for tensor in args[0] if isinstance(args[0], (list, tuple)) else [args[0]]:
                self._reduce(tensor)
        elif name in ("allgather_", "_allgather_base_", "all_gather_into_tensor"):
            own = args[0] if name == "all_gather_into_tensor" else args[1]
            for tensor in own if isinstance(own, (list, tuple)) else [own]:
                self._send(tensor, others * _bytes(tensor))
        elif name == "alltoall_base_":
            self._all_to_all(args[1], args[4])
        elif name == "all_to_all_single":
            self._all_to_all(args[0], args[2])
        elif name == "alltoall_":
            for rank, tensor in enumerate(args[1]):
                self._send(tensor, _bytes(tensor) if rank != get_rank() else 0, raw=True)
        elif name == "broadcast_":
            for tensor in args[0]:
                self._send(tensor, others * _bytes(tensor) if args[2] == get_rank() else 0)
        elif name == "send":
            for tensor in args[0]:
                self._send(tensor, _bytes(tensor))
        elif name not in ("barrier", "recv_", "recv_any_source_", "wait_tensor"):
            raise NotImplementedError(f"the wire counter does not know the collective {name}: teach it what is sent")

    def _all_to_all(self, rows: Tensor, sizes: Sequence[int]) -> None:
        if not sizes:  # equal shares
            sizes = [len(rows) // get_world_size()] * get_world_size()
        row = _bytes(rows) // len(rows) if len(rows) else 0
        self._send(rows, row * (sum(sizes) - sizes[get_rank()]), raw=True)

    def _reduce(self, tensor: Tensor) -> None:
        ring = 2 * (get_world_size() - 1) / get_world_size() * _bytes(tensor)
        if tensor.is_floating_point():
            self.wire.numbers += tensor.numel()
            self.wire.total += ring
        else:
            self._integers(tensor, ring)

    def _send(self, tensor: Tensor, sent: float, *, raw: bool = False) -> None:
        if tensor.is_floating_point() or (raw and tensor.dtype == torch.uint8):
            self.wire.sent += sent
            self.wire.total += sent
        else:
            self._integers(tensor, sent)

    def _integers(self, tensor: Tensor, sent: float) -> None:
        self.wire.control += sent
        self.wire.total += sent
        if tensor.numel() >= max(self.rows, 1) and tensor.dtype != torch.uint8:
            self.wire.permutation += sent


def _loopback_bytes() -> int | None:
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), None)


def count_wire(step: Step, *, rows: int, draws: int, device: torch.device) -> Wire:
    """Mean over ranks and over ``draws`` steps of what is sent. Every rank calls it."""
    synchronize(device)
    barrier()
    before = _loopback_bytes()
    barrier()
    counter = WireCounter(rows)
    with counter:
        for _ in range(draws):
            step()
    synchronize(device)
    barrier()
    after = _loopback_bytes()
    everyone: list[Wire] = all_gather_objects(counter.wire)
    mean = {
        name: sum(getattr(wire, name) for wire in everyone) / len(everyone) / draws
        for name in ("sent", "numbers", "control", "permutation", "total")
    }
    kernel = None
    if before is not None and after is not None and device.type == "cpu" and len(everyone) > 1:
        kernel = (after - before) / draws / len(everyone)
    return Wire(**mean, sent_by_busiest_rank=max(wire.sent for wire in everyone) / draws, kernel=kernel)


# --- Ranks --------------------------------------------------------------------------------------------------------


Job = tuple[Any, ...]  # a function that every rank calls as ``function(settings, *rest)``, and the rest


def run_ranks(jobs: Sequence[Job], world_size: int, settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the jobs one by one on that many new processes; yield what rank 0 returns of each (it must fit in JSON).

    One process gets ``settings.threads`` threads, several one thread each.

    Raises:
        ProcessRaisedException: a rank failed, with its traceback; the others are ended.
    """
    if not jobs:
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which only counts bytes here, talks a lot
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _rank, (world_size, folder, jobs, settings), nprocs=world_size, join=False, start_method="spawn"
        )
        try:
            number, running = 0, True
            while running:
                running = not ranks.join(timeout=0.2)
                while (result := Path(folder) / f"{number}.json").exists():
                    yield json.loads(result.read_text())
                    number += 1
        finally:
            for process in ranks.processes:
                process.terminate()
                process.join()


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the system.

    Else the system clears the pages of a large result anew whenever the top of the heap happened to be free: a
    matter of chance that can take longer than a layer, and falls on whichever variant comes next.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with suppress(OSError, AttributeError):  # another C library: its own ways
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(m_mmap_max, 0)
        glibc.mallopt(m_trim_threshold, 2**28)  # bytes: more than a layer needs, little beside eight ranks


def _rank(rank: int, world_size: int, folder: str, jobs: Sequence[Job], settings: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its ranks
    if world_size <= usable_cores():  # more ranks are no clean timing anyway, and need the memory
        _keep_freed_memory()
    torch.set_num_threads(settings.threads if world_size == 1 else 1)
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if settings.device == "cuda" else "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    try:
        for number, (job, *rest) in enumerate(jobs):
            result = job(settings, *rest)
            if rank == 0:
                unfinished = Path(folder) / "unfinished"
                unfinished.write_text(json.dumps(result))
                unfinished.rename(Path(folder) / f"{number}.json")
        barrier()
    finally:
        dist.destroy_process_group()


def too_many_ranks(world_size: int, settings: argparse.Namespace) -> str | None:
    """Why that many ranks cannot run here, or None. Processes may outnumber cores, but not GPUs."""
    if settings.device == "cuda" and world_size > torch.cuda.device_count():
        return f"{torch.cuda.device_count()} GPU(s) here"
    return None


def device_of(settings: argparse.Namespace) -> torch.device:
    if settings.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# --- Results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A figure against the goal it was given."""

    what: str
    figure: float
    sign: str  # "<=", ">=" or "+-" (within 5%)
    limit: float

    @property
    def met(self) -> bool:
        if self.sign == "<=":
            return self.figure <= self.limit
        if self.sign == ">=":
            return self.figure >= self.limit
        return abs(self.figure - self.limit) <= 0.05 * self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Goal:
    """A bar on time: at most ``limit`` times as long as ``against`` ("<="), or at least as many times as fast (">=").

    For float32 on CPUs, at the named shapes, layouts and numbers of ranks (None: any).
    """

    variant: str
    against: str
    sign: str
    limit: float
    shapes: Sequence[Shape]
    layouts: Sequence[str] | None = None
    ranks: Sequence[int] | None = None


@dataclass
class Row:
    """One variant in one setting: a line of a table."""

    section: str
    title: str  # of the table: what all its lines have in common
    setting: dict[str, Any]  # ranks, threads, shape, layout, dtype
    variant: str
    reference: str
    time: Spread  # milliseconds
    ratio: Spread  # to the reference, round by round
    rounds: int
    rounds_pressured: int
    rounds_used: int
    row_bytes: float  # S: bytes of a rank's rows, mean over ranks
    peak: float  # in units of S
    wire: Wire | None = None
    bars: list[Bar] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bars": [bar.as_dict() for bar in self.bars]}


def timed_row(rounds: Rounds, name: str, reference: str, **facts: Any) -> Row:
    """A row with the times of ``name``."""
    time_ms = rounds.time(name)
    return Row(
        variant=name,
        reference=reference,
        time=Spread(time_ms.median * 1e3, time_ms.low * 1e3, time_ms.high * 1e3),
        ratio=rounds.ratio(name, reference),
        rounds=len(rounds.pressure),
        rounds_pressured=rounds.pressured,
        rounds_used=len(rounds.used),
        **facts,
    )


def make_setting(settings: argparse.Namespace, shape: Shape, layout: str) -> dict[str, Any]:
    """In what setting a row was measured, on the rank that asks."""
    return {
        "ranks": get_world_size(),
        "threads": torch.get_num_threads(),
        "device": settings.device,
        "dtype": settings.dtype,
        "shape": shape,
        "layout": layout,
    }


def goal_bars(goals: Sequence[Goal], row: Row, rounds: Rounds) -> list[Bar]:
    """The goals that are meant for this row and whose other side was measured too."""
    here = row.setting
    if here["device"] != "cpu" or here["dtype"] != "float32":
        return []
    found = []
    for goal in goals:
        meant = goal.variant == row.variant and here["shape"] in goal.shapes and goal.against in rounds.seconds
        if not meant or here["layout"] not in (goal.layouts or [here["layout"]]):
            continue
        if here["ranks"] not in (goal.ranks or [here["ranks"]]):
            continue
        if goal.sign == "<=":
            what, figure = f"time / {goal.against}", rounds.ratio(goal.variant, goal.against).median
        else:
            what, figure = f"× faster than {goal.against}", rounds.ratio(goal.against, goal.variant).median
        found.append(Bar(what, figure, goal.sign, goal.limit))
    return found


def machine_facts(settings: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to know about the machine before believing a number."""
    model = platform.processor()
    with suppress(OSError):  # the file is Linux's; elsewhere platform's word must do
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
        kinds = [line.partition(":")[0].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()]
        model = next((name for kind, name in zip(kinds, names, strict=True) if kind == "model name"), model)
    peers = {}
    for name in ("timm", "lightly", "torchvision", "detectron2", "fvcore", "faiss-cpu"):
        with suppress(metadata.PackageNotFoundError):  # absent, or used from its source folder
            peers[name] = metadata.version(name)
    return {
        "cpu": model,
        "cores": usable_cores(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": settings.threads,
        "threads_per_rank": 1,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": peers,
    }


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Report:
    """Prints each table when its section is done, and keeps the JSON file up to date."""

    def __init__(self, benchmark: str, settings: argparse.Namespace) -> None:
        self.console = Console() if sys.stdout.isatty() else Console(width=200)
        self.path: Path | None = settings.json
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "machine": machine_facts(settings),
            "settings": {name: value for name, value in vars(settings).items() if name != "json"},
            "timings": [],
            "figures": [],
            "skipped": [],
        }
        machine = self.content["machine"]
        place = machine["gpu"] if settings.device == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
        threads = f"threads: {machine['threads']} in one process, 1 on each of several ranks"
        self.console.print(f"{place}, torch {machine['torch']}, {threads}", highlight=False)
        self._save()

    def add_timings(self, rows: list[dict[str, Any]]) -> None:
        self.content["timings"] += rows
        for title in dict.fromkeys(row["title"] for row in rows):
            self.console.print(_timing_table(title, [row for row in rows if row["title"] == title]))
        self._save()

    def add_figures(self, rows: list[dict[str, Any]]) -> None:
        """Rows of plain figures: "section", "title", "setting", "variant", "values" ({column: number}), "bars"."""
        self.content["figures"] += rows
        for title in dict.fromkeys(row["title"] for row in rows):
            self.console.print(_figure_table(title, [row for row in rows if row["title"] == title]))
        self._save()

    def add_skipped(self, skipped: Iterable[Sequence[str]]) -> None:
        for name, reason in skipped:
            entry = {"name": name, "reason": reason}
            if entry not in self.content["skipped"]:
                self.content["skipped"].append(entry)
                self.console.print(f"[yellow]left out:[/] {name}: {reason}", highlight=False)
        self._save()

    def close(self) -> None:
        """Sum up: how many bars are met, and which are missed."""
        bars = [(row, bar) for row in (*self.content["timings"], *self.content["figures"]) for bar in row["bars"]]
        missed = [(row, bar) for row, bar in bars if not bar["met"]]
        self.console.print(f"{len(bars) - len(missed)} of {len(bars)} bars met" + (":" if missed else ""))
        for row, bar in missed:
            self.console.print(f"  [red]missed[/] {row['title']}: {row['variant']}: {_bar(bar)}", highlight=False)
        if self.path is not None:
            self.console.print(f"written: {self.path}", highlight=False)

    def _save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def _bar(bar: dict[str, Any]) -> str:
    sign = {"<=": "≤", ">=": "≥", "+-": "= (±5%)"}[bar["sign"]]
    return f"{bar['what']}: {bar['figure']:.4g} {sign} {bar['limit']:.4g}"


def _bars(bars: list[dict[str, Any]]) -> str:
    return "\n".join(f"{'[green]met[/]' if bar['met'] else '[red]missed[/]'} {_bar(bar)}" for bar in bars)


def _figure_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in rows[0]["values"]:
        table.add_column(column, justify="right")
    table.add_column("bar")
    for row in rows:
        table.add_row(row["variant"], *(f"{value:.3g}" for value in row["values"].values()), _bars(row["bars"]))
    return table


def _timing_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """One table: the variants of one setting."""
    first = rows[0]
    noise = f"{first['rounds_pressured']} of {first['rounds']} rounds under CPU pressure"
    if first["rounds_used"] < first["rounds"]:
        noise += ", left out"
    table = Table(title=title, title_justify="left", caption=noise, caption_justify="left")
    table.add_column("variant", no_wrap=True)
    columns = ["ms", f"× {first['reference']}", r"\[q1, q3]", "peak / S"]
    wired = any(row["wire"] is not None for row in rows)
    if wired:
        columns += ["wire MB", "rows / S", "numbers", "integer B", "kernel / wire"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap="q1" in column)
    table.add_column("bar")
    for row in rows:
        ratio = row["ratio"]
        cells = [
            row["variant"],
            f"{row['time']['median']:.2f}",
            f"{ratio['median']:.2f}",
            rf"\[{ratio['low']:.2f}, {ratio['high']:.2f}]",
            f"{row['peak']:.2f}",
        ]
        if wired:
            wire = row["wire"]
            # A few bytes say nothing about the kernel's count: packet headers and barriers outweigh them.
            compared = wire["kernel"] is not None and wire["total"] > 100_000
            cells += [
                f"{wire['total'] / 1e6:.2f}",
                f"{wire['sent'] / row['row_bytes']:.2f}",
                f"{wire['numbers']:.0f}",
                f"{wire['control']:.0f}",
                f"{wire['kernel'] / wire['total']:.2f}" if compared else "",
            ]
        table.add_row(*cells, _bars(row["bars"]))
    return table


# --- Command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _shape(text: str) -> Shape:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1 or sizes[0] * sizes[2] * sizes[3] == 1:
        raise argparse.ArgumentTypeError(f"expected N,C,H,W with two values or more in a channel, got {text!r}")
    return sizes


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(number) for number in text.split(",")]
    except ValueError:
        ranks = [0]
    if min(ranks) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of ranks such as 1,2,4, got {text!r}")
    return ranks


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def make_parser(
    description: str, *, ranks: list[int] | None = None, threads: int, shapes: str | None = None
) -> argparse.ArgumentParser:
    """The options that the benchmarks take; those of ranks and of tensors only with ``ranks`` and ``shapes``."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repeats", type=at_least_one, default=15, metavar="N", help="rounds of each comparison (default: 15)")
    if ranks is not None:
        add(
            "--ranks",
            type=_ranks,
            default=ranks,
            metavar="W,...",
            help=f"numbers of ranks (default: {','.join(map(str, ranks))})",
        )
    if shapes is not None:
        add(
            "--shape",
            type=_shape,
            action="append",
            metavar="N,C,H,W",
            help=f"of each rank; may be repeated ({shapes})",
        )
        add("--dtype", choices=sorted(DTYPES), default="float32", help="of the input (default: float32)")
    add(
        "--threads",
        type=at_least_one,
        default=threads,
        metavar="N",
        help=f"of a single process; each of several ranks has one (default: {threads})",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--only", action="append", metavar="NAME", help="a section or a variant by name; may be repeated")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    add(
        "--max-pressure",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="a round in which tasks waited for a core for more than this share is left out, if enough others remain "
        "(default: 0.03)",
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, sections: Sequence[str], variants: Sequence[str]
) -> argparse.Namespace:
    """Parse and check; ``only_sections`` and ``only_variants`` (None: all) say what ``--only`` asks for."""
    settings = parser.parse_args(arguments)
    known = {name.lower(): name for name in (*sections, *variants)}
    chosen = []
    for name in settings.only or []:
        if name.lower() not in known:
            parser.error(f"--only: no section or variant {name!r}; choose from {', '.join(known.values())}")
        chosen.append(known[name.lower()])
    settings.only_sections = [name for name in chosen if name in sections] or list(sections)
    settings.only_variants = [name for name in chosen if name not in sections] or None
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if settings.json is not None and not settings.json.parent.is_dir():
        parser.error(f"--json: no folder {settings.json.parent}")
    return settings


def wanted(name: str, settings: argparse.Namespace) -> bool:
    return settings.only_variants is None or name in settings.only_variants


def progress(place: str) -> Callable[[str], None]:
    """A line on stderr that says what is being done: rewritten on a terminal, else one line a place."""
    if get_rank() != 0:
        return lambda text: None
    if not sys.stderr.isatty():
        print(f"{place} ...", file=sys.stderr, flush=True)
        return lambda text: None
    return lambda text: print(f"\r\033[K{place}: {text}", end="\r", file=sys.stderr, flush=True)
