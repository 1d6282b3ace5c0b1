#!/usr/bin/env python3
"""What a checkpoint costs a training: the time it waits, and the time its steps lose while the file is written.

Each case is a real training (``leakfree.training.train``) that saves every --distance steps, each time in another of
these ways, in an order that changes from round to round:

in the background   leakfree's: a copy of the state is taken, a thread writes, seals and enters it
at once             the same file, but training waits until it is on disk
Lightning           trainer.save_checkpoint as Lightning's ModelCheckpoint calls it: no fsync, no rename, no checksum
Lightning, async    the same through Lightning's AsyncCheckpointIO
nothing             no checkpoint: what chance alone makes of the same figures

"waits" is the time of the call that saves, on rank 0. "lost" is by how much the steps from that of the call to the
one after the writer's end took longer than as many undisturbed ones; both against the median of the undisturbed steps
around. "% of a step" is lost / step: of one checkpoint, whatever their distance; "% at 100" is by how much it makes a
training with a checkpoint every 100 steps longer. A core is left to the writer unless --threads says otherwise, as a
training on GPUs leaves it many: where all compute, what it does must be taken from them.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

sys.path.insert(0, str(Path(__file__).parent))

from measure import Bar, Report, Spread, at_least_one, make_parser, parse, progress, run_ranks, usable_cores, wanted

from leakfree.config import load_config
from leakfree.distributed import broadcast_object, get_rank, get_world_size
from leakfree.training import train, work
from leakfree.training.callbacks import Moments
from leakfree.training.module import TrainingModule

ROOT = Path(__file__).parents[2]
OURS, AT_ONCE, LIGHTNING, ASYNC, NOTHING = "in the background", "at once", "Lightning", "Lightning, async", "nothing"
VARIANTS = (OURS, AT_ONCE, LIGHTNING, ASYNC, NOTHING)
LIMIT = 0.05  # of a step, for which a checkpoint in the background stops it
PERIOD = 100  # steps between two checkpoints of a usual training
SETTLE = 3  # undisturbed steps at least between two checkpoints

_BRIEF = ["leakage.enabled=false", "evaluation.max_images=16", "evaluation.precise_images=16", "data.num_workers=0"]
CASES: dict[str, list[str]] = {  # name: config and overrides
    "mask_rcnn_small": [
        "detection/digits/mask_rcnn_small_BNhead_leaky_e2e.yaml",
        "model.weights=",
        "model.weights_parts=[]",
        "evaluation.statistics=[population]",
    ],
    "resnet18": [
        "classification/base.yaml",
        "model.name=resnet18",
        "data.image_size=64",
        "trainer.total_batch_size=64",
        "evaluation.statistics=[population]",
    ],
    "resnet50": [
        "classification/base.yaml",
        "model.name=resnet50",
        "data.image_size=64",
        "trainer.total_batch_size=64",
        "evaluation.statistics=[population]",
    ],
}


class AlternatingMoments(Moments):
    """Saves each time in another way, and notes what the steps took."""

    variants: Sequence[str] = VARIANTS
    seed = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.order = np.random.default_rng(self.seed)  # alike on all ranks
        self.round: list[str] = []
        self.durations: list[float] = []  # of the steps, from end to end
        self.saves: list[dict[str, Any]] = []  # variant, step, seconds, end of the writer (a step)
        self.ended = time.perf_counter()
        self.theirs: dict[str, CheckpointIO] = {LIGHTNING: _Noted(), ASYNC: AsyncCheckpointIO(_Noted())}
        AlternatingMoments.last = self

    last: AlternatingMoments

    def on_train_batch_end(
        self, trainer: L.Trainer, module: TrainingModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        now = time.perf_counter()
        self.durations.append(now - self.ended)
        self.ended = now
        if self.saves and "done" not in self.saves[-1] and not _writer_runs():
            self.saves[-1]["done"] = len(self.durations)

    def _save(self, trainer: L.Trainer, module: TrainingModule, step: int, name: str) -> None:
        if step == trainer.max_steps:
            return super()._save(trainer, module, step, name)
        if not self.round:
            self.round = self.order.permutation(list(self.variants)).tolist()
        variant = self.round.pop()
        start = time.perf_counter()
        if variant in (OURS, AT_ONCE):
            super()._save(trainer, module, step, name)
            if variant == AT_ONCE:
                self.saved_to_disk()
        elif variant != NOTHING:
            self._save_as_lightning(trainer, module, name, self.theirs[variant])
        self.saves.append({"variant": variant, "step": len(self.durations), "seconds": time.perf_counter() - start})
        return None

    def _save_as_lightning(self, trainer: L.Trainer, module: TrainingModule, name: str, theirs: CheckpointIO) -> None:
        """Lightning's way, without what this package adds to the content."""
        strategy, ours, hook = trainer.strategy, trainer.strategy.checkpoint_io, module.on_save_checkpoint
        path = (self.folder / name).with_suffix(".ckpt")
        strategy.checkpoint_io = theirs
        module.on_save_checkpoint = lambda checkpoint: None  # type: ignore[method-assign]
        _Noted.running = get_rank() == 0
        try:
            trainer.save_checkpoint(path)
        finally:
            strategy.checkpoint_io = ours
            module.on_save_checkpoint = hook  # type: ignore[method-assign]
        for old in [item for item in self.folder.glob("*.ckpt") if item != path and get_rank() == 0]:
            old.unlink(missing_ok=True)


