"""The figures of a report, as small SVG panels that the page lays out.

One panel is one axes, about as wide as a phone, so that panels sit side by side on a desk and stack on a
phone with readable text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leakfree.report.measures import (
    LEAK_THRESHOLD,
    Measure,
    accuracy,
    ap,
    format_value,
    influence,
    is_visible_leak,
    leak_gap,
    pairs,
    roi_accuracy,
)
from leakfree.report.runs import Spread, Variant
from leakfree.report.svg import CARD, MUTED, STYLE, color, dashes, marker, to_svg

__all__ = ["Panel", "curve_panels", "influence_panels", "signature_panels"]

_WIDTH = 3.55  # inches at 96 pixels: a panel's own width
_MAX_POINTS = 240  # of a curve; longer ones are averaged in bins
_CURVES = {
    "loss": "Loss",
    "loss_classifier": "Classification loss",
    "roi_accuracy": "RoI accuracy",
    "accuracy": "Accuracy",
    "loss_mask": "Mask loss",
    "loss_box_reg": "Box regression loss",
}
_SHARES = {"roi_accuracy": "% of RoIs, training", "accuracy": "% of images, training"}
_MAX_CURVES = 3  # the first of these that the runs logged


@dataclass(frozen=True)
class Panel:
    """A titled SVG element to put into the page, and the same content in words."""

    title: str
    note: str  # the unit, and what the signs mean
    svg: str
    text: str


def signature_panels(variants: Sequence[Variant]) -> list[Panel]:
    """Accuracy (of RoIs, of images), box AP and mask AP under (a) or (d), (b) and (c): the signature of a leak."""
    wanted = (
        ("RoI accuracy", roi_accuracy("val")),
        ("Box AP", ap("bbox")),
        ("Mask AP", ap("segm")),
        ("Accuracy", accuracy()),
    )
    panels = []
    for number, (title, measures) in enumerate(wanted):
        if any(measure.of(variant) for measure in measures[:3] for variant in variants):
            panels.append(_signature(f"signature{number}", title, measures[:3], variants))
    return panels


def curve_panels(variants: Sequence[Variant]) -> list[Panel]:
    """Training loss, classification loss and RoI accuracy (or another loss) over steps, as far as logged."""
    panels = []
    for number, (key, title) in enumerate(_CURVES.items()):
        curves = [(index, curve) for index, item in enumerate(variants) if len((curve := _curve(item, key)).steps) > 1]
        if curves:
            panels.append(_curves(f"curve{number}", key, title, curves, variants))
    return panels[:_MAX_CURVES]


def influence_panels(variants: Sequence[Variant]) -> list[Panel]:
    """The composition gap, same-class against random pairs, and influence of other RoIs: a row per variant."""
    panels = []
    if any(leak_gap(variant).of(variant) for variant in variants):
        panels.append(_gaps("gaps", leak_gap(variants[0]), variants))
    if any(pairs(name).of(variant) for name in ("same_class", "random_pair") for variant in variants):
        panels.append(_pairs("pairs", variants))
    for name, things, inside, outside in (
        ("influence", "RoIs", "within_image", "between_images"),
        ("influence_images", "images", "within_class", "between_classes"),
    ):
        measures = (influence(inside, ""), influence(outside, ""))
        if any(measure.of(variant) for measure in measures for variant in variants):
            panels.append(_influence(name, things, measures, variants))
    return panels


# ---------------------------------------------------------------------------------------- panels


def _signature(name: str, title: str, measures: Sequence[Measure], variants: Sequence[Variant]) -> Panel:
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(2.75)
        words, drawn = [], []
        for index, variant in enumerate(variants):
            spreads = [measure.of(variant) for measure in measures]
            known = [(x, spread) for x, spread in enumerate(spreads) if spread]
            if not known:
                continue
            shift = (index - (len(variants) - 1) / 2) * min(0.055, 0.4 / len(variants))
            _points_with_range(axes, [(x + shift, spread) for x, spread in known], index)
            drawn += [100 * edge for _, spread in known for edge in (spread.low, spread.high)]
            values = ", ".join("n.a." if s is None else format_value(s.mean, "percent") for s in spreads)
            words.append(f"{variant.label}: {values}")
        _mark_largest_drop(axes, measures, variants)
        axes.set_xlim(-0.35, 2.65)
        axes.set_xticks(range(3), [measure.head.replace(" ", "\n", 1) for measure in measures])
        axes.set_ylim(*_limits(drawn))
        axes.yaxis.set_major_locator(_round_ticks())
        structured = "(d) one-class" if title == "Accuracy" else "(a) per-image"
        text = f"{title} under {structured}, (b) random-group, (c) population statistics. {_all(words)}"
        notes = {"RoI accuracy": "% of foreground RoIs, validation", "Accuracy": "% of images, validation"}
        note = notes.get(title, "× 100, validation")
        return Panel(title, note, to_svg(figure, name), text)


def _points_with_range(axes: Axes, points: Sequence[tuple[float, Spread]], index: int) -> None:
    xs = [x for x, _ in points]
    means = [100 * spread.mean for _, spread in points]
    axes.errorbar(
        xs,
        means,
        yerr=[[100 * (s.mean - s.low) for _, s in points], [100 * (s.high - s.mean) for _, s in points]],
        color=color(index),
        linestyle=dashes(index),
        marker=marker(index),
        markersize=6,
        markeredgecolor=CARD,
        markeredgewidth=0.8,
        elinewidth=1.1,
        capsize=2.2,
        zorder=3,
    )


def _mark_largest_drop(axes: Axes, measures: Sequence[Measure], variants: Sequence[Variant]) -> None:
    """Write the largest visible leak's change from (a) to (c) beside its last point."""
    leaky = [(spread.mean, item) for item in variants if is_visible_leak(item) and (spread := leak_gap(item).of(item))]
    if not leaky:
        return
    _, variant = max(leaky, key=lambda item: item[0])
    first, last = measures[0].of(variant), measures[2].of(variant)
    if first and last:
        index = next(position for position, item in enumerate(variants) if item is variant)
        label = format_value(last.mean - first.mean, "points")
        axes.text(2.62, 100 * last.mean, label, color=color(index), fontweight="bold", ha="right", va="center")


