"""How runs are doing: what their folders tell, and what Slurm says of their jobs. Reads only; loads no torch.

A run is known by its output folder: ``record.json`` (what is done), ``.lock`` (who writes), ``metrics.json`` (how fast,
how far), checkpoints (what is safe), and ``launch.json`` (which job). Nothing is locked, written or asked of the run.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leakfree.errors import RunError
from leakfree.launch.slurm import job_facts
from leakfree.records import RunRecord, read_record
from leakfree.sealed import damage
from leakfree.training.checkpoints import FINAL, list_checkpoints
from leakfree.training.lock import LockOwner, lock_owner

__all__ = ["RunStatus", "run_status", "show_status"]

FRUITLESS = 3  # restarts from one step that are worth an alarm
_QUIET = 600.0  # seconds without a row or a line of the log, at least, that are worth an alarm
_DEPTH = 4  # folders below the one given in which runs are looked for
_TAIL = 65536  # bytes at the end of metrics.json
_SMALL = 64 * 2**20  # bytes of a checkpoint that is read whole to see that it is undamaged; of others the end is
_NOT_FINITE = (math.inf, -math.inf)
_ASK = 5.0  # seconds that a question to Slurm may take
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "RESIZING", "SIGNALING", "STOPPED")


@dataclass
class RunStatus:
    """One run as it is now.

    Attributes:
        run: its folder, as it was given.
        state: "running" | "evaluating" | "starting" | "queued" | "stopped" (by a signal, with its state saved) |
            "interrupted" | "failed" | "died" (without a word) | "finished".
        detail: where it runs, why it waits, what stopped it.
        step, max_steps: completed, and of the whole run; None where nothing tells.
        seconds_per_step: median of the last rows.
        eta_seconds: of the training that is left, while it runs.
        restarts: starts after the first.
        checkpoint_step, checkpoint_age: of the newest checkpoint; seconds.
        last_sign: seconds since the run did anything that can be seen.
        job: of Slurm, "" for none.
        alarms: what somebody should look at, a sentence each.
    """

    run: str
    state: str
    detail: str = ""
    step: int | None = None
    max_steps: int | None = None
    seconds_per_step: float | None = None
    eta_seconds: float | None = None
    restarts: int = 0
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    last_sign: float | None = None
    job: str = ""
    alarms: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float | None:
        return 100.0 * self.step / self.max_steps if self.step is not None and self.max_steps else None


def show_status(
    paths: Sequence[str | os.PathLike[str]],
    *,
    as_json: bool = False,
    watch: float | None = None,
    strict: bool = False,
) -> int:
    """Print how runs are doing: a table on a terminal, else a line for each, and its alarms.

    Args:
        paths: output folders, or folders that hold some.
        as_json: one JSON object: ``{"time": Unix seconds, "runs": [...]}`` with the fields of :class:`RunStatus`.
        watch: show it again every so many seconds, until Ctrl-C; with ``as_json`` one object a line.
        strict: whether alarms count in the exit code.

    Returns:
        The exit code: 0, or 1 if ``strict`` and a run has an alarm.

    Raises:
        RunError: a folder that is no run and holds none.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    while True:
        found = run_status(paths)
        if as_json:
            content = {"time": time.time(), "runs": [{**asdict(item), "percent": item.percent} for item in found]}
            print(json.dumps(content, indent=None if watch else 2), flush=True)
        else:
            if watch and console.is_terminal:
                console.clear()
            _print(found, console)
        if not watch:
            return int(strict and any(item.alarms for item in found))
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return int(strict and any(item.alarms for item in found))


