"""Checkpoints written while training goes on: a copy of the state is all that a step waits for.

The copy goes to memory that is kept from one checkpoint to the next; a thread of rank 0 writes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from leakfree.sealed import map_tensors, read_checkpoint, write_checkpoint
from leakfree.training.checkpoints import Shelf
from leakfree.training.logs import LOG

__all__ = ["BackgroundCheckpoints", "Staging"]

_LINE = 64  # bytes: memory that begins inside a cache line is slower to copy to


class Staging:
    """Memory of this machine that a state is copied into, again and again.

    Fresh memory costs more than the copy: the system clears each page of it on the first touch. That of GPU
    tensors is page-locked, so that their copies need no help of the CPU.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = {}
        self._taken: list[tuple[Any, Tensor]] = []
        self._copied: list[torch.cuda.Event] = []

    def prepare(self, tensors: Iterable[Tensor]) -> None:
        """Have room for these, as they are now; for another thread, while the steps go on."""
        for tensor in tensors:
            self._take(tensor)
        self.release()

    def copy(self, content: Any) -> Any:
        """``content`` as it is now, its tensors on the CPU. Good until :meth:`release`.

        Copies from a GPU are under way when this returns: see :meth:`wait`.

        Raises:
            CheckpointError: it holds something that is no plain data.
        """
        lives: list[Tensor] = []
        copies: dict[Any, Tensor] = {}

        def staged(live: Tensor) -> Tensor:
            place = (live.data_ptr(), live.shape, live.stride(), live.dtype, live.device)
            if place not in copies:  # what is in two places, such as tied weights, is copied and saved once
                copies[place] = self._take(live)
                lives.append(live)
            return copies[place]

        try:
            content = map_tensors(content, staged)
            if lives:
                torch._foreach_copy_(list(copies.values()), lives, non_blocking=True)
        except BaseException:
            self.release()
            raise
        gpus = {live.device for live in lives if live.is_cuda}
        self._copied = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]
        return content

    def wait(self) -> None:
        """Until the last copy is complete."""
        for event in self._copied:
            event.synchronize()

    def release(self) -> None:
        """The last copy is no longer needed."""
        for kind, tensor in self._taken:
            self._free.setdefault(kind, []).append(tensor)
        self._taken = []

    def _take(self, like: Tensor) -> Tensor:
        kind = (like.shape, like.stride(), like.dtype, like.is_cuda)
        free = self._free.get(kind)
        tensor = free.pop() if free else _room(like)
        self._taken.append((kind, tensor))
        return tensor


def _room(like: Tensor) -> Tensor:
    """Memory for a copy of ``like`` that is there already, not only promised."""
    if like.is_cuda:
        return torch.empty_like(like, device="cpu", pin_memory=True)
    size = like.numel() * like.element_size()
    memory = np.empty(size + _LINE, np.uint8)  # in large pages, which torch's own is not
    memory.fill(0)
    start = -memory.ctypes.data % _LINE
    strides = torch.empty_like(like, device="meta").stride()
    return torch.from_numpy(memory[start : start + size]).view(like.dtype).as_strided(like.shape, strides)


class BackgroundCheckpoints(CheckpointIO):
    """Lightning's checkpoints, by a thread: written and sealed, then entered in the folder, then told.

    One is written at a time: the next save waits for it. What goes wrong in the thread is raised by whichever of
    :meth:`check`, :meth:`saved_to_disk` or the next save comes first, and by the end of the ``with`` block, which
    waits for the thread in any case.

    Lightning's own ``AsyncCheckpointIO`` is not used: it copies into fresh memory each time (on a GPU into the
    GPU's), queues saves without limit, and tells a failure at the next save or when all is torn down.

    Args:
        saved: called by the thread, with the steps a checkpoint holds and the seconds they took, once it is on disk.
    """

    def __init__(self, shelf: Shelf, saved: Callable[[int, float], None]) -> None:
        self.shelf = shelf
        self.saved = saved
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, tensors: Iterable[Tensor]) -> None:
        """Have memory for the copies of these before the first save, which would otherwise wait for it."""
        tensors = list(tensors)
        self.saved_to_disk()
        self._in_background(lambda: self._staging.prepare(tensors))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy the state, and have it written to ``path``.

        Raises:
            CheckpointError: it holds something that is no plain data.
            RunError: the one before could not be written.
        """
        self.saved_to_disk()
        content = self._staging.copy(checkpoint)
        self._in_background(lambda: self._write(content, Path(path)))

    def _write(self, content: dict[str, Any], path: Path) -> None:
        self._staging.wait()
        write_checkpoint(content, path)
        self.shelf.put(path)
        self.saved(content["leakfree"]["step"], content["leakfree"]["seconds"])
        LOG.info("saved %s", path)

    def _in_background(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
            finally:
                self._staging.release()

        # no daemon: an interpreter that ends waits for it
        self._thread = threading.Thread(target=run, name="checkpoints")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread, if something did; without waiting."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def saved_to_disk(self) -> None:
        """Wait until what was saved last is on disk.

        Raises:
            RunError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def __enter__(self) -> BackgroundCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.saved_to_disk()
        except Exception as late:
            if error is None:
                raise
            LOG.error("%s", late)  # the first error is the one to tell
