"""What the user reads: lines on the console and in ``log.txt``, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from leakfree import __version__
from leakfree.distributed import get_rank, get_world_size
from leakfree.records import RunRecord
from leakfree.training.watchdog import progress

__all__ = ["LOG", "StepBar", "environment", "first_lines", "logging_to", "on_terminal", "result_lines", "track"]

LOG = logging.getLogger("leakfree")
_QUIET = ("lightning", "lightning.pytorch", "lightning.fabric", "torchmetrics")


class _Console(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is now: a progress bar replaces it to keep lines above itself."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "periodic", False) and on_terminal():
            return  # the bar shows it
        self.stream = sys.stdout
        super().emit(record)


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # called from an except block: a full disk must end the run, not fill stderr


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode("utf-8", "backslashreplace").decode()  # a folder's name may be no text

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return text if record.levelno <= logging.INFO else text.replace("] ", f"] {record.levelname}: ", 1)


@contextmanager
def logging_to(folder: Path, rank: int) -> Iterator[None]:
    """Inside, rank 0 logs to the console and ``log.txt``; the others log what is wrong to ``log.txt.rankN``."""
    handlers: list[logging.Handler] = (
        [_Console(), _File(folder / "log.txt")] if rank == 0 else [_File(folder / f"log.txt.rank{rank}", delay=True)]
    )
    level = logging.INFO if rank == 0 else logging.WARNING
    for handler in handlers:
        handler.setLevel(level)
        handler.setFormatter(_Format("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))
    listeners = [LOG, logging.getLogger("py.warnings")]
    before = [(logger, logger.level, logger.propagate) for logger in listeners]
    quiet = [(logger, logger.level) for logger in map(logging.getLogger, _QUIET)]
    with warnings.catch_warnings():
        _silence_advice()
        logging.captureWarnings(True)
        try:
            for logger in listeners:
                logger.setLevel(level)
                logger.propagate = False
                for handler in handlers:
                    logger.addHandler(handler)
            for logger, _ in quiet:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            logging.captureWarnings(False)
            for logger, old_level, propagate in before:
                logger.setLevel(old_level)
                logger.propagate = propagate
                for handler in handlers:
                    logger.removeHandler(handler)
            for logger, old_level in quiet:
                logger.setLevel(old_level)
            for handler in handlers:
                handler.close()


def _silence_advice() -> None:
    """Hints of libraries that do not fit how they are used here."""
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")


def on_terminal() -> bool:
    """Whether this is the rank that talks, to a terminal."""
    return get_rank() == 0 and sys.__stdout__ is not None and sys.__stdout__.isatty()


# ------------------------------------------------------------------------------------- progress


class StepBar:
    """The progress bar of training; on anything but rank 0's terminal it does nothing."""

    def __init__(self, max_steps: int, start_step: int) -> None:
        self._bar: Progress | None = None
        if on_terminal():
            self._bar = _bar("{task.fields[loss]}")
            self._task = self._bar.add_task("training", total=max_steps, completed=start_step, loss="")

    def start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def show(self, step: int, loss: torch.Tensor) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"loss {loss.item():.3f}")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """Pass ``batches`` on: rank 0 says what for, and shows a bar on a terminal. Each is a progress of this rank."""
    batches = _Watched(batches, what)
    if get_rank() != 0:
        yield from batches
        return
    LOG.info("evaluating: %s", what)
    if not on_terminal():
        yield from batches
        return
    with _bar() as bar:
        yield from bar.track(batches, total=batches.total, description=what)


class _Watched:
    """Batches of an evaluation that tell the watchdog of each."""

    def __init__(self, batches: Iterable[Any], what: str) -> None:
        self.batches = batches
        self.what = what
        self.total = len(batches) if isinstance(batches, Sized) else None

    def __iter__(self) -> Iterator[Any]:
        progress(f"{self.what}: the first batch", slow=True)
        for number, batch in enumerate(self.batches, start=1):
            progress(f"{self.what}: batch {number}")
            yield batch
        progress(f"what comes after {self.what}", slow=True)


def _bar(*more: str) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    return Progress(*columns, *map(TextColumn, more), console=Console(), transient=True)


# ---------------------------------------------------------------------------------------- texts


def environment(device: torch.device, num_threads: int) -> dict[str, Any]:
    """What a record tells of the machine and the versions."""
    return {
        "leakfree": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightning": lightning.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "world_size": get_world_size(),
        "num_threads": num_threads,
        "command": shlex.join(sys.argv),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def first_lines(found: dict[str, Any], batch: dict[str, Any], folder: Path) -> list[str]:
    """The head of the log: who runs (``found`` by :func:`environment`), with what, on which three batch sizes."""
    normalization = "; ".join(f"{part}: {size}" for part, size in batch.get("normalization", {}).items())
    return [
        f"rank 0 of {found['world_size']} on {found['device']}, {found['num_threads']} threads per rank",
        ", ".join(f"{name} {found[name]}" for name in ("leakfree", "python", "torch", "torchvision", "lightning")),
        f"command: {found['command']}",
        f"config: {(folder / 'config.yaml').resolve()}",
        f"batch: {batch.get('total')} images in total, {batch.get('per_rank')} per rank; "
        f"normalized together: {normalization}",
    ]


def result_lines(record: RunRecord) -> list[str]:
    """The results as a small table: statistics in rows, metrics in columns."""
    known = [name for values in record.results.values() for name, value in values.items() if value is not None]
    metrics = list(dict.fromkeys(known))
    rows = [["statistics", *metrics]]
    for statistics, values in record.results.items():
        rows.append([statistics, *(_number(values.get(name)) for name in metrics)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None) -> str:
    return "n.a." if value is None else f"{value:.4f}"
