"""Load the runs to compare and group those that differ only in their seed into one variant.

Everything a report shows is read here, once, and checked: a record edited by hand or written by a
crashing process becomes one clear line, not a traceback halfway through a page.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leakfree.errors import RunError, choices
from leakfree.records import RunRecord, read_metrics, read_record

__all__ = ["Run", "Spread", "Variant", "by_task", "find_variant", "flatten", "group_runs", "is_number", "load_runs"]

NOT_A_DIFFERENCE = ("seed", "output_dir")  # config keys in which the runs of one variant may differ

_SEED_SUFFIX = re.compile(r"(?:[-_. ]*seed|(?:^|[-_. ]+)s|^)[-_=. ]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Spread:
    """A number over the runs of a variant: mean, lowest and highest of ``count`` values."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that exist, or None if none does."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        # fsum, then clipped: the mean of equal values must not leave their range by a rounding error
        mean = min(max(math.fsum(known) / len(known), min(known)), max(known))
        return cls(mean, min(known), max(known), len(known))


@dataclass(frozen=True)
class Run:
    """One output folder: its record, its training curve, and what it lacks."""

    path: str  # as the user gave it
    folder: Path
    record: RunRecord
    rows: list[dict[str, Any]]  # of metrics.json
    missing: list[str] = field(default_factory=list)  # in words; what an unfinished run has not recorded

    @property
    def finished(self) -> bool:
        return self.record.status == "finished"

    @property
    def last_step(self) -> int | None:
        steps = [row["step"] for row in self.rows if isinstance(row.get("step"), int)]
        return max(steps, default=None)

    def last(self, key: str) -> float | None:
        """The number of this name that was logged last."""
        return next((float(row[key]) for row in reversed(self.rows) if is_number(row.get(key))), None)


@dataclass(frozen=True)
class Variant:
    """Runs of one config, which differ at most in their seed: one row of a table, one colour in a figure."""

    label: str
    runs: list[Run]

    @property
    def task(self) -> str:
        return self.runs[0].record.task

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].record.config

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        return [run.record.seed for run in self.runs]

    @property
    def notes(self) -> list[str]:
        """The notes of its runs, each once, in order."""
        return list(dict.fromkeys(note for run in self.runs for note in run.record.notes))

    def spread(self, read: Callable[[RunRecord], float | None]) -> Spread | None:
        """What ``read`` finds in the records of this variant, over its runs."""
        return Spread.of(read(run.record) for run in self.runs)


def is_number(value: Any) -> bool:
    """Whether a value of a row is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted keys; lists and empty dicts stay values.

    >>> flatten({"a": {"b": 1, "c": []}, "d": {}})
    {'a.b': 1, 'a.c': [], 'd': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_runs(paths: list[str]) -> list[Run]:
    """Read the runs in the order given.

    Raises:
        RunError: no path; a folder without a usable record; one folder twice.
    """
    if not paths:
        raise RunError("nothing to compare: give the output folders of one or more runs")
    runs: dict[Path, Run] = {}
    for path in paths:
        run = _load_run(path)
        if run.folder in runs:
            raise RunError(f"{path}: given twice (first as {runs[run.folder].path}); give each run once")
        runs[run.folder] = run
    return list(runs.values())


def group_runs(runs: list[Run]) -> list[Variant]:
    """Group finished runs of one task whose configs differ only in the seed; the order of first appearance is kept.

    An unfinished run stays alone: its numbers, if any, are not those of a whole training.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = {key: value for key, value in run.record.config.items() if key not in NOT_A_DIFFERENCE}
        same = json.dumps([run.record.task, config], sort_keys=True) if run.finished else f"unfinished {run.folder}"
        groups.setdefault(same, []).append(run)
    members = list(groups.values())
    return [Variant(label, group) for label, group in zip(_labels(members), members, strict=True)]