class _Noted(TorchCheckpointIO):
    """Lightning's writer, which tells nobody when it is done."""

    running = False

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        try:
            super().save_checkpoint(*args, **options)
        finally:
            _Noted.running = False


def _writer_runs() -> bool:
    return _Noted.running or any(thread.name == "checkpoints" for thread in threading.enumerate())


# --- Figures ----------------------------------------------------------------------------------------------------------


def measure(settings: argparse.Namespace, case: str, ranks: int) -> dict[str, Any]:
    """Train one case, and return what its saves cost."""
    AlternatingMoments.variants = [name for name in VARIANTS if name == NOTHING or wanted(name, settings)]
    saves = settings.repeats * len(AlternatingMoments.variants)
    config_file, *overrides = CASES[case]
    with TemporaryDirectory(dir=settings.folder) as folder:
        places = [folder if get_rank() == 0 else ""]
        config = load_config(
            ROOT / "configs" / config_file,
            [
                *overrides,
                *_BRIEF,
                f"output_dir={broadcast_object(places[0])}/run",
                f"data.root={ROOT / 'datasets'}",
                f"trainer.num_processes={ranks}",
                f"trainer.num_threads={settings.threads if ranks == 1 else 1}",
                f"trainer.checkpoint_period={settings.distance}",
                "trainer.log_period=1000000",
                "trainer.eval_period=0",
                f"schedule.max_steps={settings.distance * (saves + 1) + 1}",
                "schedule.warmup_steps=1",
            ],
        )
        work.Moments = AlternatingMoments  # type: ignore[misc]
        with _joined(), redirect_stdout(StringIO()):
            train(config)
        found = figures(settings, case, ranks, AlternatingMoments.last)
    return {"figures": found}


@contextmanager
def _joined() -> Iterator[None]:
    """The ranks are there already, as a launcher would have made them."""
    names = {"RANK": get_rank(), "LOCAL_RANK": get_rank(), "WORLD_SIZE": get_world_size()}
    names |= {"LOCAL_WORLD_SIZE": get_world_size(), "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    yield


def figures(settings: argparse.Namespace, case: str, ranks: int, moments: AlternatingMoments) -> list[dict[str, Any]]:
    """A row for each way to save."""
    durations = np.array(moments.durations)
    windows = [(save["step"], save.get("done", len(durations)) + 1) for save in moments.saves]
    quiet = np.ones(len(durations), dtype=bool)
    quiet[: settings.distance] = False  # memory and caches fill
    for first, end in windows:
        quiet[first:end] = False
    found: dict[str, list[dict[str, float]]] = {}
    for save, (first, end) in zip(moments.saves, windows, strict=True):
        near = np.flatnonzero(quiet[first - settings.distance : end + settings.distance]) + first - settings.distance
        if len(near) < SETTLE or quiet[first - SETTLE : first].sum() < SETTLE:
            continue
        step = float(np.median(durations[near]))
        lost = float(durations[first:end].sum() - step * (end - first))
        found.setdefault(save["variant"], []).append(
            {"step": step, "waits": save["seconds"], "steps": end - first, "lost": lost}
        )
    size = max(item.stat().st_size for item in moments.folder.glob("*.pt")) / 1e6
    title = f"{case}, {ranks} rank(s), checkpoints of {size:.0f} MB every {settings.distance} steps"
    rows = []
    for variant in (name for name in VARIANTS if name in found):
        items = found[variant]
        share = Spread.of(item["lost"] / item["step"] for item in items)
        waits = Spread.of(item["waits"] / item["step"] for item in items)
        values = {
            "saves": len(items),
            "step ms": 1e3 * Spread.of(item["step"] for item in items).median,
            "waits ms": 1e3 * Spread.of(item["waits"] for item in items).median,
            "waits, % of a step": 100 * waits.median,
            "steps": Spread.of(item["steps"] for item in items).median,
            "lost ms": 1e3 * Spread.of(item["lost"] for item in items).median,
            "% of a step": 100 * share.median,
            "% at 100": 100 * share.median / PERIOD,
            "q1": 100 * share.low,
            "q3": 100 * share.high,
        }
        bars = []
        if variant == OURS:
            bars = [
                Bar("waits / step", waits.median, "<=", LIMIT).as_dict(),
                Bar(f"lost / {PERIOD} steps", share.median / PERIOD, "<=", LIMIT).as_dict(),
            ]
        setting = {"ranks": ranks, "threads": settings.threads if ranks == 1 else 1, "distance": settings.distance}
        rows.append(
            {"section": case, "title": title, "setting": setting, "variant": variant, "values": values, "bars": bars}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", ranks=[1, 2], threads=max(1, usable_cores() - 1))
    add = parser.add_argument
    add("--distance", type=at_least_one, default=15, metavar="N", help="steps between two saves (default: 15)")
    add("--folder", type=Path, metavar="DIR", help="where the checkpoints are written (default: the system's for that)")
    settings = parse(parser, arguments, list(CASES), VARIANTS)
    if settings.distance < 2 * SETTLE:
        parser.error(f"--distance {settings.distance} leaves no undisturbed steps; use {2 * SETTLE} or more")
    report = Report("checkpoints", settings)
    for case in settings.only_sections:
        for ranks in settings.ranks:
            progress(f"{case}, {ranks} rank(s)")
            for found in run_ranks([(measure, case, ranks)], ranks, settings):
                report.add_figures(found["figures"])
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
