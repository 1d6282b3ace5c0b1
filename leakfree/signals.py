"""The signals that end a run, and how the processes of a run start and live under them. Torch-free.

Slurm sends SIGUSR2 before the time limit and SIGTERM at a preemption, to every process of a job at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STOP_SIGNALS", "held_back", "outlast_signals"]

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_LOOK_AFTER = 5.0  # seconds between two looks whether the parent lives


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, the signals wait, and a process that is started inside is born with them waiting.

    So none is killed before it has said what it does with them; nothing is lost, it comes when it is let through.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlast_signals(_worker: int = 0, *, parent: int) -> None:
    """In a process that works for another, ``parent``: from now on only that one ends it, by SIGTERM or by its death.

    Without it a loader's process dies of a signal to the whole job, and with it the rank before it has saved. It is not
    enough to ignore SIGTERM: a process that hangs could then not be ended, and would keep the rank from its end.
    And torch's loaders remember as their parent whom they have when they are up: if that one was killed while they
    started, they would wait for orders for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, where signals wait for ever
        threading.Thread(target=_end_for, args=(parent,), name="signals", daemon=True).start()


def _end_for(parent: int) -> None:
    while os.getppid() == parent:
        found = signal.sigtimedwait(STOP_SIGNALS, _LOOK_AFTER)
        if found is not None and found.si_signo == signal.SIGTERM and found.si_pid == parent:
            break
    os._exit(0)  # as torch's own handler: another code would be reported as a failure