def by_task(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    """The variants of each task, tasks and variants in the order of first appearance: numbers compare within one."""
    tasks: dict[str, list[Variant]] = {}
    for variant in variants:
        tasks.setdefault(variant.task, []).append(variant)
    return tasks


def find_variant(variants: list[Variant], name: str) -> Variant:
    """The variant with this label, or that holds the run of this name or path.

    Raises:
        RunError: there is none; the message lists the labels, the nearest first.
    """
    folder = Path(name).resolve()
    for variant in variants:
        if name == variant.label:
            return variant
    for variant in variants:
        if any(name in (run.record.name, run.folder.name) or folder == run.folder for run in variant.runs):
            return variant
    raise RunError(f"baseline {name!r} is none of the runs: {choices(name, [item.label for item in variants])}")


def _load_run(path: str) -> Run:
    record = _checked(path, read_record(path))
    folder = Path(path).resolve()
    folder = folder.parent if folder.is_file() else folder
    return Run(path, folder, record, read_metrics(folder), _missing(record))


def _checked(path: str, record: RunRecord) -> RunRecord:
    """Check the numbers in the tables that a report reads; those that are not finite become None."""

    def number(key: str, value: Any) -> float | None:
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value if value is None or math.isfinite(value) else None
        raise RunError(f"{path}: record.json: {key}: expected a number or null, got {value!r:.60}")

    def table(key: str, value: Any) -> dict[str, float | None]:
        if not isinstance(value, dict):
            raise RunError(f"{path}: record.json: {key}: expected an object of numbers, got {value!r:.60}")
        return {name: number(f"{key}.{name}", item) for name, item in value.items()}

    return replace(
        record,
        timing=table("timing", record.timing),
        results={mode: table(f"results.{mode}", values) for mode, values in record.results.items()},
        leakage={group: table(f"leakage.{group}", values) for group, values in record.leakage.items()},
        notes=[str(note) for note in record.notes],
    )


def _missing(record: RunRecord) -> list[str]:
    """What an unfinished run was asked for by its config and has not recorded."""
    if record.status == "finished":
        return []
    flat = flatten(record.config)
    modes = [str(mode) for mode in flat.get("evaluation.statistics") or []]
    absent = [mode for mode in modes if not record.results.get(mode)]
    missing = [f"results under {', '.join(absent)} statistics"] if absent else []
    if flat.get("leakage.enabled", True) and not record.leakage:
        missing.append("leakage numbers")
    return missing + ([] if record.timing else ["timing"])


def _labels(groups: list[list[Run]]) -> list[str]:
    """Short names that tell the variants apart: the folder's name, with parents where names repeat."""
    parts = [_stem(group) for group in groups]
    depth = [1] * len(groups)
    while True:
        labels = ["/".join(names[-take:]) for names, take in zip(parts, depth, strict=True)]
        deeper = [
            index
            for index, label in enumerate(labels)
            if depth[index] < len(parts[index])
            and any(label == other and parts[index] != parts[place] for place, other in enumerate(labels))
        ]
        if not deeper:
            break
        for index in deeper:
            depth[index] += 1
    seen: dict[str, int] = {}
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:  # one stem, two configs: seeds are all that the folders' names tell
            labels[index] = f"{label} ({seen[label]})"
    return labels


def _stem(group: list[Run]) -> list[str]:
    """The path of a variant as parts, without the piece that names the seed if several runs share the rest."""
    paths = [[part for part in run.folder.parts if part != run.folder.anchor] for run in group]
    if len(group) == 1:
        return paths[0] or ["/"]
    stems = [[*path[:-1], _SEED_SUFFIX.sub("", path[-1])] for path in paths]
    stems = [stem if stem[-1] else stem[:-1] for stem in stems]
    if all(stem[-1:] == stems[0][-1:] for stem in stems) and stems[0]:
        return stems[0]
    return [*paths[0][:-1], f"{paths[0][-1]} and {len(group) - 1} more"]
