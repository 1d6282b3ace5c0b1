"""A run whose processes are killed again and again, and the same command after each kill.

The bar: after N SIGKILLs of random processes at random moments the run ends with the weights of an undisturbed one
to the bit, no kill cost more than one checkpoint interval, nobody repaired anything, and nothing is left over::

    python -m tests.training.chaos --kills 50 --seed 0 --output DIR
    python -m tests.training.chaos --kills 20 --config FILE --output DIR trainer.total_batch_size=8

Processes are found by a mark in their environment, so that orphans are found too. Moments: while the ranks start,
during steps, while a checkpoint is being written, during an evaluation of the training, and during the last one.
Kills are spaced by steps, not by seconds: a slow machine only takes longer.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from leakfree.config import load_config
from leakfree.config.schema import RunConfig
from leakfree.training.watchdog import Clock
from tests.contrastive.conftest import CONFIG
from tests.training.exact_resume import run_differences

__all__ = ["SMALL", "Chaos", "Kill", "Report"]

# A tiny MoCo: batch norm by rank, a momentum encoder and a queue.
SMALL = [
    "data.num_workers=1",
    "trainer.num_processes=2",
    "trainer.checkpoint_period=10",
    "trainer.eval_period=25",
    "trainer.keep_checkpoints=3",
    "evaluation.precise_images=24",
    "evaluation.max_images=48",
    "evaluation.online_images=48",
    "leakage.max_images=24",
    "trainer.stuck_after=16",  # so that a session that hangs tells where (ten times as late in slow phases)
]
_STEPS_PER_KILL = 25
_MARK = "LEAKFREE_CHAOS"
_STEP = re.compile(r" step: (\d+)/\d+ ")
_FROM = re.compile(r"continuing from \S+ \((\d+) steps done\)")
_PATIENCE = 180.0  # seconds in which something must happen; of this machine's running: virtual ones are put to sleep
_ORPHANS_END = 20.0  # seconds for what a killed run leaves running


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: of what, when, and what it cost.

    ``step`` is the last that the log had told, ``resumed`` where the next session went on; both 0 before the first.
    """

    victim: str  # supervisor | rank | loader | all
    moment: str  # start | step | saving | evaluating | end
    step: int
    resumed: int

    @property
    def lost(self) -> int:
        return max(0, self.step - self.resumed)


@dataclass
class Report:
    """What came of it; ``faults`` is empty when the bar is met."""

    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    half_written: int = 0  # temporary files seen after kills, which the next session has to clear
    seconds: float = 0.0

    def lines(self) -> list[str]:
        victims = Counter(kill.victim for kill in self.kills)
        moments = Counter(kill.moment for kill in self.kills)
        lost = [kill.lost for kill in self.kills]
        return [
            f"kills: {len(self.kills)} in {self.seconds:.0f} s",
            "of: " + ", ".join(f"{name} {count}" for name, count in sorted(victims.items())),
            "during: " + ", ".join(f"{name} {count}" for name, count in sorted(moments.items())),
            f"steps lost: {sum(lost)} in all, at most {max(lost, default=0)} by one kill",
            f"half-written files after kills: {self.half_written}, left at the end: "
            f"{sum('left behind' in line for line in self.faults)}",
            *(f"FAULT: {line}" for line in self.faults),
            "the bar is met: no fault" if not self.faults else f"{len(self.faults)} faults",
        ]


