"""The checkpoints in the folder of a run: their names, the newest that is whole, and how many stay.

Names count completed steps. What a file is, and how damage is seen: :mod:`leakfree.sealed`. Torch-free.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from leakfree.errors import CheckpointError
from leakfree.records import write_atomic
from leakfree.sealed import damage

__all__ = ["FINAL", "Shelf", "checkpoint_name", "list_checkpoints", "newest_valid"]

FINAL = "model_final.pt"
_NAME = re.compile(r"checkpoint_(\d{7,})\.pt\Z")


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after ``step`` completed steps."""
    return f"checkpoint_{step:07d}.pt"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, newest first; that of the finished training before all others."""
    folder = Path(folder)
    steps = {path: int(match[1]) for path in folder.glob("checkpoint_*.pt") if (match := _NAME.match(path.name))}
    final = [folder / FINAL] if (folder / FINAL).is_file() else []
    return final + sorted(steps, key=lambda path: steps[path], reverse=True)


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


class Shelf:
    """Keeps the folder of a running training in order: which checkpoint is the last, and which may go.

    Args:
        keep: whole periodic checkpoints that stay; the final one is not counted and stays.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._whole: dict[Path, tuple[int, ...]] = {}  # as it was when it was found to be whole

    def put(self, path: Path) -> None:
        """Enter ``path``, which was just written: ``last_checkpoint`` names it, and those past ``keep`` are removed.

        A damaged one is not counted, so that one whole checkpoint stays at least, whatever became of the others.
        One is read through only if it changed since the last time.
        """
        write_atomic(self.folder / "last_checkpoint", path.name + "\n")
        self._whole[path] = _marks(path)
        periodic = [item for item in list_checkpoints(self.folder) if item.name != FINAL and item.is_file()]
        kept = 0
        for item in periodic:
            if kept == self.keep:
                item.unlink(missing_ok=True)
                self._whole.pop(item, None)
            elif self._is_whole(item):
                kept += 1

    def _is_whole(self, path: Path) -> bool:
        marks = _marks(path)
        if self._whole.get(path) != marks:
            self._whole.pop(path, None)
            if damage(path):
                return False
            self._whole[path] = marks
        return True


def _marks(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
