"""The tables of a report as plain rows of text: the page and the console both print these.

No markup here: a cell is its text, its range over seeds, and what it has to be marked with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from leakfree.report.measures import (
    COST,
    HEADLINE,
    LEAK,
    Group,
    Measure,
    difference,
    format_range,
    format_value,
    is_blind,
    is_visible_leak,
    leak_gap,
)
from leakfree.report.runs import NOT_A_DIFFERENCE, Run, Variant, flatten

__all__ = [
    "Cell", "Differences", "Row", "Table", "best_variants", "config_differences", "cost_table", "describe",
    "environment_rows", "footnotes", "headline_table", "leak_table", "metric_table", "normalized_parts",
    "normalized_together", "recorded_metrics", "select", "shown",
]  # fmt: skip


_GROUPED_BY_IMAGE = ("BN", "BatchStatBN")
_GROUPED_BY_COUNT = ("bn", "shuffle_bn", "shuffle_images", "loader_shuffle")
_METHODS = {"moco": "MoCo,", "simclr": "SimCLR,"}


@dataclass(frozen=True)
class Cell:
    """One number of one variant; ``text`` is "n.a." where there is none, and ``reason`` says why."""

    measure: str
    text: str
    value: float | None = None
    range: str = ""  # lowest and highest over seeds
    partial: str = ""  # "2 of 3 seeds" where some have no value
    delta: str = ""  # difference from the baseline
    delta_range: str = ""  # its lowest and highest over pairs of equal seed
    reason: str = ""  # why there is no number
    footnote: int = 0  # number of the footnote that says more; 0 = none
    is_best: bool = False
    is_leak: bool = False
    is_blind: bool = False  # a pretext loss near that of features that tell nothing
    stands_in: bool = False  # stored statistics stand in for precise population statistics


@dataclass(frozen=True)
class Row:
    variant: Variant
    index: int  # of the variant in the report: its colour and marker
    cells: list[Cell]
    texts: list[str] = field(default_factory=list)  # columns that hold words


@dataclass(frozen=True)
class Table:
    groups: list[Group]  # only groups and columns with a number in some row
    rows: list[Row]
    text_heads: list[str] = field(default_factory=list)

    @property
    def starts(self) -> set[int]:
        """The positions at which a group begins."""
        sizes = [len(group.measures) for group in self.groups]
        return {sum(sizes[:position]) for position in range(len(sizes))}

    @property
    def measures(self) -> list[Measure]:
        return [measure for group in self.groups for measure in group.measures]


@dataclass(frozen=True)
class Differences:
    """The keys in which configs differ; ``cells`` holds one (text, equals the reference) per variant."""

    reference: int
    rows: list[tuple[str, list[tuple[str, bool]]]]
    num_equal: int


def headline_table(variants: Sequence[Variant], baseline: Variant | None = None) -> Table:
    """AP or accuracy under each kind of statistics, gaps, influence and cost: the table to look at first."""
    return select(HEADLINE, variants, baseline)


def leak_table(variants: Sequence[Variant]) -> Table:
    """RoI accuracy under each kind of statistics, pairs of images, probes, influence."""
    return select(LEAK, variants)


def cost_table(variants: Sequence[Variant]) -> Table:
    """Time, memory, and what one forward of each part of the model normalizes together."""
    parts = normalized_parts(variants)
    heads = ["images per step", "per rank", *(f"normalized together: {part}" for part in parts)]

    def texts(variant: Variant) -> list[str]:
        batch = variant.runs[0].record.batch
        normalized = [normalized_together(variant, part) for part in parts]
        return [*(shown(batch.get(key)) for key in ("total", "per_rank")), *normalized]

    rows = [texts(variant) for variant in variants]
    kept = [column for column in range(len(heads)) if any(row[column] != shown(None) for row in rows)]
    table = select(COST, variants)
    return Table(
        table.groups,
        [
            Row(row.variant, row.index, row.cells, [words[column] for column in kept])
            for row, words in zip(table.rows, rows, strict=True)
        ],
        [heads[column] for column in kept],
    )


def metric_table(variants: Sequence[Variant]) -> list[tuple[Variant, int, list[tuple[str, list[Cell]]]]]:
    """Every recorded result: per variant (with its index) and kind of statistics, one cell per metric."""
    metrics, notes = recorded_metrics(variants), footnotes(variants)
    order = ["image", "same_class", "random", "precise", "population", "target", "embeddings"]
    table = []
    for index, variant in enumerate(variants):
        modes = dict.fromkeys(mode for run in variant.runs for mode in run.record.results)
        rows = []
        for mode in sorted(modes, key=lambda mode: (order.index(mode) if mode in order else len(order), mode)):
            measures = [Measure(f"{name}.{mode}", name, _reader(mode, name), _metric_style(name)) for name in metrics]
            cells = [_cell(measure, variant, notes) for measure in measures]
            if any(cell.value is not None for cell in cells):
                rows.append((mode, cells))
        if rows:
            table.append((variant, index, rows))
    return table


def recorded_metrics(variants: Sequence[Variant]) -> list[str]:
    """The names of all metrics with a value, box before mask before the rest, in the order recorded."""
    names = dict.fromkeys(
        metric
        for variant in variants
        for run in variant.runs
        for values in run.record.results.values()
        for metric, value in values.items()
        if value is not None
    )
    return sorted(names, key=lambda name: (not name.startswith("bbox/"), not name.startswith("segm/")))


def _reader(mode: str, metric: str) -> Any:
    return lambda record: record.results.get(mode, {}).get(metric)


def _metric_style(metric: str) -> str:
    return (
        "percent"
        if metric.startswith(("bbox/AP", "segm/AP", "bbox/AR", "segm/AR", "accuracy", "knn", "linear"))
        else "share"
    )


def footnotes(variants: Sequence[Variant]) -> list[list[str]]:
    """The notes of the runs, one entry per distinct list of notes, numbered from 1 in this order."""
    entries: list[list[str]] = []
    for variant in variants:
        if variant.notes and variant.notes not in entries:
            entries.append(variant.notes)
    return entries


def best_variants(measure: Measure, variants: Sequence[Variant]) -> list[Variant]:
    """The variant with the best mean, and those whose range over seeds overlaps its range.

    Only finished variants compete; with one value each, equal numbers as shown share the mark. A mark that all
    would share says nothing and is left out.
    """
    found = [(variant, measure.of(variant)) for variant in variants if variant.finished]
    known = [(variant, spread) for variant, spread in found if spread is not None]
    if not measure.better or len(known) < 2:
        return []
    pick = max if measure.better == "high" else min
    _, best = pick(known, key=lambda item: item[1].mean)
    best_text = format_value(best.mean, measure.style)
    marked = [
        variant
        for variant, spread in known
        if format_value(spread.mean, measure.style) == best_text
        or (min(spread.count, best.count) > 1 and spread.low <= best.high and spread.high >= best.low)
    ]
    return marked if len(marked) < len(known) else []


def config_differences(variants: Sequence[Variant], reference: Variant) -> Differences:
    """The config keys in which the variants differ; seed and output folder are left out."""
    flats = [{k: v for k, v in flatten(item.config).items() if k not in NOT_A_DIFFERENCE} for item in variants]
    position = next(index for index, item in enumerate(variants) if item is reference)
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = []
    for key in keys:
        texts = [shown(flat[key]) if key in flat else "–" for flat in flats]
        if len(set(texts)) > 1:
            rows.append((key, [(text, text == texts[position]) for text in texts]))
    return Differences(position, rows, len(keys) - len(rows))


def environment_rows(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Per key of the environment, its distinct values with the paths of the runs that had them.

    A key with one value for all runs has one entry, with an empty list of runs.
    """
    flats = [flatten(run.record.environment) for run in runs]
    rows = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        holders: dict[str, list[str]] = {}
        for run, flat in zip(runs, flats, strict=True):
            holders.setdefault(shown(flat.get(key)), []).append(run.path)
        same = len(holders) == 1
        rows.append((key, [(value, [] if same else paths) for value, paths in holders.items()]))
    return rows


