"""What a thread is doing, told from its Python stack: the collective it waits in, or the line it is at. Torch-free."""

from __future__ import annotations

import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

__all__ = ["Place", "place_of"]

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_DISTRIBUTED = os.path.join("torch", "distributed", "")
_LIBRARIES = (*{sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},)
_THIRD_PARTY = ("site-packages", "dist-packages")
_BACKWARD = "the gradient all-reduce of backward"
_DEEPEST = 40  # frames of a stack that are told


@dataclass(frozen=True)
class Place:
    """Where a thread is.

    Attributes:
        collective: the name of the collective it waits in; "" = it waits in none.
        doing: what else it does: "data loading", or the name of a function.
        where: ``file:line``, the innermost of leakfree's or the user's own.
        stack: the Python stack, innermost last.
    """

    collective: str
    doing: str
    where: str
    stack: str


def place_of(thread: int, frames: Mapping[int, FrameType] | None = None) -> Place:
    """The place of the thread with identifier ``thread``; ``frames`` are by default those of now."""
    frames = sys._current_frames() if frames is None else frames
    if thread not in frames:
        return Place("", "nothing (its thread has ended)", "", "")
    stack = list(traceback.walk_stack(frames[thread]))  # innermost first
    collective = _collective(stack)
    if collective == _BACKWARD:  # on a GPU the Python parts of a backward run in threads of autograd
        for other, frame in frames.items():
            inner = _collective(list(traceback.walk_stack(frame))) if other != thread else ""
            if inner and inner != _BACKWARD:
                collective = f"{inner} of the backward"
    own = [item for item in stack if _is_own(item[0].f_code.co_filename)]
    wrapper = os.path.join(_PACKAGE, "distributed.py")
    frame, line = next((item for item in own if item[0].f_code.co_filename != wrapper), own[0] if own else stack[0])
    loading = any(os.path.join("torch", "utils", "data", "") in item.f_code.co_filename for item, _ in stack)
    return Place(
        collective=collective,
        doing="data loading" if loading else frame.f_code.co_name,
        where=f"{_short(frame.f_code.co_filename)}:{line}",
        stack="".join(traceback.StackSummary.extract(iter(stack[:_DEEPEST][::-1]), lookup_lines=True).format()),
    )


def _collective(stack: list[tuple[FrameType, int]]) -> str:
    file, line = stack[0][0].f_code.co_filename, stack[0][1]
    if _DISTRIBUTED in file:
        name = ""
        for frame, _ in stack:  # all_reduce inside of all_gather_object is not what the caller knows
            if _DISTRIBUTED not in frame.f_code.co_filename:
                break
            if frame.f_code.co_name not in ("wrapper", "__call__", "__torch_dispatch__"):
                name = frame.f_code.co_name
        return name or stack[0][0].f_code.co_name
    if stack[0][0].f_code.co_name == "_engine_run_backward":
        return _BACKWARD
    if file.startswith(os.path.join(_PACKAGE, "training", "agreement.py")) and stack[0][0].f_code.co_name == "meet":
        return "the meeting of all ranks"  # it looks into the store again and again
    if _is_own(file) and re.search(r"\.wait\(\)", linecache.getline(file, line)):
        return "an asynchronous collective"
    return ""


def _is_own(file: str) -> bool:
    if file.startswith(_PACKAGE):
        return not file.startswith(os.path.join(_PACKAGE, "training", "ranks.py"))
    return not (
        file.startswith(("<frozen", *_LIBRARIES)) or any(f"{os.sep}{name}{os.sep}" in file for name in _THIRD_PARTY)
    )


def _short(file: str) -> str:
    if file.startswith(_PACKAGE):
        return os.path.join("leakfree", file[len(_PACKAGE) :])
    relative = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
    return relative
