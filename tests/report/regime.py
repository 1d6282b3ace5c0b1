"""Output folders of runs, written from the numbers of the measured regime: six variants, one or three seeds."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

from leakfree.records import RunRecord, write_record

# RoI accuracy on val (image, random, precise) per seed; box AP the same; None: no batch statistics
REGIME: dict[str, dict[str, Any]] = {
    "bn_image": {
        "norm": "BN", "images_per_group": 1,
        "roi": [(0.722, 0.360, 0.293), (0.721, 0.384, 0.307), (0.716, 0.340, 0.263)],
        "ap": [(0.595, 0.372, 0.308), (0.598, 0.390, 0.370), (0.592, 0.360, 0.343)],
        "influence": (0.214, 0.0), "pairs": (0.731, 0.474),
    },
    "syncbn": {
        "norm": "SyncBN", "images_per_group": 0,
        "roi": [(0.472, 0.583, 0.601), (0.480, 0.570, 0.591), (0.476, 0.570, 0.595)],
        "ap": [(0.365, 0.480, 0.531), (0.366, 0.477, 0.509), (0.370, 0.480, 0.525)],
        "influence": (0.0061, 0.0432), "pairs": (0.489, 0.551),
    },
    "bn_shuffle": {
        "norm": "ShuffleBN", "images_per_group": 1,
        "roi": [(0.493, 0.580, 0.593), (0.485, 0.570, 0.594), (0.482, 0.576, 0.591)],
        "ap": [(0.402, 0.495, 0.529), (0.398, 0.490, 0.514), (0.397, 0.497, 0.517)],
        "influence": (0.0282, 0.1904), "pairs": (0.493, 0.549),
    },
    "bn_image_frozen_tail": {
        "norm": "BN", "images_per_group": 1, "freeze_bn_at": 0.75,
        "roi": [(0.671, 0.545, 0.552), (0.680, 0.538, 0.541), (0.683, 0.532, 0.540)],
        "ap": [(0.540, 0.470, 0.487), (0.543, 0.466, 0.492), (0.543, 0.465, 0.487)],
        "influence": (0.183, 0.0), "pairs": (0.688, 0.560),
    },
    "frozenbn": {
        "norm": "FrozenBN", "images_per_group": 1,
        "roi": [(None, None, 0.577), (None, None, 0.578), (None, None, 0.587)],
        "ap": [(None, None, 0.493), (None, None, 0.503), (None, None, 0.502)],
        "influence": (0.0, 0.0), "pairs": (None, None),
    },
    "gn": {
        "norm": "GN", "images_per_group": 1,
        "roi": [(None, None, 0.564), (None, None, 0.554), (None, None, 0.576)],
        "ap": [(None, None, 0.495), (None, None, 0.489), (None, None, 0.495)],
        "influence": (0.0, 0.0), "pairs": (None, None),
    },
}  # fmt: skip
NO_BATCH_STATISTICS = "image, random, precise: n.a.: the RoI heads have no batch statistics"


def make_config(**changes: Any) -> dict[str, Any]:
    """A config as a run records it, with dotted ``changes``."""
    digits = {"num_images": 1500, "image_size": 96, "class_sharing": 1.0, "clutter": 0.35}
    config: dict[str, Any] = {
        "task": "detection", "seed": 0, "output_dir": "output",
        "data": {
            "root": "datasets",
            "train": {"name": "digit_scenes", "digits": digits},
            "val": {"name": "digit_scenes", "digits": {**digits, "num_images": 240}},
        },
        "model": {
            "images_per_group": 0,
            "box_head": {"name": "4conv1fc", "norm": "BN", "norm_options": {}, "roi_shuffle": "none"},
            "mask_head": {"enabled": True, "norm": "BN"},
        },
        "schedule": {"max_steps": 400, "freeze_bn_at": 1.0},
        "trainer": {"total_batch_size": 8, "num_gpus": 0, "num_processes": 2},
        "evaluation": {"statistics": ["population", "precise", "image", "random"]},
        "leakage": {"enabled": True, "max_images": 240},
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def regime_record(variant: str, seed: int, name: str | None = None) -> RunRecord:
    """The record of one variant and seed of the measured regime."""
    facts = REGIME[variant]
    roi = dict(zip(("image", "random", "precise"), facts["roi"][seed], strict=True))
    box = dict(zip(("image", "random", "precise"), facts["ap"][seed], strict=True))
    stored = facts["norm"] in ("GN", "FrozenBN")
    if stored:  # one answer, recorded under population
        roi, box = {"population": roi["precise"]}, {"population": box["precise"]}
    else:
        roi, box = roi | {"population": roi["precise"] - 0.004}, box | {"population": box["precise"] + 0.006}
    results = {
        mode: {"bbox/AP": value, "bbox/AP50": value * 1.45, "bbox/AP75": value * 0.9, "segm/AP": value * 0.7,
               "segm/AP50": value * 1.42, "segm/AP75": value * 0.62}
        for mode, value in box.items()
    }  # fmt: skip
    if stored:
        results |= {"precise": {}, "image": {}, "random": {}}
    within, between = facts["influence"]
    same, pair = facts["pairs"]
    norm, group, freeze = facts["norm"], facts["images_per_group"], facts.get("freeze_bn_at", 1.0)
    return RunRecord(
        name=name or f"{variant}_seed{seed}",
        task="detection",
        status="finished",
        seed=seed,
        config=make_config(
            seed=seed, output_dir=f"runs/{variant}_seed{seed}", model__images_per_group=group,
            model__box_head__norm=norm, model__mask_head__norm=norm, schedule__freeze_bn_at=freeze,
        ),
        environment={"leakfree": "0.1.0", "python": "3.11.9", "torch": "2.15.0", "cpu": "x86_64, 4 cores", "ranks": 2},
        timing={"steps": 400, "seconds": 27.0 + seed, "seconds_per_step": 0.0675 + 0.0025 * seed,
                "data_seconds_per_step": 0.0031, "peak_memory_mib": 812.0 + seed},
        batch={"total": 8, "per_rank": 4,
               "normalization": {"box head": "32 RoIs (1 image)" if norm == "BN" else "256 RoIs (8 images)",
                                 "mask head": "about 16 RoIs"}},
        results=results,
        leakage={
            "influence": {"within_image": within, "between_images": between, "total": within + between},
            "roi_accuracy/train": roi,
            "roi_accuracy/val": roi,
            "pairs": {"same_class": same, "random_pair": pair},
        },
        notes=[NO_BATCH_STATISTICS] if stored else [],
    )  # fmt: skip


def curve_rows(variant: str, seed: int, steps: int = 400) -> list[dict[str, float]]:
    """A training curve of the right shape; its noise depends on the seed."""
    noise = random.Random(f"{variant} {seed}")
    end = max(value for value in REGIME[variant]["roi"][seed] if value is not None)
    rows = []
    for step in range(20, steps + 1, 20):
        progress = 1 - math.exp(-step / 120)
        jitter = noise.uniform(-0.02, 0.02)
        rows.append(
            {
                "step": step,
                "lr": 0.002,
                "loss": 3.2 - 2.4 * end * progress + 3 * jitter,
                "loss_classifier": 2.0 - 1.9 * end * progress + 2 * jitter,
                "roi_accuracy": end * progress + jitter,
            }
        )
    return rows


def write_run(folder: Path, record: RunRecord, rows: list[dict[str, Any]] | None = None) -> str:
    """Write an output folder as a run leaves it; returns its path as a user would type it."""
    folder.mkdir(parents=True)
    write_record(folder, copy.deepcopy(record))
    (folder / "config.yaml").write_text("task: detection\n")
    if rows:
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
