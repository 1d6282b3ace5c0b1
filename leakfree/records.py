"""The records a run leaves in its output folder, and how they are written and read.

Torch-free on purpose: ``report`` reads these files without loading a training stack.
Every write is atomic: a reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from leakfree.errors import RunError

__all__ = ["Evaluation", "RunRecord", "atomic_file", "read_metrics", "read_record", "write_atomic", "write_record"]

FORMAT = 1


@dataclass
class RunRecord:
    """What ``compare`` knows of a run: the content of ``record.json``.

    Metrics are plain numbers or None (= does not apply to this run, with the reason in ``notes``).
    AP and accuracies are shares in [0, 1]; times are seconds; memory is MiB (2**20 bytes).
    """

    name: str  # of the output folder
    task: str
    status: str  # running | interrupted | finished
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    # steps, seconds, seconds_per_step, data_seconds_per_step, peak_memory_mib
    timing: dict[str, float | None] = field(default_factory=dict)
    # total, per_rank, normalization: what one forward of each part of the model normalizes together
    batch: dict[str, Any] = field(default_factory=dict)
    # statistics ("population", "precise", "image", "target", ...) -> metric ("bbox/AP", "accuracy") -> value
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    # "influence" | "composition" | "roi_accuracy/train" | "roi_accuracy/val" | "pairs" -> name -> value
    leakage: dict[str, dict[str, float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # each start of the training: started (Unix s), from_step, host, job (of Slurm, ""), world_size, and how it ended:
    # "finished", "stopped by SIGTERM", "interrupted", "failed: ...", "" (it runs, or was killed)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    # each change of the number of ranks: step, before, now, changes of the config (key, before, now)
    conversions: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT


_KINDS: dict[str, type] = {
    "name": str,
    "task": str,
    "status": str,
    "seed": int,
    "config": dict,
    "environment": dict,
    "timing": dict,
    "batch": dict,
    "results": dict,
    "leakage": dict,
    "notes": list,
}  # what a file must hold under these names


@dataclass
class Evaluation:
    """The part of :class:`RunRecord` that an evaluation fills."""

    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    leakage: dict[str, dict[str, float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write (and read back) that takes the place of ``path`` when the block ends well.

    A crash at any moment, an exception or a full disk leaves the old file (or none) and, but for a killed
    process, no temporary one; those are named ``.<name>.*.tmp``.
    """
    path = Path(path)
    # not mkstemp: it takes all rights from others, and to learn which the user leaves them means to set the umask,
    # which is the whole process's
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Write ``text`` to ``path`` whole or not at all; see :func:`atomic_file`.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    with atomic_file(path) as file:
        file.write(text.encode() if isinstance(text, str) else text)


def _plain(value: Any) -> Any:
    """JSON has no NaN: a metric that is not finite is recorded as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_record(folder: str | os.PathLike[str], record: RunRecord) -> Path:
    """Write ``record.json`` into ``folder`` and return its path."""
    path = Path(folder) / "record.json"
    write_atomic(path, json.dumps(_plain(asdict(record)), indent=2) + "\n")
    return path


def read_record(folder: str | os.PathLike[str]) -> RunRecord:
    """Read the record of a run from its output folder (or from the path of a ``record.json``).

    Raises:
        RunError: there is no record, it is not JSON, or it has another format.
    """
    path = Path(folder)
    if os.path.isdir(path) or path.suffix != ".json":
        path = path / "record.json"
    try:
        raw = json.loads(_text_of(path), parse_int=_integer)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path.parent}: not the output folder of a run: it holds no record.json") from None
    except (OSError, ValueError, RecursionError) as error:  # not text, not JSON, endless digits or nesting
        raise RunError(f"{path}: cannot be read as a run's record: {error}") from None
    known = {item.name for item in fields(RunRecord)}
    missing = {"name", "task", "status", "seed", "config"} - set(raw if isinstance(raw, dict) else ())
    if missing:
        raise RunError(f"{path}: not a run's record: it lacks {', '.join(sorted(missing))}")
    if not isinstance(raw.get("format", FORMAT), int) or raw.get("format", FORMAT) > FORMAT:
        raise RunError(f"{path}: written by a newer leakfree (format {raw['format']}, this one reads {FORMAT})")
    record = RunRecord(**{key: value for key, value in raw.items() if key in known})
    for key, kind in _KINDS.items():
        value = getattr(record, key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RunError(f"{path}: {key}: expected {kind.__name__}, got {reprlib.repr(value)}")
    for key, kinds in _ENTRIES.items():
        _check_entries(path, key, getattr(record, key), kinds)
    return record


def _integer(digits: str) -> int | float:
    """One of more than 64 bits is a float: infinite, if need be, and so told as no number."""
    return int(digits) if len(digits) < 20 else float(digits)


def _text_of(path: Path) -> str:
    """The text of a regular file: reading a pipe would wait for a writer, and a device may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file")
    return path.read_text(encoding="utf-8")


_ENTRIES: dict[str, dict[str, tuple[type, ...]]] = {
    "sessions": {
        "started": (int, float), "from_step": (int,), "host": (str,), "job": (str,), "world_size": (int,),
        "ended": (str,),
    },
    "conversions": {"step": (int,), "before": (int,), "now": (int,), "changes": (list,)},
}  # fmt: skip


def _check_entries(path: Path, key: str, entries: Any, kinds: dict[str, tuple[type, ...]]) -> None:
    whole = isinstance(entries, list) and all(
        isinstance(entry, dict) and all(type(entry.get(name)) in types for name, types in kinds.items())
        for entry in entries
    )
    if not whole:
        raise RunError(f"{path}: {key}: expected a list of objects with {', '.join(kinds)}")


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read ``metrics.json`` (one JSON object a line, each with ``step``). A torn last line is left out, as is a row
    that is no object, or whose step is no number.

    Raises:
        RunError: the file cannot be read, or a line before the last is not JSON.
    """
    path = Path(folder) / "metrics.json"
    if not path.exists():
        return []
    try:
        lines = _text_of(path).split("\n")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    lines = lines[:-1] if not lines[-1] else lines
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError):
            if number == len(lines):  # the writer was killed in the middle of a line
                break
            raise RunError(f"{path}:{number}: not a JSON object") from None
        if isinstance(row, dict) and _is_finite(row.get("step", 0)):
            rows.append(row)
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