def run_status(paths: Sequence[str | os.PathLike[str]]) -> list[RunStatus]:
    """The status of each run, in the order given; those inside a folder by name.

    Raises:
        RunError: a folder that is no run and holds none.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        found = list(_runs_in(path, _DEPTH))
        if not found:
            raise RunError(f"{path}: {_why_no_run(path)}")
        folders += [folder for folder in found if folder not in folders]
    with ThreadPoolExecutor(8) as pool:  # the answers of Slurm and of slow file systems are waited for side by side
        return list(pool.map(_look, folders))


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in ("record.json", "launch.json", ".lock")):
        yield folder
        return
    try:
        inside = sorted(item.path for item in os.scandir(folder) if item.is_dir() and not item.name.startswith("."))
    except OSError:
        return
    for item in inside if depth else ():
        yield from _runs_in(Path(item), depth - 1)


def _why_no_run(path: Path) -> str:
    if not path.exists():
        return "no such folder; give output folders of runs, or a folder that holds some"
    if not path.is_dir():
        return "is a file; give the output folder of a run"
    return "not the output folder of a run, and none in it: no record.json, no launch.json"


# ---------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class _Facts:
    """What was read of a run."""

    folder: Path
    record: RunRecord | None
    fault: str  # why there is no record, though there is a file
    owner: LockOwner | None
    job: str
    slurm: dict[str, str]
    rows: list[dict[str, Any]]
    checkpoints: list[Path]
    silent: float | None

    @property
    def alive(self) -> bool:
        return self.owner is not None and self.owner.alive

    @property
    def session_begun(self) -> bool:
        """Whether the record is that of the process that writes now."""
        if self.record is None or self.owner is None:
            return False
        sessions = self.record.sessions
        return not sessions or sessions[-1]["started"] >= self.owner.started

    @property
    def job_state(self) -> str:
        return self.slurm.get("JobState", "").partition(" ")[0].rstrip("+")

    @property
    def ended(self) -> str:
        """How the last session ended, as it told itself."""
        sessions = self.record.sessions if self.record else []
        return sessions[-1]["ended"] if sessions else ""


def _look(folder: Path) -> RunStatus:
    facts = _read(folder)
    state, detail = _state(facts)
    max_steps = _number(facts, "schedule", "max_steps")
    step = _step(facts)
    pace = _pace(facts.rows)
    running = state == "running" and step is not None and max_steps is not None and pace is not None
    newest = facts.checkpoints[0] if facts.checkpoints else None
    status = RunStatus(
        run=str(folder),
        state=state,
        detail=detail,
        step=step,
        max_steps=int(max_steps) if max_steps is not None else None,
        seconds_per_step=pace,
        eta_seconds=pace * max(0.0, max_steps - step) if running else None,  # type: ignore[operator]
        restarts=max(0, len(facts.record.sessions) - 1) if facts.record else 0,
        checkpoint_step=_checkpoint_step(newest, max_steps),
        checkpoint_age=_age(newest) if newest else None,
        last_sign=facts.silent,
        job=facts.job,
    )
    status.alarms = list(_alarms(facts, status))
    return status


def _read(folder: Path) -> _Facts:
    record, fault = None, ""
    if (folder / "record.json").exists():
        try:
            record = _checked(read_record(folder))
        except RunError as error:
            fault = str(error)
    try:
        owner = lock_owner(folder)
    except OSError as error:
        owner, fault = None, fault or f"{folder / '.lock'}: cannot be read ({error.strerror})"
    job = _job(folder, record, owner)
    checkpoints = list_checkpoints(folder)
    # A living process on this machine needs no question to the cluster, nor does finished work.
    known = (owner is not None and owner.alive) or (record is not None and record.status == "finished")
    traces = [folder / "metrics.json", folder / "log.txt", folder / "record.json", *checkpoints[:1]]
    signs = [age for age in map(_age, traces) if age is not None] + ([owner.last_sign] if owner else [])
    return _Facts(
        folder,
        record,
        fault,
        owner,
        job,
        job_facts(job, _ASK) if job and not known else {},
        _last_rows(folder),
        checkpoints,
        min(signs, default=None),
    )


def _checked(record: RunRecord) -> RunRecord:
    for name, kind in (("config", dict), ("timing", dict), ("notes", list)):
        if not isinstance(getattr(record, name), kind):
            raise RunError(f"record.json: {name}: expected {kind.__name__}, got {getattr(record, name)!r:.60}")
    return record


def _job(folder: Path, record: RunRecord | None, owner: LockOwner | None) -> str:
    """The job that runs, or was submitted last: of the writer, of launch.json, of the last session."""
    if owner is not None and owner.alive:
        return owner.job
    launched = _launched(folder)
    if launched.get("launcher") == "slurm" and isinstance(launched.get("job_id"), str):
        return launched["job_id"]
    return record.sessions[-1]["job"] if record and record.sessions else ""


def _launched(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "launch.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _last_rows(folder: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.json, without a torn one; the file may be long."""
    try:
        with (folder / "metrics.json").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()[1 if size > _TAIL else 0 :]
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _number(facts: _Facts, section: str, name: str) -> float | None:
    config = facts.record.config if facts.record else {}
    value = config.get(section, {}).get(name) if isinstance(config.get(section), dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _step(facts: _Facts) -> int | None:
    if facts.record is None:
        return None
    saved = facts.record.timing.get("steps")
    steps = [row["step"] for row in facts.rows[-1:]]
    steps += [int(saved)] if isinstance(saved, (int, float)) else []
    return max(steps, default=None)


def _pace(rows: list[dict[str, Any]]) -> float | None:
    """Seconds per step over the last rows: a run changes its speed with its neighbours."""
    recent = [row["seconds_per_step"] for row in rows if isinstance(row.get("seconds_per_step"), (int, float))][-10:]
    return statistics.median(recent) if recent else None


def _checkpoint_step(path: Path | None, max_steps: float | None) -> int | None:
    if path is None:
        return None
    if path.name == FINAL:
        return int(max_steps) if max_steps is not None else None
    return int(path.stem.rpartition("_")[2])


def _state(facts: _Facts) -> tuple[str, str]:
    record, job = facts.record, f"job {facts.job}" if facts.job else ""
    if facts.alive:
        assert facts.owner is not None
        where = f"on {facts.owner.host}" + (f", job {facts.owner.job}" if facts.owner.job else "")
        if record is None or (record.status != "finished" and not facts.session_begun):
            return "starting", where  # what an earlier session wrote still stands
        trained = record.timing.get("steps") in (None, _number(facts, "schedule", "max_steps"))
        return ("evaluating" if trained else "running"), where
    if record is not None and record.status == "finished":
        return "finished", ""
    if facts.job_state in _WAITING:
        reason = facts.slurm.get("Reason", "")
        return "queued", f"{job}: {reason}" if reason not in ("", "None") else job
    if facts.job_state in _RUNNING:
        return "starting", f"{job} on {facts.slurm.get('NodeList', '')}".removesuffix(" on ")
    if record is None:
        if facts.job_state:
            return "failed", f"{job} is {facts.job_state}, and the run never began"
        lost = facts.owner is not None or bool(facts.fault)
        return ("died", job) if lost else ("queued", f"{job}, of which nothing is known here".removeprefix(", "))
    if facts.ended.startswith("stopped by"):
        return "stopped", f"{facts.ended.removeprefix('stopped ')}, can resume"
    if facts.ended.startswith("failed"):
        return "failed", facts.ended.removeprefix("failed: ")
    return ("interrupted", "can resume") if record.status == "interrupted" else ("died", job)


# ----------------------------------------------------------------------------------------- alarms


def _alarms(facts: _Facts, status: RunStatus) -> Iterator[str]:
    if facts.fault:
        yield facts.fault
    if status.state == "died":
        yield f"died without a word; resume it with: {_command(facts)}"
    if status.state == "failed":
        yield f"failed: {status.detail}"
    if status.state != "finished":
        yield from _of_slurm(facts)
        yield from _of_progress(facts, status)
        yield from _of_files(facts)
    for note in facts.record.notes if facts.record else ():
        if str(note).startswith("leak:"):
            yield str(note)


def _of_slurm(facts: _Facts) -> Iterator[str]:
    state, reason = facts.job_state, facts.slurm.get("Reason", "")
    if state in _WAITING and ("Held" in reason or state in ("REQUEUE_HOLD", "SPECIAL_EXIT")):
        yield f"job {facts.job} is held ({reason or state}); release it with: scontrol release {facts.job}"
    elif state and state not in (*_WAITING, *_RUNNING, "COMPLETED") and not facts.alive:
        why = f" ({reason})" if reason not in ("", "None", state) else ""
        yield f"job {facts.job} is {state}{why} and the run is unfinished; go on with: {_command(facts)}"


def _of_progress(facts: _Facts, status: RunStatus) -> Iterator[str]:
    losses = {name: value for row in facts.rows[-1:] for name, value in row.items() if name.startswith("loss")}
    bad = [f"{name} is {value}" for name, value in losses.items() if value in _NOT_FINITE or value != value]
    if bad:
        yield f"step {facts.rows[-1]['step']}: {', '.join(bad)}"
    if status.state == "running" and facts.alive:
        traces = [facts.folder / "metrics.json", facts.folder / "log.txt"]
        quiet = min((age for age in map(_age, traces) if age is not None), default=0.0)
        expected = (status.seconds_per_step or 0.0) * (_number(facts, "trainer", "log_period") or 1)
        if quiet > max(_QUIET, 10 * expected):
            yield f"its process lives, but it has written nothing for {_duration(quiet)}"
    starts = [session["from_step"] for session in facts.record.sessions] if facts.record else []
    same = next((count for count, step in enumerate(reversed(starts)) if step != starts[-1]), len(starts))
    if same > FRUITLESS:
        yield f"{same} starts in a row from step {starts[-1]}, with no checkpoint in between"


def _of_files(facts: _Facts) -> Iterator[str]:
    if not facts.checkpoints:
        return
    newest = facts.checkpoints[0]
    try:
        size = newest.stat().st_size
        free = shutil.disk_usage(facts.folder).free
    except OSError:  # removed as we looked: there is a newer one
        return
    fault = _damage(newest, size)
    if fault and newest.exists():
        yield f"{newest.name} is damaged ({fault}): a resume goes back to the one before"
    if free < 1.2 * size:
        yield (
            f"the disk is nearly full: {free / 2**20:.0f} MiB are free, and the next checkpoint takes about "
            f"{size / 2**20:.0f}"
        )


def _damage(path: Path, size: int) -> str:
    if size <= _SMALL:
        return damage(path)
    try:
        return "" if zipfile.is_zipfile(path) else "its end is missing"
    except OSError as error:
        return error.strerror or "cannot be read"


def _command(facts: _Facts) -> str:
    """How the run goes on: as it was launched, or from the config in its folder."""
    launched = _launched(facts.folder).get("command")
    if isinstance(launched, list) and launched and all(isinstance(word, str) for word in launched):
        return shlex.join(launched)
    return shlex.join(["leakfree", "train", "--config-file", str(facts.folder / "config.yaml"), "--resume"])


# ------------------------------------------------------------------------------------------ words


def _duration(seconds: float | None) -> str:
    """As people say it: ``3:20:15`` for what runs long, ``12 s`` for what is short."""
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=int(seconds)))


