"""CIFAR-10 and CIFAR-100 from the folders of their "python version", as torchvision reads them.

The files are pickles, and a pickle names functions to call. Here nothing that a file names is called: what it would
have made is noted by name and arguments, and plain arrays, texts and lists are made of the notes afterwards.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images"; the layout is described at
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from leakfree.data.digits import Split
from leakfree.errors import DataError

__all__ = ["CIFAR", "Cifar", "cifar_folder", "read_cifar"]

SIDE = 32  # pixels
_ROW = 3 * SIDE * SIDE
_MOST_TUPLES = 24  # in a file: shapes and types of an array or two


@dataclass(frozen=True)
class _Layout:
    folder: str
    files: dict[Split, tuple[str, ...]]
    names: tuple[str, str]  # the file that names the classes, and its key
    labels: str  # key in the other files
    archive: str


CIFAR = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "val": ("test_batch",)},
        ("batches.meta", "label_names"),
        "labels",
        "cifar-10-python.tar.gz",
    ),
    "cifar100": _Layout(
        "cifar-100-python",
        {"train": ("train",), "val": ("test",)},
        ("meta", "fine_label_names"),
        "fine_labels",
        "cifar-100-python.tar.gz",
    ),
}  # by the names that the schema knows


@dataclass(frozen=True)
class Cifar:
    """One split: ``pixels`` uint8 (N, 3, 32, 32), ``labels`` int64 (N,), names of the ``classes`` (CIFAR-100: fine)."""

    pixels: Tensor
    labels: np.ndarray
    classes: list[str]


def read_cifar(name: str, path: Path, split: Split) -> Cifar:
    """Read a split; ``val`` is the official test set.

    Args:
        name: a key of ``CIFAR``.
        path: the folder of the files, or the one that it lies in.

    Raises:
        DataError: a file that is missing, damaged, names anything but arrays, or does not hold what it should.
    """
    layout, folder = CIFAR[name], cifar_folder(name, path)
    classes = _class_names(folder / layout.names[0], layout)
    parts = [_read_part(folder / file, layout, len(classes)) for file in layout.files[split]]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Cifar(torch.from_numpy(pixels), labels, classes)


def cifar_folder(name: str, path: Path) -> Path:
    """The folder of the files, which ``path`` is or holds.

    Raises:
        DataError: it is not there.
    """
    layout = CIFAR[name]
    folder = path if path.name == layout.folder else path / layout.folder
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; unpack {layout.archive} in {folder.parent}, or name the folder it is in"
        )
    return folder


def _class_names(path: Path, layout: _Layout) -> list[str]:
    names = _read(path, layout).get(layout.names[1])
    if not isinstance(names, list) or not names or len(set(map(_text, names))) < len(names):
        raise DataError(f"{path}: {layout.names[1]} should be a list of the names of the classes, each once")
    return [_text(name) for name in names]


def _read_part(path: Path, layout: _Layout, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _read(path, layout)
    for key in ("data", layout.labels):
        if key not in content:
            there = ", ".join(sorted(map(str, content)))
            raise DataError(f"{path}: has no {key!r}, only {there or 'nothing'}: this is no file of {layout.archive}")
    pixels, labels = content["data"], content[layout.labels]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_ROW,):
        what = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{path}: data should be uint8 (images, {_ROW}), got {what}")
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(values, list) or not values or any(type(value) is not int for value in values):
        raise DataError(f"{path}: {layout.labels} should be a list of integers, one for each image")
    if len(values) != len(pixels):
        raise DataError(
            f"{path}: {len(pixels)} images and {len(values)} {layout.labels}; unpack {layout.archive} again"
        )
    if not 0 <= min(values) <= max(values) < num_classes:
        raise DataError(
            f"{path}: {layout.labels} should be from 0 to {num_classes - 1}, got {min(values)} to {max(values)}"
        )
    return pixels.reshape(-1, 3, SIDE, SIDE), np.array(values, dtype=np.int64)


# ------------------------------------------------------------------------------------------ pickles

_NAMED = {
    **{(f"{root}.multiarray", "_reconstruct"): "_reconstruct" for root in ("numpy.core", "numpy._core")},
    **{(f"{root}.numeric", "_frombuffer"): "_frombuffer" for root in ("numpy.core", "numpy._core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes for Python 2
}  # all that CIFAR's files name, as any version of Python and numpy writes them


class _Note:
    """What a file would have made: a name with arguments, and a state that would have been set. Nothing is done."""

    name = ""
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Refused(Exception):
    """A file names something else."""


class _NotingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        noted = _NAMED.get((module, name))
        if noted is None:
            raise _Refused(f"it names {module}.{name}, which was not looked up: only arrays and plain values are read")
        return type(noted, (_Note,), {"name": noted})  # a class of its own: a file cannot change ours


def _check_size(file: BinaryIO, size: int) -> None:
    """Refuse a few bytes that would take endless memory or time: a table of 2**32 places, a tuple of a tuple twice, and
    so on, whose hash takes 2**60 steps."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(file):
        tuples += "TUPLE" in opcode.name
        if tuples > _MOST_TUPLES or ("PUT" in opcode.name and int(argument or 0) > size):
            raise _Refused(f"it has {opcode.name} in a way that no file of CIFAR has")
    file.seek(0)


def _read(path: Path, layout: _Layout) -> dict[str, Any]:
    """The dictionary of a file: texts as keys; arrays, lists and texts (bytes) as values."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
            raise _Refused("it is no regular file")
        with path.open("rb") as file:
            _check_size(file, path.stat().st_size)
            found = _NotingUnpickler(file, encoding="bytes").load()
        if not isinstance(found, dict):
            raise _Refused(f"it holds a {type(found).__name__}, and no dictionary")
        return {_text(key): _made(value) for key, value in found.items()}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; unpack {layout.archive} again") from None
    except Exception as error:  # whatever damaged bytes lead to: the file is at fault
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: broken file: {reason}; unpack {layout.archive} again") from None


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _made(value: Any) -> Any:
    """The array of a note; plain values as they are."""
    if not isinstance(value, _Note):
        return value
    if value.name == "_reconstruct":
        _, shape, dtype, fortran, raw = value.state
        columns = bool(fortran)
    elif value.name == "_frombuffer":
        raw, dtype, shape, order = value.args
        columns = _text(order) == "F"
    else:
        raise _Refused(f"a {value.name} stands where an array should")
    kind = _dtype(dtype)
    return np.frombuffer(_bytes(raw), kind).reshape(shape, order="F" if columns else "C")


def _bytes(value: Any) -> bytes | bytearray:
    if isinstance(value, _Note) and value.name == "encode" and _text(value.args[1]) == "latin1":
        return str(value.args[0]).encode("latin1")
    if isinstance(value, bytes | bytearray):
        return value
    raise _Refused(f"an array of a {type(value).__name__}")


def _dtype(value: Any) -> np.dtype[Any]:
    """Of plain numbers only: never one that holds objects."""
    kind = _text(value.args[0]) if isinstance(value, _Note) and value.name == "dtype" else ""
    if not re.fullmatch("[uif][1248]", kind):
        raise _Refused("an array of other than plain numbers")
    big = bool(value.state) and _text(value.state[1]) == ">"
    return np.dtype((">" if big else "<") + kind)
