#!/usr/bin/env python
"""`make demo`: see the leak of a BatchNorm RoI head, and see it gone, on the embedded digit scenes.

Builds DigitScenes, trains one backbone on mixed-class scenes, then the same Mask R-CNN heads with the
leaky BatchNorm and with each cure, each under 2 ranks; evaluates and compares them. The same command
again continues what is unfinished and reuses what is finished.

    python tools/demo.py [--output output/digits] [--data datasets] [--seeds 1] [--jobs N]
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from leakfree.errors import LeakfreeError
from leakfree.records import read_metrics, read_record
from leakfree.report import compare
from leakfree.training.ranks import usable_cores

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "detection" / "digits"
PRETRAIN = "pretrain"
HEADS = [
    "mask_rcnn_small_BNhead_leaky",
    "mask_rcnn_small_SyncBNhead",
    "mask_rcnn_small_BNhead_shuffle_statistics",
    "mask_rcnn_small_BNhead_shuffle_features",
    "mask_rcnn_small_GNhead",
    "mask_rcnn_small_BNhead_frozen_tail",
]
END_TO_END = ["mask_rcnn_small_BNhead_leaky_e2e", "mask_rcnn_small_BNhead_shuffle_statistics_e2e"]
RANKS = 2  # of each run


@dataclass
class Run:
    """One training of the demo: a config, a seed, an output folder, and the process that works on it."""

    config: str
    folder: Path
    overrides: list[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0
    state: str = "waiting"
    reused: bool = False  # an earlier call has finished it

    def start(self) -> None:
        """Start the training; where an earlier call has finished this very run, it checks that and returns at once."""
        self.reused = (self.folder / "record.json").is_file() and read_record(self.folder).status == "finished"
        command = [sys.executable, "-m", "leakfree.cli", "train", "--resume", "--num-processes", str(RANKS)]
        command += ["--config-file", str(CONFIGS / f"{self.config}.yaml"), *self.overrides]
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "demo.log", "ab") as log:
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
        rows = read_metrics(self.folder)
        if not rows:
            return "starting"
        step, last = rows[-1]["step"], read_record(self.folder).config["schedule"]["max_steps"]
        return "measuring AP and leakage" if step >= last else f"step {step} of {last}, loss {rows[-1]['loss']:.2f}"


def plan(output: Path, data: Path, seeds: int) -> tuple[Run, list[Run]]:
    """The pre-training, and the runs that start from it, in the order of the report."""

    def run(config: str, seed: int) -> Run:
        suffix = f"_seed{seed}" if seed else ""
        folder = output / (config.removeprefix("mask_rcnn_small_") + suffix)
        overrides = [f"output_dir={folder}", f"data.root={data}", f"seed={seed}", f"trainer.num_threads={threads}"]
        if config != PRETRAIN:
            overrides.append(f"model.weights={output / PRETRAIN / 'model_final.pt'}")
        return Run(config, folder, overrides)

    threads = 1
    heads = [run(config, seed) for config in HEADS for seed in range(seeds)]
    return run(PRETRAIN, 0), heads + [run(config, 0) for config in END_TO_END]


def table(runs: list[Run]) -> Table:
    grid = Table(box=None, pad_edge=False)
    grid.add_column("run", no_wrap=True)
    grid.add_column("state")
    for run in runs:
        grid.add_row(run.folder.name, run.progress())
    return grid


def work(runs: list[Run], jobs: int, console: Console) -> None:
    """Run all, at most ``jobs`` at a time; the first failure stops the rest.

    Raises:
        RuntimeError: a run failed; the message is the end of its log.
    """
    live = Live(table(runs), console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
    try:
        if live:
            live.start()
        while any(run.state in ("waiting", "running") for run in runs):
            active = [run for run in runs if run.state == "running"]
            for run in active:
                run.poll()
                if run.state.startswith("failed"):
                    tail = (run.folder / "demo.log").read_text(errors="replace").splitlines()[-15:]
                    raise RuntimeError(
                        f"{run.folder.name} {run.state}; the end of {run.folder / 'demo.log'}:\n" + "\n".join(tail)
                    )
                if run.state == "done":
                    console.print(f"{run.folder.name}: {run.progress()}", highlight=False)
            waiting = [run for run in runs if run.state == "waiting"]
            for run in waiting[: jobs - sum(run.state == "running" for run in runs)]:
                run.start()
                if not live:
                    console.print(f"{run.folder.name}: started", highlight=False)
            if live:
                live.update(table(runs))
            time.sleep(0.5)
    finally:
        if live:
            live.stop()
        stop(runs)


def stop(runs: list[Run]) -> None:
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


def exit_like_ctrl_c(number: int, frame: object) -> None:
    """Handle a signal that ends the demo: unwind as Ctrl-C does, so that stop() is reached."""
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/digits"), help="folder of the runs and the report")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="where DigitScenes are written")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each head-only run")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; default: cores / 2")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    start = time.monotonic()
    jobs = arguments.jobs or max(1, int(usable_cores()) // RANKS)
    for name in ("SIGTERM", "SIGHUP"):  # the runs are in sessions of their own: nobody else would stop them
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), exit_like_ctrl_c)
    pretrain, runs = plan(arguments.output, arguments.data, arguments.seeds)
    try:
        console.print(
            f"{1 + len(runs)} runs of {RANKS} ranks, {jobs} at a time; logs in {arguments.output}/RUN/log.txt"
        )
        work([pretrain], 1, console)
        work(runs, jobs, console)
        report = arguments.output / "report.html"
        compare(
            [str(run.folder) for run in runs],
            output=str(report),
            title="BatchNorm leakage in the RoI heads of Mask R-CNN",
        )
    except KeyboardInterrupt:
        console.print("interrupted: the same command continues from the last checkpoints")
        return 130
    except LeakfreeError as error:
        print(f"leakfree: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print(f"\n{(time.monotonic() - start) / 60:.1f} minutes. The report: {report.resolve()}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
