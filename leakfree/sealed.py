"""The file of a checkpoint: written whole or not at all, sealed so that damage is seen, of plain data only.

It is torch's zip file with a seal as its comment, which ends the file: ``leakfree sha256:`` and the SHA-256, in hex,
of every byte before the digest. The CRC-32 sums of a zip file are of its members alone; the seal is also of headers,
names and padding, so that any changed bit and any missing byte is found, without a sidecar and without torch.
``torch.load``, ``zipfile`` and ``unzip -z`` read the file as ever. Files without a seal (of before, or of others)
are checked by their CRC-32 sums.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from leakfree.errors import CheckpointError, RunError, one_line
from leakfree.records import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "damage",
    "disk_is_full",
    "map_tensors",
    "read_checkpoint",
    "read_torch_file",
    "write_checkpoint",
]

_SEAL = b"leakfree sha256:"
_DIGEST = 64  # hex digits
_END = struct.Struct("<4s16xH")  # of a zip file: its signature, what is not of interest here, the length of the comment
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIECE = 2**23  # bytes at a time, for which other threads run


# ---------------------------------------------------------------------------------------- the seal


def _digest(file: BinaryIO, length: int) -> bytes:
    """The digest of the first ``length`` bytes.

    Raises:
        EOFError: there are fewer.
    """
    file.seek(0)
    total, piece = hashlib.sha256(), memoryview(bytearray(min(length, _PIECE)))
    while length:
        count = file.readinto(piece[:length])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("it is cut off")
        total.update(piece[:count])
        length -= count
    return total.hexdigest().encode()


def _seal(file: BinaryIO) -> None:
    """Seal the zip file that ``file`` holds.

    Raises:
        OSError: it holds no whole one, or cannot be written.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _END.size, 0))
    last = file.read()
    if len(last) < _END.size or _END.unpack(last) != (b"PK\5\6", 0):
        raise OSError(errno.EIO, "the file is not what was written")
    file.seek(size - 2)
    file.write(struct.pack("<H", len(_SEAL) + _DIGEST) + _SEAL)
    file.flush()
    digest = _digest(file, size + len(_SEAL))
    file.seek(0, os.SEEK_END)
    file.write(digest)


def damage(path: str | os.PathLike[str]) -> str:
    """What is wrong with a checkpoint file; "" if it is whole."""
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        return "no regular file"
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - len(_SEAL) - _DIGEST, 0))
            last = file.read()
            if last.startswith(_SEAL):
                whole = _digest(file, size - _DIGEST) == last[len(_SEAL) :]
                return "" if whole else "its content is not that of its checksum"
        if len(last) < _END.size or _END.unpack(last[-_END.size :]) != (b"PK\5\6", 0):
            return "its end is missing"
        with zipfile.ZipFile(path) as archive:
            if trick := _trick(archive):
                return trick
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return f"checksum of {broken} differs" if broken is not None else ""


# --------------------------------------------------------------------------------------- plain data

# What torch.load(weights_only=True) makes anew, and nothing beside: a subclass is another type.
_ATOMS = {type(None), bool, int, float, complex, str, bytes}


def map_tensors(content: Any, function: Callable[[Tensor], Tensor], *, where: str = "checkpoint") -> Any:
    """A copy of ``content`` with each tensor replaced by ``function(tensor)``, the rest equal to what it was.

    Raises:
        CheckpointError: it holds something that is no plain data, so that reading it back would have to run code;
            it is named by its place, such as ``checkpoint['optimizer_states'][0]['lr']``.
    """
    import torch

    tensors = (torch.Tensor, torch.nn.Parameter)
    names = (torch.dtype, torch.device)

    def copy(value: Any, where: str) -> Any:
        kind = type(value)
        if kind in _ATOMS or kind in names:
            return value
        if kind in tensors:
            if value.layout is not torch.strided or value.is_quantized:
                raise CheckpointError(f"{where}: a {value.layout} tensor cannot be saved; use a dense one")
            return function(value.detach())
        if kind in (dict, OrderedDict, Counter):
            return kind({copy(key, where): copy(item, f"{where}[{key!r}]") for key, item in value.items()})
        if kind in (list, tuple, set, torch.Size):
            return kind(copy(item, f"{where}[{index}]") for index, item in enumerate(value))
        raise CheckpointError(
            f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be saved: a checkpoint holds tensors, numbers, "
            "texts, and lists and dicts of them, so that reading it never runs code"
        )

    return copy(content, where)


# -------------------------------------------------------------------------------- writing and reading


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``content`` so that a crash at any moment leaves the old file or the new one, on disk and sealed.

    Raises:
        CheckpointError: it holds something that is no plain data; nothing is written.
        RunError: the disk is full or refuses; nothing is left behind and older files are intact.
    """
    import torch

    path = Path(path)
    content = map_tensors(content, lambda tensor: tensor)
    try:
        with atomic_file(path) as file:
            try:
                torch.save(content, file.name)  # by name: torch then writes without Python, and training goes on
            except RuntimeError as error:
                raise _why_not_written(file, error) from error
            _seal(file)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(
            f"{path}: the checkpoint could not be written ({error.strerror}); earlier ones are intact: "
            "make room, then continue with --resume"
        ) from error


def _why_not_written(file: BinaryIO, error: RuntimeError) -> Exception:
    """The system's reason, which torch's own writer does not tell: that of writing a little more."""
    try:
        file.seek(0, os.SEEK_END)
        file.write(bytes(_PIECE))
        file.flush()
        os.fsync(file.fileno())
    except OSError as reason:
        return reason
    return error


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote, here or elsewhere, onto the CPU; nothing in the file can run.

    Raises:
        CheckpointError: it is missing, damaged, or no such file.
    """
    import torch

    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        reason = "no regular file" if os.path.exists(path) else "no such file"
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {reason}")
    try:
        if _is_zip(path):
            if fault := damage(path):
                raise CheckpointError(f"{path} is damaged: {fault}")
            with zipfile.ZipFile(path) as archive:
                if trick := _trick(archive):  # a seal says who wrote it of nobody
                    raise CheckpointError(f"{path}: cannot be read as a checkpoint: {trick}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how the file was pickled; what matters is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        told = str(error).strip() or type(error).__name__
        reason = told.splitlines()[0].partition(" In PyTorch")[0]  # torch goes on with how to run such a file
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {one_line(reason)}") from error


def _trick(archive: zipfile.ZipFile) -> str:
    """What no zip file of torch has, and another reader could be fooled with; "" if there is none."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        return "it holds a member twice"
    size = os.path.getsize(str(archive.filename))
    if sum(item.file_size for item in archive.infolist()) > size:  # torch.save compresses nothing
        return "its members are larger than the file"
    return ""


def _is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins or ends as one: torch had another format before, without checksums."""
    with open(path, "rb") as file:
        first = file.read(4)
        file.seek(max(file.seek(0, os.SEEK_END) - len(_SEAL) - _DIGEST, 0))
        return first == b"PK\3\4" or file.read().startswith(_SEAL)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file can run. One of our trainings has a "leakfree" entry.

    Raises:
        CheckpointError: it is missing, damaged, or no dict.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def disk_is_full(error: BaseException) -> OSError | None:
    """The "no space" error that ``error`` is or comes from, if it does."""
    return next((item for item in _chain(error) if isinstance(item, OSError) and item.errno in _FULL), None)