@dataclass(frozen=True)
class _Curve:
    steps: list[float]
    spreads: list[Spread]
    bin: int  # logged points averaged into one


def _curve(variant: Variant, key: str) -> _Curve:
    """A logged number over steps: mean and range over the runs, at the steps that all runs logged."""
    runs = []
    for run in variant.runs:
        # a resumed run may log a step twice: the later row is of the training that counts
        rows = [row for row in run.rows if _is_number(row.get("step")) and _is_number(row.get(key))]
        runs.append({float(row["step"]): float(row[key]) for row in rows})
    runs = [values for values in runs if values]
    steps = sorted(set.intersection(*(set(values) for values in runs))) if runs else []
    size = math.ceil(len(steps) / _MAX_POINTS) or 1
    bins = [steps[start : start + size] for start in range(0, len(steps), size)]
    spreads = [Spread.of(math.fsum(values[step] for step in part) / len(part) for values in runs) for part in bins]
    return _Curve([sum(part) / len(part) for part in bins], [spread for spread in spreads if spread], size)


def _curves(
    name: str, key: str, title: str, curves: Sequence[tuple[int, _Curve]], variants: Sequence[Variant]
) -> Panel:
    scale = 100 if key in _SHARES else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(2.4)
        words = []
        for index, curve in curves:
            means = [scale * spread.mean for spread in curve.spreads]
            axes.plot(curve.steps, means, color=color(index), linestyle=dashes(index), zorder=3)
            axes.plot(
                curve.steps[-1:], means[-1:], color=color(index), marker=marker(index), markersize=5.5,
                markeredgecolor=CARD, markeredgewidth=0.8, zorder=4, clip_on=False,
            )  # fmt: skip
            if curve.spreads[0].count > 1:
                low = [scale * spread.low for spread in curve.spreads]
                high = [scale * spread.high for spread in curve.spreads]
                axes.fill_between(curve.steps, low, high, color=color(index), alpha=0.14, linewidth=0)
            words.append(f"{variants[index].label}: last {means[-1]:.3g}")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlim(left=0)
        size = max(curve.bin for _, curve in curves)
        note = _SHARES.get(key, "training") + (f", means of {size} rows" if size > 1 else "")
        return Panel(title, note, to_svg(figure, name), f"{title} over training steps. {_all(words)}")