class Chaos:
    """Trains ``config_file`` undisturbed and under kills, both by the real command.

    Args:
        output: an empty or new folder; gets ``undisturbed``, ``killed`` and what the commands printed.
        overrides: of the config; two ranks and more, and loader processes.
    """

    def __init__(self, config_file: Path, output: Path, overrides: Sequence[str], *, kills: int, seed: int) -> None:
        self.folder = output / "killed"
        self.whole = output / "undisturbed"
        self.output = output
        self.config_file = config_file
        self.overrides = [*overrides, "trainer.log_period=1"]
        self.config: RunConfig = load_config(config_file, self.overrides)
        self.kills = kills
        self.random = random.Random(seed)
        self.report = Report()
        self._start_seconds = 0.0
        self._sessions = 0
        self._offset = 0  # of this session's lines in the log
        self._orphans: list[tuple[float, str]] = []  # (when they must be gone, mark of their session)

    def run(self) -> Report:
        """Do it all; what is wrong is in the report's ``faults``."""
        (self.output / "tmp").mkdir(parents=True, exist_ok=True)
        self._undisturbed()
        began = time.monotonic()
        try:
            self._disturbed()
        finally:
            self.report.seconds = time.monotonic() - began
        return self.report

    def _disturbed(self) -> None:
        resumed = 0
        for number in range(self.kills):
            killed = self._killed_session(self._moment(number), self.kills - number, resumed)
            if killed is None:
                return
            victim, moment, step = killed
            resumed = self._newest()
            self.report.kills.append(Kill(victim, moment, step, resumed))
            self.report.half_written += len(self._temporary_files())
            print(f"{number + 1}/{self.kills}: {victim} killed ({moment}) at step {step}, {resumed} saved", flush=True)
        self._judge(self._end_of(self._start(), _PATIENCE * 4))

    def _undisturbed(self) -> None:
        process = self._start(self.whole, resume=False)
        began = time.monotonic()
        self._until(lambda: _STEP.search(self._log(self.whole)) is not None, process)
        self._start_seconds = time.monotonic() - began
        if code := self._end_of(process, _PATIENCE * 10):
            raise RuntimeError(f"the undisturbed run ended with exit code {code}: see {self.output}/session-0.txt")

    # ------------------------------------------------------------------------------- a session

    def _start(self, folder: Path | None = None, *, resume: bool = True) -> subprocess.Popen[bytes]:
        folder = folder or self.folder
        log = folder / "log.txt"
        self._offset = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "leakfree.cli", "train", "--config-file", str(self.config_file)]
        command += [f"output_dir={folder}", *self.overrides, *(["--resume"] if resume else [])]
        environment = {**os.environ, _MARK: self._mark(self._sessions), "TMPDIR": str(self.output / "tmp")}
        environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        with (self.output / f"session-{self._sessions}.txt").open("wb") as told:
            process = subprocess.Popen(
                command, env=environment, stdout=told, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._sessions += 1
        return process

    def _killed_session(self, moment: str, kills_left: int, resumed: int) -> tuple[str, str, int] | None:
        """Give the command, kill one of its processes at the ``moment``, wait for its end: (victim, moment, step)."""
        process = self._start()
        last = resumed + max(1, (self.config.schedule.max_steps - resumed) // (kills_left + 1))
        target = self.random.randint(resumed + 1, last)
        if moment == "start":
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.random.uniform(0.0, self._start_seconds))
        elif moment == "end":
            self._until(lambda: "model_final.pt" in self._log(), process)  # saved, or where this session goes on
            time.sleep(self.random.uniform(0.0, 0.3))
        else:
            self._until(lambda: self._step() >= (target if moment == "step" else resumed + 1), process)
            if moment == "saving":
                self._until(lambda: bool(self._temporary_files()) or self._step() >= last, process)
            elif moment == "evaluating":
                self._until(lambda: "evaluating: " in self._log() or self._step() >= last, process)
            time.sleep(self.random.uniform(0.0, 0.05 if moment == "step" else 0.004))
        moment = self._what_it_does(moment)
        victim = self._kill_one(process)
        step = self._step()
        if victim is None:
            self._fault(f"the run ended with exit code {process.wait()} before it was killed ({moment})")
            return None
        code = self._end_of(process, _PATIENCE)
        if code is None:
            self._fault(f"{victim} was killed ({moment}), and the command did not end in {_PATIENCE:.0f} s")
            self._end_all()
            return None
        if code in (0, 2):
            self._fault(f"after {victim} was killed ({moment}) the command ended with exit code {code}")
            return None
        step = max(step, self._step())  # what the others still did
        self._orphans.append((time.monotonic() + _ORPHANS_END, self._mark(self._sessions - 1)))
        self._look_for_orphans()
        return victim, moment, step

    def _moment(self, number: int) -> str:
        at_end = min(3, self.kills // 4)
        if number >= self.kills - at_end:
            return "end"
        return self.random.choices(["start", "step", "saving", "evaluating"], [3, 3, 2, 2])[0]

    def _what_it_does(self, wanted: str) -> str:
        """What the moment has turned into: a rank may have been faster."""
        if wanted == "saving" and not self._temporary_files():
            return "step"
        if wanted == "evaluating" and "evaluating: " not in self._log().rpartition(" step: ")[2]:
            return "step"
        return wanted

    def _kill_one(self, process: subprocess.Popen[bytes]) -> str | None:
        """SIGKILL a random kind of process among those there are; None if the run is over."""
        kinds = self._processes(process.pid)
        if not kinds:
            return None
        weights = {"supervisor": 2, "rank": 4, "loader": 2, "all": 1}
        names = [*kinds, "all"]
        (kind,) = self.random.choices(names, [weights[name] for name in names])
        chosen = (
            [pid for pids in kinds.values() for pid in pids] if kind == "all" else [self.random.choice(kinds[kind])]
        )
        for pid in chosen:  # the supervisor first: it cannot tell the others to end
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return kind

    def _processes(self, supervisor: int) -> dict[str, list[int]]:
        """The processes of the session by kind, the supervisor first."""
        found: dict[str, list[int]] = {}
        parents = {pid: parent for pid in _marked(self._mark(self._sessions - 1)) if (parent := _parent(pid))}
        for pid, parent in sorted(parents.items()):
            if pid == supervisor:
                kind = "supervisor"
            elif "resource_tracker import main" in _command(pid):
                continue  # Python's own helper: it only removes what others leave
            else:
                kind = "rank" if parent == supervisor else "loader"
            found.setdefault(kind, []).append(pid)
        return {kind: found[kind] for kind in ("supervisor", "rank", "loader") if kind in found}

    # ----------------------------------------------------------------------------- what is seen

    def _log(self, folder: Path | None = None) -> str:
        """What this session has logged."""
        path = (folder or self.folder) / "log.txt"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")

    def _step(self) -> int:
        return max((int(number) for number in [*_STEP.findall(self._log()), *_FROM.findall(self._log())]), default=0)

    def _newest(self) -> int:
        """The step that the next session will go on from: of the newest checkpoint on disk."""
        if (self.folder / "model_final.pt").exists():
            return self.config.schedule.max_steps
        return max((int(path.stem[-7:]) for path in self.folder.glob("checkpoint_*.pt")), default=0)

    def _temporary_files(self) -> list[Path]:
        return list(self.folder.glob(".*.tmp"))

    def _until(self, happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        """Wait for something, or the command's end, as long as the session logs anything."""
        logged, clock = "", Clock(1.0)
        while not happened() and process.poll() is None:
            if len(log := self._log()) > len(logged):
                logged, clock = log, Clock(1.0)
            if clock.tick() > _PATIENCE:
                self._end_all()
                raise RuntimeError(f"nothing happened for {_PATIENCE:.0f} s: see {self.output}")
            time.sleep(0.002)

    @staticmethod
    def _end_of(process: subprocess.Popen[bytes], seconds: float) -> int | None:
        """Wait for the command's exit code; None = it has not ended within this time."""
        clock = Clock(1.0)
        while process.poll() is None and clock.tick() < seconds:
            time.sleep(0.02)
        return process.returncode

    # -------------------------------------------------------------------------------- judgement

    def _judge(self, code: int | None) -> None:
        if code != 0:
            self._fault(f"the last session ended with exit code {code}: see session-{self._sessions - 1}.txt")
            return
        period = self.config.trainer.checkpoint_period
        for number, kill in enumerate(self.report.kills, 1):
            if kill.lost > period:
                self._fault(f"kill {number} ({kill.victim}, {kill.moment}) lost {kill.lost} steps, over {period}")
        starts = [0, *(int(step) for step in _FROM.findall((self.folder / "log.txt").read_text()))]
        for before, after in itertools.pairwise(starts):
            if after < before:
                self._fault(f"a session went back from step {before} to {after}")
        for path in [*self._temporary_files(), *(self.output / "tmp").glob("torch_*")]:
            self._fault(f"{path} is left behind")
        while self._orphans:
            self._look_for_orphans()
            time.sleep(0.05)
        self.report.faults += run_differences(self.whole, self.folder)

    def _fault(self, line: str) -> None:
        self.report.faults.append(line)

    def _look_for_orphans(self) -> None:
        """Sessions whose processes are gone are forgotten; those that are late are a fault, and ended."""
        waiting = []
        for deadline, mark in self._orphans:
            left = _marked(mark)
            if left and time.monotonic() < deadline:
                waiting.append((deadline, mark))
            elif left:
                self._fault(f"{len(left)} processes of {mark} still run {_ORPHANS_END:.0f} s after its end")
                _end(left)
        self._orphans = waiting

    def _mark(self, session: int) -> str:
        return f"{self.output.resolve()}:{session}"

    def _end_all(self) -> None:
        for session in range(self._sessions):
            _end(_marked(self._mark(session)))


def _marked(mark: str) -> list[int]:
    """Processes (no zombies) whose environment has the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            if f"{_MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill a run again and again, and report; exit code 1 if the bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.training.chaos", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--config", metavar="FILE", help="the run to disturb; by default a tiny MoCo on two ranks")
    parser.add_argument("--output", metavar="DIR", help="a new folder; by default a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary)
        output.mkdir(parents=True, exist_ok=True)
        overrides = list(args.overrides)
        if not args.config:
            (output / "small.yaml").write_text(CONFIG)
            overrides = [*SMALL, f"schedule.max_steps={args.kills * _STEPS_PER_KILL}", *overrides]
        config_file = Path(args.config) if args.config else output / "small.yaml"
        report = Chaos(config_file, output, overrides, kills=args.kills, seed=args.seed).run()
    print("\n".join(report.lines()))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
