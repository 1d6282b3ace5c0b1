"""N steps equal k + (N - k) bit for bit: the runs that must, and what may not differ between them.

A case is a tiny run of two or more ranks with loader processes. It is trained to its end with a checkpoint after
every step; then, for every k, what a kill right after checkpoint k leaves is continued. Everything that both leave is
compared: whatever a checkpoint holds (so that a state that was forgotten shows, and one that heals too), each rank's
buffers, rows, TensorBoard's numbers, results and leakage. Only times, memory and paths may differ.

``test_exact_resume.py`` runs ``CHOSEN`` at every k, which together hold every kind of state. The whole matrix takes
minutes, so it is a command::

    python -m tests.training.exact_resume --all
    python -m tests.training.exact_resume moco-shuffle_bn norm-CBN
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from leakfree.records import read_metrics, read_record
from tests.classification.conftest import CONFIG as CLASSIFICATION
from tests.contrastive.conftest import CONFIG as CONTRASTIVE
from tests.ranks import run_ranks
from tests.runs import launched, stop_at
from tests.training.conftest import CONFIG as DETECTION

__all__ = ["CASES", "CHOSEN", "STEPS", "Case", "differences", "found_differences", "run_differences"]

STEPS = 6
# Rows and evaluations at steps that are no multiple of each other, nor of every k.
_COMMON = [
    f"schedule.max_steps={STEPS}",
    "schedule.warmup_steps=2",
    "data.num_workers=1",
    "trainer.checkpoint_period=1",
    "trainer.keep_checkpoints=99",
    "trainer.log_period=4",
    "trainer.eval_period=5",
    "leakage.influence_probes=2",
]
_TIMES = {"seconds_per_step", "data_seconds_per_step", "peak_memory_mib"}
# Of a checkpoint: where it lies, and how long steps took.
_MAY_DIFFER = {"leakfree.config.output_dir", "leakfree.seconds"}


@dataclass(frozen=True)
class Case:
    """A run: its task, and what it sets beside the smallest config of that task."""

    task: str
    overrides: tuple[str, ...] = ()
    world_size: int = 2
    gpu: bool = False


def _detection(*overrides: str, **options: Any) -> Case:
    return Case("detection", ("trainer.total_batch_size=6", *overrides), **options)


def _classification(*overrides: str, **options: Any) -> Case:
    few = ("data.group_size=4", "model.images_per_group=0", "trainer.total_batch_size=48")
    less = ("evaluation.precise_images=32", "evaluation.max_images=32", "evaluation.statistics=[population]")
    return Case("classification", (*few, *less, *overrides), **options)


def _contrastive(*overrides: str, **options: Any) -> Case:
    less = ("evaluation.precise_images=24", "evaluation.max_images=48", "evaluation.online_images=48")
    few = ("evaluation.statistics=[population]", "leakage.max_images=24")
    return Case("contrastive", (*less, *few, *overrides), **options)


def _head(norm: str, *overrides: str) -> Case:
    return _detection(f"model.box_head.norm={norm}", f"model.mask_head.norm={norm}", *overrides)


_NORM_OPTIONS = {
    "GhostBN": ["model.norm_options={group_size: 6}"],
    "ShuffleBN": ["model.norm_options={num_groups: 4}"],
    "CBN": ["model.norm_options={window: 3}", "schedule.burn_in=0.4"],
    "MBN": ["model.norm_options={memory: 3}", "schedule.double_forward=true"],
    "BGN": ["model.norm_options={num_groups: 4}"],
    "GN": ["model.norm_options={num_groups: 4}"],
    "DomainBN": ["data.train.corruptions=[none, invert]", "data.val.corruptions=[none, invert]"],
}
_NORMS = ["BN", "SyncBN", "GhostBN", "ShuffleBN", "BatchStatBN", "BatchRenorm", "CBN", "MBN", "BGN", "IEBN"]
_NORMS += ["DomainBN", "FrozenBN", "GN", "LN", "IN", "PN", "ProxyNorm", "none"]

_FREEZE = ["schedule.freeze_bn_unit=step", "schedule.freeze_bn_at=3"]
_EPOCH = ["schedule.freeze_bn_unit=epoch", "schedule.freeze_bn_at=0.1"]  # of the 1,437 digits at 48 a step: step 3

CASES: dict[str, Case] = {
    **{f"norm-{name}": _classification(f"model.norm={name}", *_NORM_OPTIONS.get(name, ())) for name in _NORMS},
    "norm-CBN-exact": _classification(
        "model.norm=CBN", "model.norm_options={window: 3, moments: exact}", "schedule.burn_in=0.2"
    ),
    "norm-CBN-no-ramp": _classification(
        "model.norm=CBN", "model.norm_options={window: 4, burn_in: 2}", "schedule.scale_ramps=false"
    ),
    "norm-BatchRenorm-no-ramp": _classification(
        "model.norm=BatchRenorm", "model.norm_options={ramp: null}", "schedule.scale_ramps=false"
    ),
    "norm-MBN-single-forward": _classification("model.norm=MBN", "model.norm_options={memory: 4}"),
    "norm-ShuffleBN-by-layer": _classification("model.norm=ShuffleBN", "model.norm_options={draw: layer}"),
    "norm-average-of-all": _classification("model.norm=BN", "model.norm_options={momentum: null}"),
    "norm-XBN": _classification(
        "data.image_size=32", "model.name=resnet18", "model.block_norm=GN", "trainer.total_batch_size=8"
    ),
    # optimizers, schedules, precision
    "optimizer-sgd-clipped": _classification("optimizer.clip_gradients=0.5", "optimizer.weight_decay_norm=0"),
    "optimizer-adamw": _classification("optimizer.name=adamw", "optimizer.lr=0.001"),
    "optimizer-lars": _classification("optimizer.name=lars"),
    "schedule-step": _classification("schedule.milestones=[0.5, 0.7]"),
    "schedule-cosine": _classification("schedule.decay=cosine"),
    "schedule-constant": _classification("schedule.decay=constant", "schedule.warmup_steps=0"),
    "precision-bf16": _classification("trainer.precision=bf16-mixed", "optimizer.name=adamw", "optimizer.lr=0.001"),
    "precision-64": _classification("trainer.precision=64-true", "model.norm=SyncBN"),
    "precision-16": _classification("trainer.precision=16-mixed", gpu=True),
    # frozen batch norms
    "freeze-share-precise": _classification("schedule.freeze_bn_at=0.5"),
    "freeze-step-ema": _classification(*_FREEZE, "schedule.freeze_bn_statistics=ema"),
    "freeze-epoch-precise": _classification(*_EPOCH),
    "freeze-CBN": _classification("model.norm=CBN", *_NORM_OPTIONS["CBN"], *_FREEZE),
    "freeze-MBN": _classification("model.norm=MBN", *_NORM_OPTIONS["MBN"], *_FREEZE),
    # how training batches are made
    "data-same-class": _classification("data.composition=same_class"),
    "data-augmented": _classification("data.min_crop=0.5", "data.flip=0.5"),
    "data-no-workers": _classification("data.min_crop=0.5", "data.num_workers=0"),
    # more ranks: the sum over ranks must not depend on when a session began
    "ranks-1": _classification("model.norm=MBN", *_NORM_OPTIONS["MBN"], world_size=1),
    "ranks-3": _classification(world_size=3),
    "ranks-3-64": _classification("trainer.precision=64-true", "model.norm=SyncBN", world_size=3),
    "ranks-3-resnet": _classification(
        "data.image_size=32", "model.name=resnet18", "trainer.total_batch_size=6", world_size=3
    ),
    "ranks-3-detection": _head("BN", "optimizer.name=adamw", "optimizer.lr=0.001"),
    "ranks-4-moco": _contrastive("model.query=shuffle_bn", world_size=4),
    # detection
    **{f"detection-{norm}": _head(norm) for norm in ("BN", "SyncBN", "ShuffleBN", "BatchRenorm", "MBN", "LN")},
    "detection-CBN": _head(
        "CBN",
        "schedule.burn_in=0.4",
        "model.box_head.norm_options={window: 3, rho: 0}",
        "model.mask_head.norm_options={window: 3, rho: 0}",
    ),
    "detection-shuffled-statistics": _head(
        "BN", "model.box_head.roi_shuffle=statistics", "model.mask_head.roi_shuffle=statistics"
    ),
    "detection-shuffled-features": _head(
        "BN", "model.box_head.roi_shuffle=features", "model.mask_head.roi_shuffle=features"
    ),
    "detection-frozen": _head("BN", "schedule.freeze_bn_at=0.5"),
    "detection-group-of-images": _head("BN", "model.images_per_group=3", "data.min_size=[56,64]", "data.flip=0.5"),
    "detection-resnet": _detection(
        "model.backbone={name: resnet18_fpn, norm: BN}", "model.rpn.anchor_sizes=[]", "trainer.total_batch_size=2"
    ),
    # contrastive
    **{
        f"moco-{word}": _contrastive(f"model.query={word}")
        for word in ("bn", "sync_bn", "shuffle_bn", "shuffle_images")
    },
    "moco-gn": _contrastive("model.query=gn", "model.norm_options={num_groups: 4}"),
    "moco-ghost_bn": _contrastive("model.query=ghost_bn", "model.norm_options={group_size: 4}"),
    "moco-loader_shuffle": _contrastive("model.query=bn", "model.key=loader_shuffle"),
    "moco-eman": _contrastive("model.query=bn", "model.key=eman"),
    "moco-momentum-schedule": _contrastive("model.momentum_end=1.0", "optimizer.name=lars", "schedule.decay=cosine"),
    "moco-copied-statistics": _contrastive("model.teacher_statistics=copy"),
    "moco-averaged-statistics": _contrastive("model.teacher_statistics=ema"),
    "moco-odd-queue": _contrastive("model.queue_size=37", "model.head=mlp"),
    "moco-frozen": _contrastive(*_FREEZE),
    "moco-bf16": _contrastive("trainer.precision=bf16-mixed"),
    "moco-resnet": _contrastive("model.backbone=resnet18", "data.image_size=32", "trainer.total_batch_size=8"),
    "moco-views-of-lightly": _contrastive("data.views={name: moco_v2}"),
    **{
        f"simclr-{word}": _contrastive("model.method=simclr", f"model.query={word}")
        for word in ("bn", "sync_bn", "shuffle_bn", "shuffle_images")
    },
    "simclr-views-of-lightly": _contrastive("model.method=simclr", "data.views={name: simclr}"),
    # several at once, for CI
    "many-classification": _classification(
        "model.norm=CBN",
        *_NORM_OPTIONS["CBN"],
        "optimizer.name=adamw",
        "optimizer.lr=0.001",
        "schedule.decay=cosine",
        "data.min_crop=0.5",
        "data.flip=0.5",
        world_size=3,
    ),
    "many-frozen": _classification(
        "model.norm=BatchRenorm",
        "trainer.precision=64-true",
        "optimizer.clip_gradients=0.5",
        "data.composition=same_class",
        "schedule.freeze_bn_unit=step",
        "schedule.freeze_bn_at=5",
    ),
    "many-detection": _detection(
        "model.box_head.norm=MBN",
        "schedule.double_forward=true",
        "model.mask_head.norm=BN",
        "model.mask_head.roi_shuffle=features",
        "data.flip=0.5",
    ),
    "many-moco": _contrastive(
        "model.query=shuffle_bn",
        "model.momentum_end=1.0",
        "model.queue_size=37",
        "optimizer.name=lars",
        "trainer.precision=bf16-mixed",
    ),
}

CHOSEN = [name for name in CASES if name.startswith("many-")]


# ---------------------------------------------------------------------------------------- runs


def found_differences(case: Case, folder: Path, stops: Sequence[int] | None = None) -> list[str]:
    """Run ``case`` in ``folder`` undisturbed, then stopped after each of ``stops`` steps; what differs, a line each.

    Args:
        stops: by default every step of the run, the last too: there only the evaluation is left to do.
    """
    text = {"detection": DETECTION, "classification": CLASSIFICATION, "contrastive": CONTRASTIVE}[case.task]
    config_file = folder / "config.yaml"
    config_file.write_text(text.format(root=folder / "data") if case.task == "detection" else text)
    whole = folder / "whole"
    _train(case, config_file, whole, resume=False)
    found = []
    for stop in range(1, STEPS + 1) if stops is None else stops:
        stopped = folder / f"stopped-{stop}"
        shutil.copytree(whole, stopped)
        if stop < STEPS:
            stop_at(stopped, stop)
        else:
            record = json.loads((stopped / "record.json").read_text())
            (stopped / "record.json").write_text(json.dumps({**record, "status": "running", "results": {}}))
        _train(case, config_file, stopped, resume=True)
        found += [f"stopped after step {stop}: {line}" for line in run_differences(whole, stopped, since=stop)]
        shutil.rmtree(stopped)
    return found


def _train(case: Case, config_file: Path, folder: Path, *, resume: bool) -> None:
    on = f"trainer.num_gpus={case.world_size}" if case.gpu else f"trainer.num_processes={case.world_size}"
    settings = [f"output_dir={folder}", on, *_COMMON, *case.overrides]
    answers = run_ranks(launched, case.world_size, "train", config_file, settings, resume, timeout=300)
    if any(answer[0] != "finished" for answer in answers):
        raise AssertionError(f"{folder.name} did not finish: {answers}")


def run_differences(whole: Path, resumed: Path, since: int = 0) -> Iterator[str]:
    """What two finished runs of one config differ in, a line each: checkpoints of both after step ``since``, rows,
    TensorBoard's numbers, and the record."""
    for path in sorted(whole.glob("*.pt")):
        known = (resumed / path.name).exists()
        if path.name == "model_final.pt" or (known and int(path.stem[-7:]) > since):
            one, other = (torch.load(folder / path.name, weights_only=True) for folder in (whole, resumed))
            yield from differences(one, other, path.stem + ":")
    yield from differences(_rows(whole), _rows(resumed), "metrics.json:")
    yield from differences(_board(whole), _board(resumed), "TensorBoard:")
    before, after = read_record(whole), read_record(resumed)
    for name in ("status", "batch", "results", "leakage", "notes"):
        yield from differences(getattr(before, name), getattr(after, name), f"record.json:{name}")


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in read_metrics(folder)]


