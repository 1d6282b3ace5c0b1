"""Checkpoint files: written whole or not at all, checked before they are trusted, plain data only.

A checkpoint is torch's zip file, whose members carry CRC-32 sums: a truncated or bit-flipped file is
recognized without a sidecar and without torch. Names count completed steps.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leakfree.errors import CheckpointError, RunError
from leakfree.records import atomic_file, write_atomic

__all__ = [
    "FINAL",
    "checkpoint_name",
    "damage",
    "disk_is_full",
    "list_checkpoints",
    "newest_valid",
    "point_to",
    "read_checkpoint",
    "remove_old",
    "write_checkpoint",
]

FINAL = "model_final.pt"
_NAME = re.compile(r"checkpoint_(\d{7,})\.pt\Z")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after ``step`` completed steps."""
    return f"checkpoint_{step:07d}.pt"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first; that of the finished training before all others."""
    folder = Path(folder)
    steps = {path: int(match[1]) for path in folder.glob("checkpoint_*.pt") if (match := _NAME.match(path.name))}
    final = [folder / FINAL] if (folder / FINAL).is_file() else []
    return final + sorted(steps, key=lambda path: steps[path], reverse=True)


def damage(path: str | os.PathLike[str]) -> str:
    """What is wrong with a checkpoint file; "" if it is whole."""
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        return "no regular file"
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return f"checksum of {broken} differs" if broken is not None else ""


def newest_valid(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and one line for each damaged one that was passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    notices: list[str] = []
    for path in list_checkpoints(folder):
        fault = damage(path)
        if not fault:
            return path, notices
        notices.append(f"{path} is damaged ({fault}): going back to the one before")
    if notices:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in list_checkpoints(folder))}); "
            "delete them to start from the beginning, or put back a copy"
        )
    return None, notices


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``content`` so that a crash at any moment leaves the old file or the new one, on disk.

    Raises:
        RunError: the disk is full or refuses; nothing is left behind and older files are intact.
    """
    import torch

    path = Path(path)
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except BaseException as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise RunError(
            f"{path}: the checkpoint could not be written ({reason.strerror}); earlier ones are intact: "
            "make room, then continue with --resume"
        ) from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file can run. One of our trainings has a "leakfree" entry.

    Raises:
        CheckpointError: it is missing, damaged, or no dict.
    """
    from leakfree.state import read_torch_file

    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def remove_old(folder: str | os.PathLike[str], keep: int) -> None:
    """Keep the newest ``keep`` periodic checkpoints; the final one is not counted and stays."""
    periodic = [path for path in list_checkpoints(folder) if path.name != FINAL and path.is_file()]
    for path in periodic[keep:]:
        path.unlink(missing_ok=True)


def point_to(path: Path) -> None:
    """Write the name of the newest checkpoint into ``last_checkpoint``."""
    write_atomic(path.parent / "last_checkpoint", path.name + "\n")


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _system_error(error: BaseException) -> OSError | None:
    """The OSError behind ``error``: torch's writer turns it into a RuntimeError of its own."""
    return next((item for item in _chain(error) if isinstance(item, OSError)), None)


def disk_is_full(error: BaseException) -> OSError | None:
    """The "no space" error that ``error`` is or comes from, if it does."""
    return next((item for item in _chain(error) if isinstance(item, OSError) and item.errno in _FULL), None)
