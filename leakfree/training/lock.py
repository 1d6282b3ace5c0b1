"""One writer per output folder: who it is, since when, and whether it still lives.

The owner is a small file, ``.lock``, that appears whole or not at all and is touched every few seconds. That works on
any file system, also where the kernel's locks are refused or stay on one node, and leaves nothing to repair by hand:
on its own machine a process is asked for, from other machines the age of its last sign decides. Torch-free.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import pwd
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from leakfree.errors import RunError

__all__ = ["SILENT", "LockOwner", "lock_owner", "locked", "slurm_job"]

BEAT = 15.0  # seconds between two signs of life
SILENT = 120.0  # seconds without one after which a process on another machine counts as gone
_POLL = 0.5  # seconds between two looks at a process that may be gone
_FAREWELL = 1.2  # beats in which a process on another machine learns that it has lost the folder, and ends
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@dataclass(frozen=True)
class LockOwner:
    """The process that writes to an output folder, as seen from here.

    Attributes:
        host, pid, user: where it runs, and whose it is.
        job: of Slurm, as ``"123"`` or ``"123_4"``; "" outside.
        started: Unix time (seconds) at which it took the folder.
        last_sign: seconds since its last sign of life.
        alive: on this machine, whether that process exists; on another, whether ``last_sign`` is at most
            :data:`SILENT`.
    """

    host: str
    pid: int
    user: str
    job: str
    started: float
    last_sign: float
    alive: bool

    def __str__(self) -> str:
        day = "%H:%M" if time.time() - self.started < 12 * 3600 else "%Y-%m-%d %H:%M"
        job = f" (job {self.job})" if self.job else ""
        since = f" since {time.strftime(day, time.localtime(self.started))}" if self.started else ""
        return f"pid {self.pid or 'unknown'} on {self.host or 'an unknown machine'}{job}{since}"


def lock_owner(folder: str | os.PathLike[str]) -> LockOwner | None:
    """Who writes to ``folder``, or None; only looks.

    The age of the last sign is by this machine's clock: off by as much as the clocks of two machines differ.
    """
    found = _read(Path(folder))
    return None if found is None else found.seen(time.time())


def slurm_job() -> str:
    """The Slurm job that this process is part of, as Slurm prints it: ``"123"``, ``"123_4"``; "" outside."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    return f"{array}_{element}" if array and element else os.environ.get("SLURM_JOB_ID", "")