def _board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = set(board.Tags()["scalars"]) - _TIMES
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in sorted(names)}


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """One line for each place where ``one`` and ``other``, nests of dicts, lists, tensors and numbers, are not the
    same to the bit (a NaN is itself, -0.0 is not 0.0); times and paths of a checkpoint may differ."""
    if at.partition(":")[2] in _MAY_DIFFER or at.rpartition(".")[2] in ("step_times", "wait_times"):
        return
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            path = f"{at}{key}" if at.endswith(":") or not at else f"{at}.{key}"
            if key not in one or key not in other:
                yield f"{path}: only {'undisturbed' if key in one else 'resumed'}"
            else:
                yield from differences(one[key], other[key], path)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield f"{at}: {len(one)} items, resumed {len(other)}"
        for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            yield from differences(mine, theirs, f"{at}[{index}]")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            yield f"{at}: {one.dtype} {tuple(one.shape)}, resumed {other.dtype} {tuple(other.shape)}"
        elif not torch.equal(*(item.contiguous().reshape(-1).view(torch.uint8) for item in (one, other))):
            gap = (one.double() - other.double()).abs().max().item()
            yield f"{at}: differs by up to {gap:.3g}"
    elif type(one) is not type(other) or repr(one) != repr(other):
        yield f"{at}: {one!r}, resumed {other!r}"


# ------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases named (or ``--all``) and print what differs; exit code 1 if anything does."""
    parser = argparse.ArgumentParser(prog="python -m tests.training.exact_resume", description=main.__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--all", action="store_true", help="every case that this machine can run")
    args = parser.parse_args(argv)
    names = list(CASES) if args.all else args.cases or CHOSEN
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}")
    bad = skipped = 0
    for name in names:
        if CASES[name].gpu and torch.cuda.device_count() < CASES[name].world_size:
            print(f"{name}: skipped, needs {CASES[name].world_size} GPUs", flush=True)
            skipped += 1
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = found_differences(CASES[name], Path(folder))
            except AssertionError as error:
                found = [str(error)]
        print(f"{name}: {f'{len(found)} differences' if found else 'exact'} ({time.perf_counter() - began:.1f} s)")
        print(*(f"    {line}" for line in found[:12]), *(["    ..."] if len(found) > 12 else []), sep="\n", flush=True)
        bad += bool(found)
    print(f"{len(names) - bad - skipped} of {len(names)} exact, {skipped} skipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
