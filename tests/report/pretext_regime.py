"""Output folders of contrastive runs, written from the numbers of the measured regimes.

"style": an image-specific illumination survives the augmentation, three seeds; "plain": digits as they are, one seed.
Where the study gives a mean only, each seed has it.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from leakfree.records import RunRecord
from tests.report.regime import write_run

# per seed: (pretext accuracy among the same mates, among others, loss, kNN under precise statistics)
STYLE: dict[str, dict[str, Any]] = {
    "bn": {"values": [(0.410, 0.095, 3.41, 0.368), (0.598, 0.095, 3.10, 0.565), (0.495, 0.095, 3.30, 0.431)],
           "probes": (0.735, 0.743), "moved": 0.751, "influence": 0.250, "together": "4 images"},
    "shuffle_bn": {"values": [(0.368, 0.376, 3.47, 0.676), (0.447, 0.463, 3.20, 0.805), (0.384, 0.381, 3.40, 0.656)],
                   "probes": (0.560, 0.561), "moved": 0.183, "influence": 0.063,
                   "together": "4 images, drawn at random from 64"},
    "sync_bn": {"values": [(0.459, 0.389, 3.47, 0.577), (0.578, 0.518, 3.20, 0.712), (0.577, 0.522, 3.40, 0.724)],
                "probes": (0.512, 0.490), "moved": 0.058, "influence": 0.070, "together": "64 images"},
    "gn": {"values": [(0.950, 0.950, 5.59, 0.109), (0.003, 0.003, 5.59, 0.127), (0.003, 0.003, 5.59, 0.131)],
           "probes": (None, None), "moved": 0.0, "influence": 0.0, "together": "each image alone"},
}  # fmt: skip
PLAIN: dict[str, dict[str, Any]] = {
    "bn": {**STYLE["bn"], "values": [(0.633, 0.081, 2.90, 0.970)]},
    "shuffle_bn": {**STYLE["shuffle_bn"], "values": [(0.284, 0.273, 3.80, 0.958)]},
}
ALONE = "precise: no statistics to re-estimate (none, or frozen), so it is population"


def pretext_config(key: str, seed: int, regime: str = "style", **model: Any) -> dict[str, Any]:
    """A config as a run records it, as far as a report reads it."""
    return {
        "task": "contrastive", "seed": seed, "output_dir": f"output/{key}_seed{seed}",
        "data": {"train": {"name": "digits"}, "val": {"name": "digits"},
                 "views": {"name": "digits", "strength": 0.5, "style": 0.15 if regime == "style" else 0.0}},
        "model": {"method": "moco", "query": "gn" if key == "gn" else "bn", "key": key, "images_per_group": 4,
                  "queue_size": 512, "temperature": 0.2, **model},
        "schedule": {"max_steps": 800, "freeze_bn_at": 1.0},
        "trainer": {"total_batch_size": 64},
        "evaluation": {"statistics": ["population", "precise"]},
        "leakage": {"enabled": True},
    }  # fmt: skip


def pretext_record(key: str, seed: int, regime: str = "style", **model: Any) -> RunRecord:
    """The record of one variant and seed."""
    facts = (STYLE if regime == "style" else PLAIN)[key]
    same, other, loss, knn = facts["values"][seed]
    query_probe, key_probe = facts["probes"]
    return RunRecord(
        name=f"{key}_seed{seed}",
        task="contrastive",
        status="finished",
        seed=seed,
        config=pretext_config(key, seed, regime, **model),
        environment={"leakfree": "0.1.0", "torch": "2.15.0", "cpu": "x86_64, 4 cores"},
        timing={"steps": 800, "seconds": 52.0, "seconds_per_step": 0.065, "peak_memory_mib": 934.0},
        batch={"total": 64, "per_rank": 64,
               "normalization": {"query": "each image alone" if key == "gn" else "4 images", "key": facts["together"]}},
        results={"population": {"knn": knn + 0.005, "linear": knn + 0.1},
                 "precise": {"knn": knn, "linear": knn + 0.11}},
        leakage={
            "pretext": {"same": same, "other": other, "loss": loss, "moved": facts["moved"],
                        "query_probe": query_probe, "key_probe": key_probe, "gap": same - other},
            "influence": {"within_group": facts["influence"], "between_groups": 0.0, "total": facts["influence"]},
        },
        notes=[ALONE] if key == "gn" else [],
    )  # fmt: skip


def pretext_rows(key: str, seed: int, regime: str = "style") -> list[dict[str, float]]:
    """Curves of the right shape: training every 20 steps, validation every 200, none at the last step."""
    same, other, loss, knn = (STYLE if regime == "style" else PLAIN)[key]["values"][seed]
    rows: list[dict[str, float]] = []
    for step in range(20, 801, 20):
        way = 1 - math.exp(-step / 200)
        rows.append({"step": step, "lr": 0.2, "loss": 6.24 - (6.24 - loss) * way, "pretext": same * way})
        if step % 200 == 0 and step < 800:
            rows.append({"step": step, "knn": knn * way, "pretext/same": same * way, "pretext/other": other * way})
    return rows


def write_pretext_runs(folder: Path, names: tuple[str, ...], num_seeds: int = 1, regime: str = "style") -> list[str]:
    """Write the output folders as runs leave them; returns their paths."""
    return [
        write_run(
            folder / f"{name}_seed{seed}",
            copy.deepcopy(pretext_record(name, seed, regime)),
            pretext_rows(name, seed, regime),
        )
        for name in names
        for seed in range(num_seeds)
    ]
