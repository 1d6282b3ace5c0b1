#!/usr/bin/env python
"""The tables of the README from the records of the runs: means over seeds, and paired differences with intervals.

    python projects/contrastive_shortcut/table.py output/contrastive_shortcut

A difference is taken seed by seed; its interval is Student's at 95%, over as many seeds as both variants have.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from scipy.stats import t

from leakfree.records import RunRecord, read_record

Value = Callable[[RunRecord], float | None]
COLUMNS: dict[str, Value] = {
    "loss": lambda record: record.leakage["pretext"]["loss"],
    "same": lambda record: record.leakage["pretext"]["same"],
    "other": lambda record: record.leakage["pretext"]["other"],
    "same − other": lambda record: record.leakage["pretext"]["gap"],
    "kNN": lambda record: record.results["precise"]["knn"],
    "linear": lambda record: record.results["precise"]["linear"],
    "query probe": lambda record: record.leakage["pretext"]["query_probe"],
    "key probe": lambda record: record.leakage["pretext"]["key_probe"],
}
PAIRS = [  # (variant, reference): what the study asks
    ("style_shuffle_g4", "style_bn_g4"),
    ("style_sync", "style_bn_g4"),
    ("style_sync", "style_shuffle_g4"),
    ("plain_shuffle_g4", "plain_bn_g4"),
    ("plain_sync", "plain_shuffle_g4"),
    ("simclr_shuffle_g4", "simclr_bn_g4"),
    ("simclr_sync", "simclr_bn_g4"),
    ("slow_shuffle_g4", "slow_bn_g4"),
    ("slow_eman", "slow_bn_g4"),
    ("slow_gn", "slow_bn_g4"),
    ("slow_eman", "slow_shuffle_g4"),
]
DIFFERENCES = ("same − other", "kNN", "linear")


def read_runs(folder: Path) -> dict[str, dict[int, RunRecord]]:
    """Finished runs: variant -> seed -> record."""
    runs: dict[str, dict[int, RunRecord]] = {}
    for path in sorted(folder.glob("*/record.json")):
        record = read_record(path)
        if record.status == "finished":
            runs.setdefault(re.sub(r"_seed\d+$", "", path.parent.name), {})[record.seed] = record
    return runs


def values_of(records: dict[int, RunRecord], value: Value) -> dict[int, float]:
    found = {seed: value(record) for seed, record in records.items()}
    return {seed: number for seed, number in found.items() if number is not None}


def interval(values: list[float]) -> str:
    """Mean and half of its 95% interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}"


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(f"usage: {sys.argv[0]} FOLDER (of the runs of tools/sweep.py)", file=sys.stderr)
        return 2
    runs = read_runs(Path(sys.argv[1]))
    print("| variant | seeds | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    for variant, records in runs.items():
        cells = []
        for value in COLUMNS.values():
            numbers = list(values_of(records, value).values())
            spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.3f}{spread}" if numbers else "n.a.")
        print(f"| {variant} | {len(records)} | " + " | ".join(cells) + " |")
    print("\n| difference | seeds | " + " | ".join(DIFFERENCES) + " |\n|---|---|" + "---|" * len(DIFFERENCES))
    for variant, reference in PAIRS:
        seeds = sorted(set(runs.get(variant, {})) & set(runs.get(reference, {})))
        if not seeds:
            continue
        cells = []
        for name in DIFFERENCES:
            one, two = (values_of(runs[item], COLUMNS[name]) for item in (variant, reference))
            cells.append(interval([one[seed] - two[seed] for seed in seeds]))
        print(f"| {variant} − {reference} | {len(seeds)} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