@contextmanager
def locked(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """Make the folder and hold it for this process, not for its children; a second process is refused.

    The folder of a process that is gone is taken over, with a line on stderr: at once if it ran on this machine or
    was an earlier start of the same Slurm job, otherwise when it has given no sign for :data:`SILENT` seconds, nor
    while it is watched for two beats (its file system may have been away). A process on another machine is watched
    until one or the other is certain, so a job that was requeued elsewhere waits and is not refused. Should the folder
    be taken over from this process (it was suspended for minutes, say), this process ends at its next beat; who takes
    over from another machine waits for that: two must never write.

    Raises:
        RunError: a living process holds it, who and since when; or the folder cannot be made or written.
    """
    folder = Path(output_dir)
    me = _Owner.of_this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(folder, me)
    except OSError as error:
        raise RunError(f"output_dir: {folder} cannot be used as an output folder ({error.strerror})") from None
    heart = _Heart(folder, me)
    heart.start()
    try:
        yield folder
    finally:
        heart.end()
        with suppress(OSError):  # whatever ended the work is the error to tell; this process is gone soon anyway
            _drop(folder, me)


# -------------------------------------------------------------------------------------- the owner


@dataclass(frozen=True)
class _Owner:
    """The content of ``.lock``. ``machine`` tells apart what shares a name, and starts of one machine."""

    token: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    process_started: str = ""
    user: str = ""
    job: str = ""
    restart: int = 0
    started: float = 0.0

    @staticmethod
    def of_this_process() -> _Owner:
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        return _Owner(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_started=_process_start(os.getpid()) or "",
            user=_user(),
            job=slurm_job(),
            restart=int(restart) if restart.isdigit() else 0,
            started=time.time(),
        )

    @staticmethod
    def parse(text: str) -> _Owner:
        """What the file tells; what is missing or of another type stays unknown."""
        try:
            raw = json.loads(text)
        except ValueError:
            raw = None
        if not isinstance(raw, dict):
            return _Owner()
        blank = _Owner()
        kinds = {item.name: type(getattr(blank, item.name)) for item in fields(_Owner)}
        given = {name: raw[name] for name, kind in kinds.items() if type(raw.get(name)) is kind}
        return _Owner(**given)

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process could see it."""
        return self.pid > 0 and (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def process_exists(self) -> bool:
        """Of an owner that ``is_here``: that very process, and not another one with its number."""
        start = _process_start(self.pid)
        return start is not None and (not start or not self.process_started or start == self.process_started)

    def is_earlier_start_of(self, other: _Owner) -> bool:
        """Whether Slurm started ``other`` in its place. Steps of one start may run side by side, and do not count."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart


@dataclass(frozen=True)
class _Found:
    owner: _Owner
    touched: float  # by the file system's clock

    def seen(self, now: float) -> LockOwner:
        owner, silent = self.owner, max(0.0, now - self.touched)
        alive = owner.process_exists if owner.is_here else silent <= SILENT
        return LockOwner(owner.host, owner.pid, owner.user, owner.job, owner.started, silent, alive)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, say
        return str(os.getuid())


@functools.cache
def _machine() -> str:
    """This start of this machine, and its set of process numbers (a container has its own); "" where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this machine started; "" if it exists and that cannot be told, None if it does not exist."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in ("Z", "X") else rest[18]  # ticks since the machine started
    except (OSError, ValueError, IndexError):
        pass  # no /proc, or another user's process that it hides
    try:
        os.kill(pid, 0)
    except PermissionError:
        return ""
    except (ProcessLookupError, OverflowError):
        return None
    return ""


# --------------------------------------------------------------------------------------- the file


def _path(folder: Path) -> Path:
    return folder / ".lock"


def _read(folder: Path) -> _Found | None:
    try:
        # Opened, not only asked for: a network file system then looks at the file, and not at what it remembers.
        handle = os.open(_path(folder), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        text = os.read(handle, 4096).decode(errors="replace")
        return _Found(_Owner.parse(text), os.fstat(handle).st_mtime)
    finally:
        os.close(handle)


def _create(folder: Path, me: _Owner) -> bool:
    """Become the owner of a folder without one; False if another process was faster."""
    text = json.dumps(asdict(me)).encode()
    handle, name = tempfile.mkstemp(prefix=".lock.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        os.chmod(name, 0o644)
        try:
            os.link(name, _path(folder))  # exclusive and whole, on network file systems too
        except FileExistsError:
            return os.stat(name).st_nlink == 2  # it was made after all, and only the answer got lost
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(folder, text)
        return True
    finally:
        os.unlink(name)


def _create_without_links(folder: Path, text: bytes) -> bool:
    try:
        handle = os.open(_path(folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(text)
    return True


def _drop(folder: Path, owner: _Owner) -> bool:
    """Take away the file of ``owner`` and of no other; False if it is not there."""
    aside = folder / f".lock.{uuid.uuid4().hex}.tmp"
    try:
        os.rename(_path(folder), aside)  # one of several processes that try gets it
    except FileNotFoundError:
        return False
    mine = _Owner.parse(aside.read_text(errors="replace")).token == owner.token
    if not mine:  # another process was faster, and this is its file
        with suppress(OSError):
            os.link(aside, _path(folder))
    aside.unlink(missing_ok=True)
    return mine


def _clock(folder: Path) -> float:
    """What to add to ``time.monotonic()`` to have the time of the file system that holds ``folder``."""
    with tempfile.NamedTemporaryFile(prefix=".lock.", suffix=".tmp", dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime - time.monotonic()


# ------------------------------------------------------------------------------ taking and holding


def _take(folder: Path, me: _Owner) -> None:
    offset, began, told, evicted = _clock(folder), time.monotonic(), False, False
    first: dict[str, float] = {}  # token of each owner seen -> its sign of life then
    while True:
        found = _read(folder)
        if found is None:
            if _create(folder, me):
                if evicted:
                    time.sleep(_FAREWELL * BEAT)
                return
            continue
        first.setdefault(found.owner.token, found.touched)
        seen = found.seen(time.monotonic() + offset)
        waited = time.monotonic() - began
        state = _state(found, seen, me, beats=found.touched > first[found.owner.token], waited=waited)
        if state == "alive":
            raise RunError(
                f"output_dir: {folder} is being written by {seen}, last sign {seen.last_sign:.0f} s ago; "
                "wait for it, stop it, or choose another output_dir"
            )
        if state == "gone":
            if _drop(folder, found.owner):
                evicted = evicted or not found.owner.is_here
                _say(f"{folder} was being written by {seen}, which is gone: taking over")
        else:
            if not told:
                told = True
                until = f"its end, or for {SILENT:.0f} s" if seen.alive else f"{2 * BEAT:.0f} s"
                _say(
                    f"{folder} was being written by {seen}, last sign {seen.last_sign:.0f} s ago: waiting for {until} "
                    "without a sign"
                )
            time.sleep(_POLL)


def _state(
    found: _Found, seen: LockOwner, me: _Owner, *, beats: bool, waited: float
) -> Literal["alive", "gone", "unsure"]:
    """``beats``: it gave a sign while we were watching."""
    earlier = found.owner.is_earlier_start_of(me)
    if found.owner.is_here:
        if not seen.alive:
            return "gone"
        return "unsure" if earlier and waited < SILENT else "alive"  # Slurm gives an old start time to end
    if earlier:
        return "gone"
    if beats:
        return "alive"
    return "unsure" if seen.alive or waited < 2 * BEAT else "gone"


def _say(line: str) -> None:
    print(f"leakfree: output_dir: {line}", file=sys.stderr, flush=True)


class _Heart(threading.Thread):
    """Touches the owner's file until it is told to end."""

    def __init__(self, folder: Path, me: _Owner) -> None:
        super().__init__(name="leakfree-lock", daemon=True)
        self.folder, self.me = folder, me
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a file system that does not answer now may do so at the next beat
                self._beat()

    def _beat(self) -> None:
        found = _read(self.folder)
        if found is None:  # removed by hand
            _create(self.folder, self.me)
        elif found.owner.token in (self.me.token, ""):  # "": it cannot be read now
            os.utime(_path(self.folder))
        else:
            try:
                _say(f"{self.folder} has been taken over by {found.seen(time.time())}; this process ends")
            finally:  # also where nobody can be told
                os._exit(1)  # whatever its other threads do: they must not write any more

    def end(self) -> None:
        self._ended.set()
        self.join()
