"""The end of a run by a signal: its state is saved, and the same command goes on from there. Torch-free.

Here is what a process hears and what a user is told; where all ranks stop is :mod:`leakfree.training.agreement`'s.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leakfree.signals import STOP_SIGNALS

__all__ = ["EXIT_STOPPED", "StopAsked", "Stopped", "listening", "received", "what_is_saved"]

EXIT_STOPPED = 75  # of a command or a rank that stopped: EX_TEMPFAIL, try again
_received = ""


class Stopped(RuntimeError):
    """A signal asked for the end, and the run stopped between two steps with its state on disk.

    Args:
        signal_name: such as ``"SIGUSR2"``.
        where: what is saved, for the user: "step 57 of 100 is saved in output/run".
        then: how to go on, for the user.
    """

    def __init__(
        self, signal_name: str, where: str, then: str = "the same command with --resume goes on from there"
    ) -> None:
        super().__init__(f"stopped by {signal_name}: {where}; {then}")
        self.signal_name = signal_name
        self.where = where
        self.then = then

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signal_name, self.where, self.then)


class StopAsked(Exception):
    """Inside a run: all ranks stop here. Whoever knows what is saved turns it into :class:`Stopped`."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


def what_is_saved(step: int, max_steps: int, folder: object) -> str:
    """What of a run is saved, for :class:`Stopped`; ``step`` is that of the newest checkpoint, 0 = none."""
    return f"step {step} of {max_steps} is saved in {folder}" if step else "no step was done, nothing is saved"


def received() -> str:
    """The first signal that this process heard while it was :func:`listening`; "" = none."""
    return _received


@contextmanager
def listening(*, to_the_end: bool = False) -> Iterator[None]:
    """Inside, SIGUSR2 and SIGTERM only set the flag that :func:`received` tells; whatever else they did waits.

    Inside another of its kind it changes nothing. Only the main thread can listen.

    Args:
        to_the_end: this process does nothing more afterwards but end, and the signals are ignored from then on: its
            exit code stays that of its work. Else the handlers are put back that were there before.
    """
    global _received
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _note:
        yield
        return
    before = {number: signal.signal(number, _note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        _received = ""
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end else signal.SIG_DFL if handler is None else handler)


def _note(number: int, _frame: object) -> None:
    """Nothing but the flag: a handler that saves, locks or talks to other ranks can hang for ever."""
    global _received
    _received = _received or signal.Signals(number).name
