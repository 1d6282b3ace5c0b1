"""Gives cases to worker processes, ends those that hang, and judges what is left of each."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.fuzz.place import Case, Place, case_of

__all__ = ["Result", "run_cases"]

ROOT = Path(__file__).parents[2]
LONGEST_LINE = 2000  # characters of an error
TIME_LIMIT = 30.0  # seconds of a case; one takes about a tenth of a second
_START_LIMIT = 240.0
_SELDOM = 25  # of so many cases one is also run by a process of its own
_ERROR = "leakfree: error:"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Result:
    """What became of a case: ``faults`` are the promises that were broken."""

    number: int
    kind: str
    what: str
    argv: list[str]
    code: int | None
    line: str  # the last of stderr
    seconds: float
    faults: list[str] = field(default_factory=list)
    report: str = ""  # of a fault: streams and traceback


class _Worker:
    """One process that runs commands; a new one takes its place when it hangs or dies."""

    def __init__(self, made: Path, folder: Path) -> None:
        self.made, self.folder = made, folder
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any] | str:
        """The answer, or in words why there is none."""
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer(limit)
        if isinstance(answer, str):
            self.close()
        return answer

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        environment["PYTHONPATH"] = str(ROOT)
        environment["TMPDIR"] = str(self.folder)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(self.made)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "worker.log").open("w"),
            text=True,
            cwd=tempfile.mkdtemp(dir=self.folder),
            env=environment,
        )
        if self._answer(_START_LIMIT) != "ready":
            raise RuntimeError(f"a worker did not start:\n{(self.folder / 'worker.log').read_text()}")

    def _answer(self, limit: float) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            return f"hangs: no end after {limit:.0f} s"
        line = self.process.stdout.readline()
        return json.loads(line) if line else f"the process died with exit code {self.process.wait()}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                stream.close()
            self.process = None


def run_cases(numbers: Iterable[int], seed: int, *, workers: int = 2, keep: Path | None = None) -> Iterator[Result]:
    """Run cases of a seed and yield the results as they come.

    Args:
        numbers: of the cases.
        workers: processes.
        keep: a folder in which the sandboxes of failed cases stay.
    """
    with tempfile.TemporaryDirectory(prefix="leakfree-fuzz-") as name:
        folder = Path(name).resolve()
        made = folder / "made"
        made.mkdir()
        _make_sound(made)
        before = _tree(made)
        free: SimpleQueue[_Worker] = SimpleQueue()
        for index in range(workers):
            (folder / f"worker{index}").mkdir()
            free.put(_Worker(made, folder / f"worker{index}"))

        def one(number: int) -> Result:
            worker = free.get()
            try:
                return _result(number, seed, worker, folder, keep)
            finally:
                free.put(worker)

        try:
            with ThreadPoolExecutor(workers) as threads:
                yield from threads.map(one, numbers)
        finally:
            while not free.empty():
                free.get().close()
        changed = [str(path) for path in _differences(before, _tree(made))]
        assert not changed, f"what all cases read was changed: {changed}"


def _make_sound(made: Path) -> None:
    code = f"from pathlib import Path; from tests.fuzz.soundness import make_sound; make_sound(Path({str(made)!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)


def _result(number: int, seed: int, worker: _Worker, folder: Path, keep: Path | None) -> Result:
    sandbox = Path(tempfile.mkdtemp(prefix=f"case{number}-", dir=folder))
    place = Place(sandbox / "inputs", sandbox / "output", sandbox / "canary", sandbox / "secret.png", folder / "made")
    for part in (place.inputs, sandbox / "cwd"):
        part.mkdir()
    shutil.copy(place.made / "images" / "cat" / "0.png", place.secret)
    kind, case = case_of(number, seed, place)
    writes = [str(place.output), str(worker.folder), "/dev/null", "/dev/shm", *case.writes]
    request = {"argv": case.argv, "cwd": str(sandbox / "cwd"), "writes": writes, "secret": str(place.secret)}
    before = _tree(sandbox)
    began = time.perf_counter()
    answer = worker.ask(request, TIME_LIMIT)
    if number % _SELDOM == 0 and isinstance(answer, dict):
        shutil.rmtree(place.output, ignore_errors=True)
        if not _differences(before, _tree(sandbox)):  # as it was: the same again, as a user has it
            answer = {**answer, **_on_its_own(request)}
    seconds = time.perf_counter() - began
    (sandbox / "stdout").unlink(missing_ok=True)  # of a worker that was ended
    (sandbox / "stderr").unlink(missing_ok=True)
    faults = _faults(case, place, answer, _differences(before, _tree(sandbox)))
    told = answer if isinstance(answer, dict) else {"code": None, "stderr": "", "stdout": "", "problem": answer}
    lines = told["stderr"].splitlines()
    report = "\n".join(told[name] for name in ("stdout", "stderr", "problem")) if faults else ""
    if faults and keep is not None:
        shutil.copytree(sandbox, keep / sandbox.name, symlinks=True, ignore=_special)
    shutil.rmtree(sandbox)
    return Result(number, kind, case.what, case.argv, told["code"], lines[-1] if lines else "", seconds, faults, report)


def _special(folder: str, names: list[str]) -> list[str]:
    """What cannot be copied: pipes."""
    return [name for name in names if (path := Path(folder, name)).is_fifo() and not path.is_symlink()]


def _on_its_own(request: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": request["cwd"]}
    environment["MPLCONFIGDIR"] = environment["TMPDIR"] = request["writes"][1]  # of libraries
    line = [sys.executable, "-B", "-m", "leakfree.cli", *request["argv"]]
    try:
        done = subprocess.run(
            line, capture_output=True, cwd=request["cwd"], env=environment, timeout=2 * TIME_LIMIT, check=False
        )
    except ValueError:  # no command line can hold a NUL
        return {}
    streams = {"stdout": done.stdout.decode(errors="replace"), "stderr": done.stderr.decode(errors="replace")}
    return {"code": done.returncode, **streams}


def _tree(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """What lies in a folder: kind and mode, size and time of change; folders change with their files."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        found[path] = (facts.st_mode, 0, 0) if path.is_dir() else (facts.st_mode, facts.st_size, facts.st_mtime_ns)
    return found


