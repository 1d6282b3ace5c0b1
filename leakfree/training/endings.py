"""What ended a rank, as it travels between processes: to be told, raised again, weighed against others. Torch-free."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leakfree import errors
from leakfree.errors import LeakfreeError
from leakfree.training.stopping import Stopped

__all__ = [
    "AWAY",
    "GONE",
    "INTERRUPTED",
    "LONGEST",
    "STOPPED",
    "STUCK",
    "TRACEBACK",
    "Ending",
    "MachineLost",
    "RankError",
    "first_cause",
]

LONGEST = 20_000  # characters of a report; a pipe holds 64 KiB
TRACEBACK, GONE, AWAY, STUCK = "traceback", "gone", "away", "stuck"
STOPPED, INTERRUPTED = "Stopped", "KeyboardInterrupt"


class RankError(RuntimeError):
    """A rank failed, was killed or is stuck; the message names it and holds its traceback."""


class MachineLost(RankError):
    """The machine of a rank does not answer any more: it is down, or the network to it.

    Attributes:
        rank: the one that was noticed first.
    """

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rank)


@dataclass(frozen=True)
class Ending:
    """What ended a rank before its work was done.

    Attributes:
        rank: which.
        kind: "traceback", "gone" (it died without a word), "away" (its machine does not answer), "stuck", "Stopped",
            "KeyboardInterrupt", or the name of a LeakfreeError.
        text: for the user.
        details: what an error of that kind is made of, if not of ``text``.
        when: seconds since the epoch.
    """

    rank: int
    kind: str
    text: str
    details: tuple[str, ...] = ()
    when: float = 0.0

    @classmethod
    def of(cls, rank: int, error: BaseException, where: str = "") -> Ending:
        """The ending of ``rank`` (on the machine ``where``) by an exception, which is being handled."""
        now = time.time()
        if isinstance(error, LeakfreeError):
            return cls(rank, type(error).__name__, str(error), when=now)
        if isinstance(error, Stopped):
            return cls(rank, STOPPED, str(error), (error.signal_name, error.where, error.then), when=now)
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, INTERRUPTED, f"rank {rank} was interrupted", when=now)
        lines = "".join(traceback.format_exception(error))[-LONGEST:]
        text = f"rank {rank}{where} failed; the other ranks have been ended. Its traceback:\n{lines}"
        return cls(rank, TRACEBACK, text, when=now)

    @classmethod
    def lost(cls, rank: int, where: str, *, silent: bool) -> Ending:
        """The ending of a rank (on the machine ``where``) whose connection has ended; ``silent``: without an answer."""
        kind, what = GONE, "is gone (killed, or its machine is)"
        if silent:
            kind, what = AWAY, "does not answer any more (its machine is down, or the network to it)"
        return cls(rank, kind, f"rank {rank}{where} {what}; the other ranks have been ended", when=time.time())

    @property
    def deliberate(self) -> bool:
        """Somebody wanted it: no failure."""
        return self.kind in (STOPPED, INTERRUPTED)

    @property
    def exit_code(self) -> int:
        """That of the command whose run ended so."""
        if self.kind == STOPPED:
            return 75
        if self.kind == INTERRUPTED:
            return 130
        return 1 if self.kind in (TRACEBACK, GONE, AWAY, STUCK) else 2

    def error(self) -> BaseException:
        """The exception to raise for it elsewhere."""
        if self.kind == STOPPED:
            return Stopped(*self.details)
        if self.kind == INTERRUPTED:
            return KeyboardInterrupt(self.text)
        if self.kind == AWAY:
            return MachineLost(self.text, self.rank)
        if self.kind in (TRACEBACK, GONE, STUCK):
            return RankError(self.text)
        return getattr(errors, self.kind, LeakfreeError)(self.text)

    def spoken(self) -> str:
        """With what the commands of leakfree put before it."""
        return self.text if self.deliberate else f"{'failed' if self.exit_code == 1 else 'error'}: {self.text}"

    def brief(self) -> Ending:
        """With the first line alone: another rank tells the whole."""
        line = self.text.partition("\n")[0].removesuffix(" Its traceback:")
        return Ending(self.rank, self.kind, line, self.details, self.when)


def first_cause(endings: Sequence[Ending]) -> Ending:
    """The one to tell: the user's mistake, a stuck rank, a rank that died, else the first failure in time.

    The others mostly saw only that their peer was gone. That the run was stopped counts where nothing failed.
    """

    def order(ending: Ending) -> tuple[int, float]:
        if ending.deliberate:
            return 4, ending.when
        return {STUCK: 1, GONE: 2, AWAY: 2, TRACEBACK: 3}.get(ending.kind, 0), ending.when

    return min(endings, key=order)