def _gaps(name: str, measure: Measure, variants: Sequence[Variant]) -> Panel:
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows(variants)
        words, drawn = [], [0.0, 100 * LEAK_THRESHOLD]
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.axvline(100 * LEAK_THRESHOLD, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for index, variant in enumerate(variants):
            spread = measure.of(variant)
            if spread is None:
                axes.text(100 * LEAK_THRESHOLD, index, "  n.a.", color=MUTED, va="center")
                continue
            axes.plot([0, 100 * spread.mean], [index, index], color=color(index), linewidth=2)
            _point_on_row(axes, spread, index, color(index))
            drawn += [100 * spread.low, 100 * spread.high]
            words.append(f"{variant.label}: {format_value(spread.mean, 'points')}")
        axes.set_xlim(*_limits(drawn))
        axes.xaxis.set_major_locator(_round_ticks())
        of_images = measure.key.startswith("accuracy_gap")
        title, letter = ("Accuracy gap", "(d) one class") if of_images else ("RoI accuracy gap", "(a) per image")
        kinds = f"between {'one-class' if of_images else 'per-image'} and population statistics"
        return Panel(
            title,
            f"{letter} minus (c) population, points; dashed: threshold of a visible leak",
            to_svg(figure, name),
            f"{title} {kinds}. {_all(words)}",
        )


def _point_on_row(axes: Axes, spread: Spread, index: int, face: str) -> None:
    axes.errorbar(
        [100 * spread.mean],
        [index],
        xerr=[[100 * (spread.mean - spread.low)], [100 * (spread.high - spread.mean)]],
        color=color(index),
        marker=marker(index),
        markersize=7,
        markerfacecolor=face,
        markeredgecolor=color(index),
        markeredgewidth=1.3,
        elinewidth=1.1,
        capsize=2.2,
        zorder=3,
    )


def _influence(name: str, things: str, measures: Sequence[Measure], variants: Sequence[Variant]) -> Panel:
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows(variants)
        words, ends = [], []
        for index, variant in enumerate(variants):
            spreads = [measure.of(variant) for measure in measures]
            if not any(spreads):
                axes.text(0, index, " n.a.", color=MUTED, va="center")
                continue
            left = 0.0
            for spread, alpha in zip(spreads, (1.0, 0.4), strict=True):
                if spread:
                    axes.barh(index, spread.mean, left=left, height=0.56, color=color(index), alpha=alpha, linewidth=0)
                    left += spread.mean
            ends.append(left)
            label = " + ".join("n.a." if spread is None else format_value(spread.mean, "share") for spread in spreads)
            axes.text(left, index, f"  {label}", color=MUTED, va="center", fontsize=8)
            words.append(f"{variant.label}: {label}")
        whole, others = ("image", "images") if things == "RoIs" else ("class", "classes")
        # room for the label behind the longest bar
        axes.set_xlim(0, max([*ends, 0.02]) * 1.75)
        return Panel(
            f"Influence of other {things}",
            f"share of input-gradient energy; full colour: {things} of the same {whole}, pale: of other {others}",
            to_svg(figure, name),
            f"Influence of other {things}, within the {whole} + between {others}. {_all(words)}",
        )


def _pairs(name: str, variants: Sequence[Variant]) -> Panel:
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows(variants)
        words, drawn = [], []
        for index, variant in enumerate(variants):
            same, random = pairs("same_class").of(variant), pairs("random_pair").of(variant)
            known = [spread for spread in (same, random) if spread]
            if not known:
                continue
            if same and random:
                axes.plot([100 * random.mean, 100 * same.mean], [index, index], color=color(index), linewidth=2)
            for spread, face in ((random, CARD), (same, color(index))):
                if spread:
                    _point_on_row(axes, spread, index, face)
            drawn += [100 * edge for spread in known for edge in (spread.low, spread.high)]
            values = [None if spread is None else format_value(spread.mean, "percent") for spread in (same, random)]
            words.append(f"{variant.label}: same class {values[0] or 'n.a.'}, random {values[1] or 'n.a.'}")
        axes.set_xlim(*_limits(drawn))
        axes.xaxis.set_major_locator(_round_ticks())
        for index, variant in enumerate(variants):
            if not (pairs("same_class").of(variant) or pairs("random_pair").of(variant)):
                axes.text(axes.get_xlim()[0], index, " n.a.", color=MUTED, va="center")
        return Panel(
            "When two images share statistics",
            "RoI accuracy, %; filled: two images of one class, hollow: two random images",
            to_svg(figure, name),
            f"RoI accuracy when two images share statistics. {_all(words)}",
        )


# --------------------------------------------------------------------------------------- drawing


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _rows(variants: Sequence[Variant]) -> tuple[Figure, Axes]:
    """Axes with one row per variant, in the order given, the first on top."""
    figure, axes = _axes(0.4 + 0.29 * max(len(variants), 2))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_yticks(range(len(variants)), [_short(variant.label) for variant in variants])
    for index, label in enumerate(axes.get_yticklabels()):
        label.set_color(color(index))
    axes.set_ylim(len(variants) - 0.4, -0.6)
    return figure, axes


def _limits(values: Sequence[float], least: float = 30.0) -> tuple[float, float]:
    """Limits around the values, never closer than ``least``: noise of a point must not look like a cliff."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    margin = max(0.08 * (high - low), (least - (high - low)) / 2, 1.0)
    top = high + margin
    # a little room below zero, so that a marker there is whole
    return (low - margin if low < 0 else max(low - margin, -0.04 * top)), top


def _round_ticks() -> MaxNLocator:
    return MaxNLocator(7, steps=[1, 2, 5, 10])


def _short(label: str, length: int = 20) -> str:
    return label if len(label) <= length else f"{label[: length // 2 - 1]}…{label[-length // 2 :]}"


def _all(words: Sequence[str]) -> str:
    return "; ".join(words) + "."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