def describe(variant: Variant) -> str:
    """What normalizes the box head, the classifier or both encoders, in a few words, from the config; else empty."""
    flat = flatten(variant.config)
    if "model.query" in flat:
        query, key, images = (flat.get(f"model.{name}") for name in ("query", "key", "images_per_group"))
        key = query if key == "same" else key
        words = [f"{_METHODS.get(str(flat.get('model.method')), '')} query {query}, key {key}".strip()]
        if images and any(str(word) in _GROUPED_BY_COUNT for word in (query, key)):
            words.append(f"groups of {images}")
        return ", ".join([*words, *_frozen(flat)])
    if "model.norm" in flat:
        words = [str(flat["model.norm"]).replace("none", "no norm")]
        if flat.get("data.composition") == "same_class":
            words.append(f"groups of {flat.get('data.group_size')} images of one class")
        return ", ".join([*words, *_frozen(flat)])
    if "model.box_head.norm" not in flat:
        return ""
    norm = str(flat["model.box_head.norm"])
    shuffle = flat.get("model.box_head.roi_shuffle", "none")
    images = flat.get("model.images_per_group")
    words = [norm.replace("none", "no norm")]
    if shuffle != "none":
        words.append(f"RoI {shuffle} shuffled over random groups")
    elif norm in _GROUPED_BY_IMAGE and isinstance(images, int) and images > 0:
        words.append(f"{images} image{'s' * (images > 1)} per group")
    return ", ".join([*words, *_frozen(flat)])