def _words(status: RunStatus) -> dict[str, str]:
    """The cells of a run, by the heads of their columns."""
    step = "" if status.step is None else f"{status.step}/{status.max_steps or '?'}"
    checkpoint = "" if status.checkpoint_step is None else f"{status.checkpoint_step}"
    if checkpoint and status.checkpoint_age is not None:
        checkpoint += f" ({_duration(status.checkpoint_age)} ago)"
    return {
        "run": status.run,
        "state": f"{status.state} {status.detail}".strip() if status.state != "failed" else "failed",
        "step": step,
        "%": "" if status.percent is None else f"{status.percent:.0f}",
        "ETA": _duration(status.eta_seconds),
        "s/step": "" if status.seconds_per_step is None else f"{status.seconds_per_step:.3g}",
        "restarts": str(status.restarts) if status.restarts else "",
        "checkpoint": checkpoint,
        "last sign": "" if status.last_sign is None else f"{_duration(status.last_sign)} ago",
    }


def _print(found: list[RunStatus], console: Console) -> None:
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in _words(found[0]):
            table.add_column(head, overflow="fold", justify="right" if head in ("step", "%", "s/step") else "left")
        for status in found:
            style = "red" if status.alarms else "green" if status.state == "finished" else ""
            table.add_row(*map(Text, _words(status).values()), style=style)
        console.print(table)
        for status in found:
            for alarm in status.alarms:
                console.print(Text(f"{status.run}: {alarm}", style="red"), soft_wrap=True)
        return
    for status in found:
        words = _words(status)
        told = [words.pop("run") + ":", words.pop("state")]
        told += [f"{head}={value.replace(' ago', '').replace(' ', '')}" for head, value in words.items() if value]
        print("  ".join(told), *(f"  alarm: {alarm}" for alarm in status.alarms), sep="\n", file=sys.stdout, flush=True)