def _differences(before: dict[Path, Any], after: dict[Path, Any]) -> list[Path]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _faults(case: Case, place: Place, answer: dict[str, Any] | str, changed: list[Path]) -> list[str]:
    """The promises that are broken."""
    allowed = [place.output, *(Path(item) for item in case.writes)]
    outside = [path for path in changed if not any(path.is_relative_to(folder) for folder in allowed)]
    faults = [f"wrote outside the output folder: {path}" for path in outside]
    if place.canary.exists():
        faults.append("code in the input ran")
    if isinstance(answer, str):
        return [*faults, answer]
    faults += [f"did {deed}" for deed in answer["deeds"]]
    if answer["problem"]:
        return [*faults, f"raised {answer['problem'].splitlines()[-1]:.300}"]
    if answer["code"] not in case.codes:
        faults.append(f"exit code {answer['code']}, expected {' or '.join(map(str, case.codes))}")
    errors = [line for line in answer["stderr"].split("\n") if line]
    told = [line for line in errors if line.startswith(_ERROR)]
    if answer["code"] == 2:
        if len(told) != 1 or errors[-1] != told[0]:
            faults.append(f"{len(told)} error lines, the last line is {errors[-1:]!r:.200}")
        else:
            faults += _faults_of_line(told[0], case)
    elif told:
        faults.append(f"an error line with exit code {answer['code']}")
    others = [line for line in errors if line not in told and not line.startswith("leakfree: warning:")]
    if others and answer["code"] in (0, 2):
        faults.append(f"{len(others)} other lines on stderr, like {others[0]!r:.200}")
    if "Traceback" in answer["stdout"] + answer["stderr"]:
        faults.append("a traceback")
    return faults


def _faults_of_line(line: str, case: Case) -> list[str]:
    faults = []
    if len(line) > LONGEST_LINE:
        faults.append(f"a line of {len(line)} characters: {line[:150]!r}")
    if _CONTROL.search(line):
        faults.append(f"a line with control characters: {line[:200]!r}")
    if len(line) < len(_ERROR) + 15:
        faults.append(f"a line that says nothing: {line!r}")
    if case.words and not any(word in line for word in case.words):
        faults.append(f"a line without {' or '.join(case.words)}: {line[:300]!r}")
    return faults