def _frozen(flat: dict[str, Any]) -> list[str]:
    freeze = flat.get("schedule.freeze_bn_at")
    unit = flat.get("schedule.freeze_bn_unit", "share")
    if not isinstance(freeze, (int, float)) or (unit == "share" and freeze >= 1):
        return []
    return [f"frozen at {100 * freeze:.0f} %" if unit == "share" else f"frozen at {unit} {freeze:g}"]


def shown(value: Any) -> str:
    """A config or environment value as text: strings bare, the rest as JSON; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)


def normalized_parts(variants: Sequence[Variant]) -> list[str]:
    """The parts of the models of which records say what one forward normalizes together."""
    return list(dict.fromkeys(part for item in variants for part in _normalization(item)))


def normalized_together(variant: Variant, part: str) -> str:
    """What one forward of ``part`` normalizes together; a dash where the record does not say."""
    return shown(_normalization(variant).get(part))


def _normalization(variant: Variant) -> dict[str, Any]:
    parts = variant.runs[0].record.batch.get("normalization")
    return parts if isinstance(parts, dict) else {}


def select(groups: Sequence[Group], variants: Sequence[Variant], baseline: Variant | None = None) -> Table:
    """Rows of cells for the columns in which some variant has a number."""
    kept = []
    for group in groups:
        measures = tuple(item for item in group.measures if any(item.of(variant) for variant in variants))
        if measures:
            kept.append(Group(group.head, measures))
    notes = footnotes(variants)
    best = {measure.key: best_variants(measure, variants) for group in kept for measure in group.measures}
    rows = [
        Row(
            variant,
            index,
            [
                _cell(measure, variant, notes, best[measure.key], baseline)
                for group in kept
                for measure in group.measures
            ],
        )
        for index, variant in enumerate(variants)
    ]
    return Table(kept, rows)


def _cell(
    measure: Measure,
    variant: Variant,
    notes: list[list[str]],
    best: Sequence[Variant] = (),
    baseline: Variant | None = None,
) -> Cell:
    spread = measure.of(variant)
    if spread is None:
        reason = "; ".join(variant.notes)
        if not variant.finished:
            reason = f"The run did not finish. {reason}".strip()
        elif measure.absent:
            return Cell(measure.key, "n.a.", reason=measure.absent)
        footnote = notes.index(variant.notes) + 1 if variant.notes else 0
        return Cell(measure.key, "n.a.", reason=reason or "Not recorded by this run.", footnote=footnote)
    delta, delta_range = _delta(measure, variant, baseline)
    return Cell(
        measure.key,
        format_value(spread.mean, measure.style),
        spread.mean,
        range=format_range(spread, measure.style),
        partial=f"{spread.count} of {len(variant.runs)} runs" if spread.count < len(variant.runs) else "",
        delta=delta,
        delta_range=delta_range,
        is_best=any(variant is item for item in best),
        is_leak=measure.key == leak_gap(variant).key and is_visible_leak(variant),
        is_blind=measure.key == "pretext.loss" and is_blind(variant),
        stands_in=measure.stands_in is not None and any(measure.stands_in(run.record) for run in variant.runs),
    )


def _delta(measure: Measure, variant: Variant, baseline: Variant | None) -> tuple[str, str]:
    """The difference from the baseline and its range over pairs of equal seed, for shares of which more is better."""
    if baseline is None or baseline is variant or measure.style != "percent" or measure.better != "high":
        return "", ""
    found = difference(measure, variant, baseline)
    if found is None:
        return "", ""
    return format_value(found.mean, "points"), format_range(found, "points") if found.count > 1 else ""
