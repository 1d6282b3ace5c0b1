"""Ends a run in which a rank has died or is stuck, and tells which and where.

A thread in every rank, on the board of :mod:`leakfree.training.board`. Each rank posts how long ago it last made
progress (:func:`progress`), and what ended it. Rank 0 draws the conclusions for all: the first failure, or who waits
in which collective for whom. Then every rank ends, with that one report. Torch-free at import.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from leakfree.training.board import LOST, Board, BoardError, Message
from leakfree.training.endings import AWAY, GONE, INTERRUPTED, LONGEST, STOPPED, STUCK, TRACEBACK, Ending, first_cause
from leakfree.training.stacks import Place, place_of

__all__ = ["Clock", "Watchdog", "at_end", "longest_patience", "progress"]

_BEAT = 5.0  # seconds between two signs of life
_LOOK = 0.5  # seconds between two looks whether a rank that should end has ended
_SETTLE = 1.0  # seconds in which the failures that belong together arrive
_GRACE = 2.0  # seconds that a rank has to end by itself, once the end is decided
_INTERRUPTED = 20.0  # the same, when somebody interrupted it,
_STOPPING = 180.0  # or it was stopped: all is saved, and rank 0 may have a job to put back into the queue
_ANSWERS = 5.0  # seconds in which the others answer where they are, or rank 0 decides
_TIDYING = 20.0  # seconds for what must be done before a rank is ended: a save under way, the record, the log
_SLOW = 10  # times the patience for a slow phase,
_SLOW_MOST = 1800.0  # but no more than these seconds, unless the patience itself is longer
_MOST_STACKS = 3

# ----------------------------------------------------------------------------- what a rank calls


@dataclass(slots=True, eq=False)
class _Mark:
    what: str
    slow: bool


_mark = _Mark("the start", True)
_tidying: list[Callable[[Ending], object]] = []
_current: Watchdog | None = None


def progress(what: str, *, slow: bool = False) -> None:
    """This rank has come so far; cheap enough for every step.

    Args:
        what: what it does now, for the report: "step 57", "saving step 100".
        slow: the first of its kind, or a phase without progress in between: ten times the patience.
    """
    global _mark
    _mark = _Mark(what, slow)


@contextmanager
def at_end(tidy: Callable[[Ending], object]) -> Iterator[None]:
    """Inside, ``tidy`` is called with what ended the run when the watchdog ends this process: no other clean-up is run.

    Another thread calls it, and waits some seconds for it.
    """
    _tidying.append(tidy)
    try:
        yield
    finally:
        _tidying.remove(tidy)


def longest_patience(stuck_after: float) -> float:
    """Seconds without progress after which a rank is stuck in whatever phase; ``inf`` for ``stuck_after=0``: never."""
    return max(stuck_after, min(_SLOW * stuck_after, _SLOW_MOST)) if stuck_after else math.inf


# ------------------------------------------------------------------------------------- the thread


@dataclass(frozen=True)
class _Process:
    """Which process it is, so that no other is ever taken for it."""

    pid: int
    started: str
    machine: str  # "" = unknown

    @classmethod
    def this(cls) -> _Process:
        try:
            namespace = os.stat("/proc/self/ns/pid").st_ino
            machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{namespace}"
        except OSError:
            return cls(os.getpid(), "", "")
        return cls(os.getpid(), _started(os.getpid()), machine)

    def kill(self) -> None:
        """If it runs on this machine."""
        if self.machine and self.machine == _Process.this().machine:
            with suppress(OSError):  # it has ended
                if _started(self.pid) == self.started:
                    os.kill(self.pid, signal.SIGKILL)


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@dataclass
class _Seen:
    """What is known of a rank; times are those of the clock of whoever knows it."""

    heard: float  # the last sign of life
    where: str = ""  # " on HOST", if there are several
    age: float = 0.0  # of its last progress, as it said then
    what: str = ""
    slow: bool = False
    process: _Process | None = None
    done: bool = False
    place: Place | None = None
    collectives: int = -1


class Clock:
    """Seconds in which this process could run: it stands still while the process, or the machine, is suspended.

    Args:
        longest: seconds between two ticks of a process that runs; what goes beyond is not counted.
    """

    def __init__(self, longest: float) -> None:
        self.now = 0.0
        self._longest = longest
        self._last = time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.now += min(now - self._last, self._longest)
        self._last = now
        return self.now


class Watchdog:
    """Watches over this rank and, on rank 0, over all: a context manager around the work of a rank.

    When the run has to end because of another rank, or because of this one being stuck, the process is ended with
    the exit code of the command. Where the work ends by itself with an exception that is only a consequence, what
    really ended the run is raised in its place.

    Args:
        rank, world_size: of the run.
        stuck_after: seconds without progress that end the run; 0 = never.
        names: under which other ranks find this machine, the best first.
        exchange: gives every rank the text of rank 0; every rank calls it once, where there are several.
        tell: called with what ended the run before this process is ended.
        several_machines: reports name the machine of a rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        stuck_after: float,
        names: Sequence[str],
        exchange: Callable[[str], str],
        tell: Callable[[Ending], object],
        several_machines: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._stuck_after = stuck_after
        self._names = list(names)
        self._exchange = exchange
        self._tell = tell
        self._where = f" on {socket.gethostname()}" if several_machines else ""
        self._beat = min(_BEAT, stuck_after / 4) if stuck_after else _BEAT
        self._thread = threading.Thread(target=self._run, name="leakfree-watchdog", daemon=True)
        self._watched = threading.get_ident()
        # between the thread of the work and the watchdog's own
        self._lock = threading.Lock()
        self._left = threading.Event()  # the work has ended by itself
        self._decided = threading.Event()
        self._verdict: Ending | None = None
        self._own: Ending | None = None  # what ended this rank, to be posted
        self._ends_process = False
        self._stopped = False
        # of the watchdog's own thread
        self._clock = Clock(2 * self._beat)
        self._marked = 0.0  # when the last progress was noticed,
        self._seen_mark = _mark  # and which
        self._next_beat = 0.0
        self._process = _Process.this()
        self._ranks = {rank: _Seen(0.0)}
        self._decides = rank == 0  # about the ranks in self._ranks
        self._endings: list[Ending] = []
        self._settled = 0.0
        self._asked: float | None = None  # when the ranks were asked where they are
        self._silent: list[_Process] = []  # ranks that can no longer end themselves

    # ---------------------------------------------------------------------- in the thread of the work

    def __enter__(self) -> Watchdog:
        global _current
        self._board = self._meet()
        progress("the start", slow=True)
        self._before, _current = _current, self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        try:
            if error is not None and self.world_size > 1:
                self._fail(Ending.of(self.rank, error, self._where))
        finally:
            self._leave()
            self._stopped = True
            self._board.wake()
            self._thread.join()
            self._board.close()
            _current = self._before

    def _meet(self) -> Board:
        if self.world_size == 1:
            return Board.alone()
        if self.rank == 0:
            board = Board.host(self._names)
            self._exchange(board.address)
            return board
        address = self._exchange("")
        try:
            return Board.join(address, self.rank)
        except BoardError as error:
            print(f"leakfree: rank {self.rank}{self._where}: no watch over the other ranks: {error}", file=sys.stderr)
            self._decides = True
            return Board.alone()

    def _fail(self, own: Ending) -> None:
        """Tell the others, and raise what ended the run if this was only a consequence."""
        known = self._verdict is not None
        self._own = own
        self._board.wake()
        self._decided.wait(_SETTLE + _ANSWERS)
        verdict = self._verdict
        if verdict is None or verdict.rank == self.rank or own.kind != TRACEBACK:
            return
        if known or not verdict.deliberate:  # a failure beside the stop of another is a failure
            self._leave()
            raise (verdict if self.rank == 0 else verdict.brief()).error() from None

    def _leave(self) -> None:
        """The work has ended by itself. Does not return where the watchdog is already ending the process."""
        with self._lock:
            self._left.set()
            ends_process = self._ends_process
        while ends_process:
            time.sleep(1.0)

    # ----------------------------------------------------------------------------- in its own thread

    def _run(self) -> None:
        try:
            while self._verdict is None and not self._stopped:
                self._turn()
            if self._verdict is None:
                self._board.send({"is": "bye"})
            else:
                self._decided.set()
                self._conclude(self._verdict)
        except Exception:  # the run goes on without it
            print(f"leakfree: the watchdog of rank {self.rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
            self._decided.set()

    def _turn(self) -> None:
        soon = self._next_beat - self._clock.now
        if self._endings or self._asked is not None:
            soon = min(soon, 0.1)
        messages = self._board.receive(max(0.0, soon))
        now = self._clock.tick()
        if _mark is not self._seen_mark:
            self._seen_mark, self._marked = _mark, now
        for rank, message in messages:
            (self._take if self.rank == 0 else self._follow)(rank, message, now)
        own, self._own = self._own, None
        if own is not None and self.rank == 0:
            self._note(own, now)
        elif own is not None:
            self._board.send({"is": "ended", **asdict(own)})
        if now >= self._next_beat:
            self._next_beat = now + self._beat
            self._post(now)
        if self._verdict is None:
            (self._judge if self._decides else self._judge_host)(now)

    def _post(self, now: float) -> None:
        beat = {
            "is": "beat",
            "where": self._where,
            "age": now - self._marked,
            "what": self._seen_mark.what,
            "slow": self._seen_mark.slow,
            "process": asdict(self._process),
        }
        self._hear(self.rank, beat, now)
        self._board.send(beat)

    def _hear(self, rank: int, beat: Message, now: float) -> None:
        seen = self._ranks.setdefault(rank, _Seen(now))
        seen.heard, seen.where, seen.age = now, beat["where"], beat["age"]
        seen.what, seen.slow, seen.process = beat["what"], beat["slow"], _Process(**beat["process"])

    def _limit(self) -> float:
        """Seconds without progress, in the slowest of the phases that the ranks are in."""
        slow = any(seen.slow for seen in self._ranks.values() if not seen.done)
        return longest_patience(self._stuck_after) if slow else self._stuck_after or math.inf

    # on every rank but 0

    def _follow(self, _: int, message: Message, now: float) -> None:
        if message["is"] == LOST and self._decides:  # it has said goodbye before
            return
        host = self._ranks.setdefault(0, _Seen(now))
        host.heard = now
        if message["is"] == "beat":
            self._hear(0, message, now)
        elif message["is"] == "where?":
            place, collectives = self._place()
            self._board.send({"is": "here", "place": asdict(place), "collectives": collectives})
        elif message["is"] == "verdict":
            self._silent = [_Process(**item) for item in message["silent"]]
            self._verdict = Ending(**{**message["ending"], "details": tuple(message["ending"]["details"])})
        elif message["is"] == "bye":
            self._decides = True  # about itself: nobody else does any more
            del self._ranks[0]
        elif message["is"] == LOST:
            self._verdict = Ending.lost(0, host.where, silent=message["silent"])

    def _judge_host(self, now: float) -> None:
        host = self._ranks.setdefault(0, _Seen(now))
        silence = now - host.heard
        if silence > self._limit() + self._beat + _ANSWERS:  # rank 0 would have spoken by now
            own = self._ranks[self.rank]
            own.place, own.collectives = self._place()
            self._verdict = self._stuck(now)

    # on rank 0

    def _take(self, rank: int, message: Message, now: float) -> None:
        seen = self._ranks.setdefault(rank, _Seen(now))
        if message["is"] == "beat":
            self._hear(rank, message, now)
        elif message["is"] == "ended":
            del message["is"]
            seen.done = True
            self._note(Ending(**{**message, "details": tuple(message["details"])}), now)
        elif message["is"] == "here":
            seen.place, seen.collectives = Place(**message["place"]), message["collectives"]
        elif message["is"] == "bye":
            seen.done = True
        elif message["is"] == LOST and not seen.done:
            self._note(Ending.lost(rank, seen.where, silent=message["silent"]), now)

    def _note(self, ending: Ending, now: float) -> None:
        if not self._endings:
            self._settled = now + _SETTLE
        if ending.kind not in (TRACEBACK, GONE, AWAY):  # no consequence of anything
            self._settled = now
        self._endings.append(ending)

    def _judge(self, now: float) -> None:
        if self._endings:
            if now >= self._settled:
                self._rule(first_cause(self._endings))
            return
        limit = self._limit()
        if all(seen.done or seen.age + now - seen.heard <= limit for seen in self._ranks.values()):
            self._asked = None
        elif self._asked is None:
            self._asked = now
            for seen in self._ranks.values():
                seen.place = None
            own = self._ranks[self.rank]
            own.place, own.collectives = self._place()
            self._board.send({"is": "where?"})
        elif now - self._asked > min(_ANSWERS, limit) or all(
            seen.done or seen.place is not None for seen in self._ranks.values()
        ):
            self._rule(self._stuck(now))

    def _rule(self, ending: Ending) -> None:
        self._board.send({"is": "verdict", "ending": asdict(ending), "silent": [asdict(item) for item in self._silent]})
        self._verdict = ending

    # on all

    def _place(self) -> tuple[Place, int]:
        place = place_of(self._watched)
        if self.world_size == 1:  # it waits for nobody
            place = replace(place, collective="")
        return place, _collectives_begun()

    def _stuck(self, now: float) -> Ending:
        """The report on ranks that have been asked where they are."""
        ranks = dict(sorted(self._ranks.items()))
        most = max(seen.collectives for seen in ranks.values())
        told: dict[tuple[str, str], list[int]] = {}  # what is to say of one or of many -> of whom
        blamed: list[int] = []
        places = [seen.place for seen in ranks.values() if seen.place is not None]
        waits = any(place.collective for place in places)
        for rank, seen in ranks.items():
            place = seen.place
            if seen.done:
                line = ("has", "have"), "finished its work"
            elif place is None:
                blamed.append(rank)
                if seen.process is not None:
                    self._silent.append(seen.process)
                silence = f"no sign since {now - seen.heard:.0f} s (stopped, hanging in native code, or cut off)"
                line = ("gives", "give"), silence
            elif place.collective:
                line = ("waits", "wait"), f"in {place.collective} ({place.where})"
            else:
                blamed.append(rank)
                # on a GPU collectives are waited for in other places: the count tells who did not arrive
                behind = most - seen.collectives if seen.collectives >= 0 and not waits else 0
                begun = f", having begun {behind} fewer collectives than others" if behind else ""
                arrived = "did not arrive: " if waits or behind else ""
                line = (f"{arrived}it is", f"{arrived}they are"), f"in {place.doing} ({place.where}){begun}"
            told.setdefault((f"{line[0][0]} {line[1]}", f"{line[0][1]} {line[1]}"), []).append(rank)
        waiting = {(place.collective, place.where) for place in places if place.collective}
        if not blamed and len(waiting) > 1:
            lead = "the ranks wait in different collectives: "
        elif not blamed and len(told) == 1 and len(ranks) > 1:
            lead = "all ranks have arrived, but the collective does not end: "
        else:
            lead = ""
        first = next(iter(blamed or ranks))
        age = max(seen.age + now - seen.heard for seen in ranks.values() if not seen.done)
        lines = [
            f"rank {members[0]}{ranks[members[0]].where} {one}"
            if len(members) == 1
            else f"ranks {_runs(members)} {many}"
            for (one, many), members in told.items()
        ]
        text = f"stuck for {age:.0f} s at {ranks[first].what}: {lead}{'; '.join(lines)}; all ranks have been ended"
        for rank in (blamed or list(ranks))[:_MOST_STACKS]:
            place = ranks[rank].place
            if place is not None and place.stack:
                text += f"\nPython stack of rank {rank}:\n{place.stack.rstrip()}"
        return Ending(blamed[0] if len(blamed) == 1 else -1, STUCK, text[:LONGEST], when=time.time())

    def _conclude(self, verdict: Ending) -> None:
        """End this process, unless its work ends by itself in time."""
        graces = {STOPPED: _STOPPING, INTERRUPTED: _INTERRUPTED, STUCK: 0.0}
        clock, grace = Clock(2 * _LOOK), graces.get(verdict.kind, _GRACE)
        while clock.tick() < grace:
            if self._left.wait(_LOOK):
                return
        with self._lock:
            if self._left.is_set():
                return
            self._ends_process = True
        for silent in self._silent:
            silent.kill()
        tidying = threading.Thread(target=self._tidy, args=(verdict,), daemon=True)  # a full pipe or a dead disk may
        tidying.start()  # hold it for ever
        tidying.join(_TIDYING)
        for child in multiprocessing.active_children():  # loader processes, which may hang as well
            child.kill()
        os._exit(verdict.exit_code)

    def _tidy(self, verdict: Ending) -> None:
        self._tell(verdict)
        for tidy in reversed(_tidying):
            try:
                tidy(verdict)
            except Exception:
                traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()


def _runs(ranks: list[int]) -> str:
    """[0, 2, 3, 4] -> "0, 2-4"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _collectives_begun() -> int:
    """How many collectives of all ranks this rank has begun; -1 = unknown."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return -1
    try:
        return int(distributed.group.WORLD._get_sequence_number_for_group())
    except RuntimeError:  # this backend does not count
        return -1


def _forget_in_child() -> None:
    global _current
    if _current is not None:
        _current._board.close()  # held open there, it would hide the death of this rank
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
