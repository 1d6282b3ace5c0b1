#!/usr/bin/env python
"""Train several configs, each with several seeds, side by side on this machine, and compare them.

The same command again continues what is unfinished and reuses what is finished.

    python tools/sweep.py CONFIG... --output DIR [--seeds 5] [--jobs N] [--baseline NAME] [--title TEXT] [KEY=VALUE ...]

A run goes to DIR/NAME (seed 0) or DIR/NAME_seedK, NAME the file's. Each has one thread per rank; as many run at once
as the cores can hold.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from leakfree.errors import LeakfreeError
from leakfree.launch.runs import expand_runs
from leakfree.records import read_metrics, read_record
from leakfree.report import compare
from leakfree.training.ranks import usable_cores

__all__ = ["Run", "guarded", "work"]


@dataclass
class Run:
    """One training: a config file, an output folder, and the process that works on it."""

    config: Path
    folder: Path
    overrides: Sequence[str]
    ranks: int = 1
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0
    state: str = "waiting"
    reused: bool = False  # an earlier call has finished it

    def start(self) -> None:
        """Start the training; where an earlier call has finished this very run, it checks that and returns at once."""
        self.reused = (self.folder / "record.json").is_file() and read_record(self.folder).status == "finished"
        command = [sys.executable, "-m", "leakfree.cli", "train", "--resume", "--config-file", str(self.config)]
        command += [f"output_dir={self.folder}", "trainer.num_threads=1", *self.overrides]
        command += [f"trainer.num_processes={self.ranks}"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "sweep.log", "ab") as log:
            # In a session of its own: Ctrl-C in the terminal reaches it once, through stop().
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.started, self.state = time.monotonic(), "running"

    def poll(self) -> None:
        assert self.process is not None
        code = self.process.poll()
        self.seconds = time.monotonic() - self.started
        if code is not None:
            self.state = "done" if code == 0 else f"failed (exit code {code})"

    def progress(self) -> str:
        """What the run is at, from the files it writes."""
        if self.state == "done":
            return "reused" if self.reused else f"done in {self.seconds:.0f} s"
        if self.state != "running":
            return self.state
        rows = [row for row in read_metrics(self.folder) if "loss" in row]
        if not rows:
            return "starting"
        step, last = rows[-1]["step"], read_record(self.folder).config["schedule"]["max_steps"]
        return "evaluating" if step >= last else f"step {step} of {last}, loss {rows[-1]['loss']:.2f}"


def _table(runs: list[Run]) -> Table:
    grid = Table(box=None, pad_edge=False)
    grid.add_column("run", no_wrap=True)
    grid.add_column("state")
    for run in runs:
        grid.add_row(run.folder.name, run.progress())
    return grid


def work(runs: list[Run], cores: int, console: Console) -> None:
    """Run all, in order, as many at a time as ``cores`` hold at a core per rank; the first failure stops the rest.

    Raises:
        RuntimeError: a run failed; the message is the end of its log.
    """
    live = Live(_table(runs), console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
    try:
        if live:
            live.start()
        while any(run.state in ("waiting", "running") for run in runs):
            for run in [run for run in runs if run.state == "running"]:
                run.poll()
                if run.state.startswith("failed"):
                    tail = (run.folder / "sweep.log").read_text(errors="replace").splitlines()[-15:]
                    raise RuntimeError(
                        f"{run.folder.name} {run.state}; the end of {run.folder / 'sweep.log'}:\n" + "\n".join(tail)
                    )
                if run.state == "done":
                    console.print(f"{run.folder.name}: {run.progress()}", highlight=False)
            for run in [run for run in runs if run.state == "waiting"]:
                busy = sum(other.ranks for other in runs if other.state == "running")
                if busy and busy + run.ranks > cores:
                    break
                run.start()
                if not live:
                    console.print(f"{run.folder.name}: started", highlight=False)
            if live:
                live.update(_table(runs))
            time.sleep(0.5)
    finally:
        if live:
            live.stop()
        _stop(runs)


def _stop(runs: list[Run]) -> None:
    """End what is still running; each run keeps its last checkpoint. A second Ctrl-C does not wait for them."""
    running = [run.process for run in runs if run.process is not None and run.process.poll() is None]
    try:
        for process in running:
            process.send_signal(signal.SIGINT)
        end = time.monotonic() + 30
        while any(process.poll() is None for process in running) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()  # nothing where it has ended; its ranks die with it


def _exit_like_ctrl_c(number: int, frame: object) -> None:
    """Handle a signal that ends the sweep: unwind as Ctrl-C does, so that _stop() is reached."""
    sys.exit(128 + number)


def guarded(name: str, main: object, console: Console) -> int:
    """Run ``main()``; signals stop the runs, mistakes and failures are told in one line. The exit code."""
    for signal_name in ("SIGTERM", "SIGHUP"):  # the runs are in sessions of their own: nobody else would stop them
        if hasattr(signal, signal_name):
            signal.signal(getattr(signal, signal_name), _exit_like_ctrl_c)
    try:
        assert callable(main)
        main()
    except KeyboardInterrupt:
        console.print("interrupted: the same command continues from the last checkpoints")
        return 130
    except LeakfreeError as error:
        print(f"leakfree: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="config files, then overrides KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of each config")
    parser.add_argument("--jobs", type=int, default=0, help="cores to use; default: all")
    parser.add_argument("--baseline", default=None, help="name of the run that differences are taken from")
    parser.add_argument("--title", default="Runs side by side")
    arguments = parser.parse_intermixed_args()
    console = Console(soft_wrap=True)
    overrides = [word for word in arguments.configs if "=" in word]
    files = [Path(word) for word in arguments.configs if "=" not in word]
    if not files:
        parser.error("no run asked for: give config files")

    def sweep() -> None:
        runs = [
            Run(run.source, run.folder, [*overrides, f"seed={run.config.seed}"], run.config.trainer.num_processes)
            for run in expand_runs(files, overrides, seeds=arguments.seeds, output=arguments.output)
        ]  # mistakes show before anything starts
        cores = arguments.jobs or max(1, int(usable_cores()))
        console.print(f"{len(runs)} runs on {cores} cores; logs in {arguments.output}/RUN/log.txt")
        work(runs, cores, console)
        compare(
            [str(run.folder) for run in runs],
            output=str(arguments.output / "report.html"),
            title=arguments.title,
            baseline=arguments.baseline,
        )

    return guarded("sweep", sweep, console)


if __name__ == "__main__":
    sys.exit(main())
