"""The figures of a report, as small SVG panels that the page lays out.

One panel is one axes, about as wide as a phone, so that panels sit side by side on a desk and stack on a
phone with readable text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    blind_loss,
    features,
    format_value,
    influence,
    is_visible_leak,
    leak_gap,
    pairs,
    pretext,
    probe,
    roi_accuracy,
)
from leakfree.report.runs import Run, Spread, Variant, is_number
from leakfree.report.svg import CARD, MUTED, STYLE, color, dashes, marker, to_svg

__all__ = ["Panel", "curve_panels", "influence_panels", "signature_panels"]

_WIDTH = 3.55  # inches at 96 pixels: a panel's own width
_MAX_POINTS = 240  # of a curve; longer ones are averaged in bins
_NARROW = 2.75  # where four stand in a row
_MAX_CURVES = 3  # the first that the runs logged, of those below


@dataclass(frozen=True)
class _Line:
    """A logged number over steps, and how the evaluation at the end of a finished run measured the same."""

    key: str
    final: Callable[[Run], float | None] = lambda run: None
    dashed: bool = False


@dataclass(frozen=True)
class _Plot:
    title: str
    lines: tuple[_Line, ...]
    note: str = "training"
    percent: bool = False
    blind: bool = False  # with the loss of features that tell nothing


_CURVES = (
    _Plot("Loss", (_Line("loss"),)),
    _Plot("Classification loss", (_Line("loss_classifier"),)),
    _Plot("RoI accuracy", (_Line("roi_accuracy"),), "% of RoIs, training", percent=True),
    _Plot("Accuracy", (_Line("accuracy"),), "% of images, training", percent=True),
    _Plot("Mask loss", (_Line("loss_mask"),)),
    _Plot("Box regression loss", (_Line("loss_box_reg"),)),
)
_PRETEXT_CURVES = (
    _Plot("Pretext accuracy, training", (_Line("pretext"),), "% of queries", percent=True),
    _Plot(
        "Pretext accuracy, held-out",
        (
            _Line("pretext/same", lambda run: pretext("same").read(run.record)),
            _Line("pretext/other", lambda run: pretext("other").read(run.record), dashed=True),
        ),
        "%; dashed: other mates",
        percent=True,
    ),
    _Plot(
        "kNN accuracy",
        (_Line("knn", lambda run: features("knn")[1].read(run.record)),),
        "%, running averages",
        percent=True,
    ),
    _Plot("Pretext loss, training", (_Line("loss"),), "dashed grey: features that tell nothing", blind=True),
)


@dataclass(frozen=True)
class Panel:
    """A titled SVG element to put into the page, and the same content in words."""

    title: str
    note: str  # the unit, and what the signs mean
    svg: str
    text: str


def signature_panels(variants: Sequence[Variant]) -> list[Panel]:
    """Accuracy (of RoIs, of images), box AP and mask AP under (a) or (d), (b) and (c): the signature of a leak. Of
    contrastive runs the pretext accuracy under the swap, beside its loss and kNN accuracy."""
    task = _task(variants)
    if task == "contrastive":
        return _pretext_panels(variants)
    wanted = (
        ("RoI accuracy", roi_accuracy("val")),
        ("Box AP", ap("bbox")),
        ("Mask AP", ap("segm")),
        ("Accuracy", accuracy()),
    )
    panels = []
    for number, (title, measures) in enumerate(wanted):
        if any(measure.of(variant) for measure in measures[:3] for variant in variants):
            panels.append(_signature(f"{task}-signature{number}", title, measures[:3], variants))
    return panels


def curve_panels(variants: Sequence[Variant]) -> list[Panel]:
    """Training loss, classification loss and RoI accuracy (or another loss) over steps, as far as logged. Of
    contrastive runs the pretext-gap curves: pretext accuracy in training and under the swap, kNN accuracy, loss."""
    task = _task(variants)
    contrastive = task == "contrastive"
    panels = []
    for number, plot in enumerate(_PRETEXT_CURVES if contrastive else _CURVES):
        curves = [
            (index, line, curve)
            for index, item in enumerate(variants)
            for line in plot.lines
            if len((curve := _curve(item, line)).steps) > 1
        ]
        if curves:
            panels.append(_curves(f"{task}-curve{number}", plot, curves, variants, _NARROW if contrastive else _WIDTH))
    return panels if contrastive else panels[:_MAX_CURVES]


def influence_panels(variants: Sequence[Variant]) -> list[Panel]:
    """The gap of the task, same-class against random pairs, probes, and influence of others: a row per variant."""
    task = _task(variants)
    panels = []
    if any(leak_gap(variant).of(variant) for variant in variants):
        panels.append(_gaps(f"{task}-gaps", leak_gap(variants[0]), variants))
    for rows in (_PAIRS, _PROBES):
        if any(measure.of(variant) for measure in rows.measures for variant in variants):
            panels.append(_two_points(f"{task}-{rows.name}", rows, variants))
    for whole, others, inside, outside in (
        ("image", "images", "within_image", "between_images"),
        ("class", "classes", "within_class", "between_classes"),
        ("group", "groups", "within_group", "between_groups"),
    ):
        measures = (influence(inside, ""), influence(outside, ""))
        if any(measure.of(variant) for measure in measures for variant in variants):
            things = "RoIs" if whole == "image" else "images"
            panels.append(_influence(f"{task}-influence_{whole}", things, (whole, others), measures, variants))
    return panels


def _pretext_panels(variants: Sequence[Variant]) -> list[Panel]:
    panels = []
    measures = (pretext("same"), pretext("other"))
    if any(measure.of(variant) for measure in measures for variant in variants):
        panels.append(_signature("contrastive-signature", "Pretext accuracy", measures, variants))
    for rows in (_LOSSES, _NEIGHBOURS):
        if any(rows.filled.of(variant) for variant in variants):
            panels.append(_two_points(f"contrastive-{rows.name}", rows, variants))
    return panels


def _task(variants: Sequence[Variant]) -> str:
    return variants[0].task if variants else "detection"


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
        axes.set_xlim(-0.35, len(measures) - 0.35)
        axes.set_xticks(range(len(measures)), [measure.head.replace(" ", "\n", 1) for measure in measures])
        axes.set_ylim(*_limits(drawn))
        axes.yaxis.set_major_locator(_round_ticks())
        under = f"under {', '.join(measure.head for measure in measures)} statistics"
        if title == "Pretext accuracy":
            under = "with keys among the same and among other mates"
        notes = {
            "RoI accuracy": "% of foreground RoIs, validation",
            "Accuracy": "% of images, validation",
            "Pretext accuracy": "% of held-out queries that find their key",
        }
        note = notes.get(title, "× 100, validation")
        return Panel(title, note, to_svg(figure, name), f"{title} {under}. {_all(words)}")


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
    """Write the largest visible leak's change from the first to the last point beside the last."""
    leaky = [(spread.mean, item) for item in variants if is_visible_leak(item) and (spread := leak_gap(item).of(item))]
    if not leaky:
        return
    _, variant = max(leaky, key=lambda item: item[0])
    first, last = measures[0].of(variant), measures[-1].of(variant)
    if first and last:
        index = next(position for position, item in enumerate(variants) if item is variant)
        label = format_value(last.mean - first.mean, "points")
        axes.text(
            len(measures) - 0.38, 100 * last.mean, label, color=color(index), fontweight="bold", ha="right", va="center"
        )


@dataclass(frozen=True)
class _Curve:
    steps: list[float]
    spreads: list[Spread]
    bin: int  # logged points averaged into one


def _curve(variant: Variant, line: _Line) -> _Curve:
    """A logged number over steps: mean and range over the runs, at the steps that all runs logged."""
    runs = []
    for run in variant.runs:
        # a resumed run may log a step twice: the later row is of the training that counts
        rows = [row for row in run.rows if is_number(row.get("step")) and is_number(row.get(line.key))]
        values = {float(row["step"]): float(row[line.key]) for row in rows}
        final, end = line.final(run), run.record.timing.get("steps")
        if values and run.finished and final is not None and end is not None:
            values[float(end)] = final
        runs.append(values)
    runs = [values for values in runs if values]
    steps = sorted(set.intersection(*(set(values) for values in runs))) if runs else []
    size = math.ceil(len(steps) / _MAX_POINTS) or 1
    bins = [steps[start : start + size] for start in range(0, len(steps), size)]
    spreads = [Spread.of(math.fsum(values[step] for step in part) / len(part) for values in runs) for part in bins]
    return _Curve([sum(part) / len(part) for part in bins], [spread for spread in spreads if spread], size)


def _curves(
    name: str, plot: _Plot, curves: Sequence[tuple[int, _Line, _Curve]], variants: Sequence[Variant], width: float
) -> Panel:
    scale = 100 if plot.percent else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(2.4, width)
        words = []
        if plot.blind and (level := _blind_level(variants)) is not None:
            axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for index, line, curve in curves:
            means = [scale * spread.mean for spread in curve.spreads]
            style, face = ((0, (3, 2)), CARD) if line.dashed else (dashes(index), color(index))
            axes.plot(curve.steps, means, color=color(index), linestyle=style, zorder=3)
            axes.plot(
                curve.steps[-1:], means[-1:], color=color(index), marker=marker(index), markersize=5.5,
                markerfacecolor=face, markeredgecolor=color(index) if line.dashed else CARD, markeredgewidth=0.8,
                zorder=4, clip_on=False,
            )  # fmt: skip
            if curve.spreads[0].count > 1:
                low = [scale * spread.low for spread in curve.spreads]
                high = [scale * spread.high for spread in curve.spreads]
                alpha = 0.07 if line.dashed else 0.14
                axes.fill_between(curve.steps, low, high, color=color(index), alpha=alpha, linewidth=0)
            which = f" {line.key}" if len(plot.lines) > 1 else ""
            words.append(f"{variants[index].label}:{which} last {means[-1]:.3g}")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(4 if width < _WIDTH else 5))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlim(left=0)
        size = max(curve.bin for _, _, curve in curves)
        note = plot.note + (f", means of {size} rows" if size > 1 else "")
        return Panel(plot.title, note, to_svg(figure, name), f"{plot.title} over training steps. {_all(words)}")


def _blind_level(variants: Sequence[Variant]) -> float | None:
    """The loss of features that tell nothing, where it is one number for all."""
    levels = {blind_loss(variant.runs[0].record) for variant in variants}
    return levels.pop() if len(levels) == 1 else None


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
        title, minus = _GAPS[measure.key]
        return Panel(
            title,
            f"{minus}, points; dashed: threshold of a visible leak",
            to_svg(figure, name),
            f"{title}: {minus}. {_all(words)}",
        )


def _point_on_row(axes: Axes, spread: Spread, index: int, face: str, scale: float = 100) -> None:
    axes.errorbar(
        [scale * spread.mean],
        [index],
        xerr=[[scale * (spread.mean - spread.low)], [scale * (spread.high - spread.mean)]],
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


def _influence(
    name: str, things: str, whole_and_others: tuple[str, str], measures: Sequence[Measure], variants: Sequence[Variant]
) -> Panel:
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
        whole, others = whole_and_others
        # room for the label behind the longest bar
        axes.set_xlim(0, max([*ends, 0.02]) * 1.75)
        return Panel(
            f"Influence of other {things}",
            f"share of input-gradient energy; full colour: {things} of the same {whole}, pale: of other {others}",
            to_svg(figure, name),
            f"Influence of other {things}, within the {whole} + between {others}. {_all(words)}",
        )


@dataclass(frozen=True)
class _TwoPoints:
    """A row per variant with a filled and a hollow point, and a line between them."""

    name: str
    title: str
    note: str
    filled: Measure
    hollow: Measure | None
    called: tuple[str, str]  # the filled, the hollow
    scale: float = 100
    least: float = 30  # of the axis
    line: float | None = None
    is_reference: bool = False  # the hollow point is no measurement, so it is not drawn alone

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The hollow first, so that the filled lies on top."""
        return (self.filled,) if self.hollow is None else (self.hollow, self.filled)


_GAPS = {
    "gap.precise": ("RoI accuracy gap", "(a) per image minus (c) population"),
    "accuracy_gap.precise": ("Accuracy gap", "(d) one class minus (c) population"),
    "pretext.gap": ("Pretext gap", "pretext accuracy among the same minus among other mates"),
}
_PAIRS = _TwoPoints(
    "pairs",
    "When two images share statistics",
    "RoI accuracy, %; filled: two images of one class, hollow: two random images",
    pairs("same_class"),
    pairs("random_pair"),
    ("same class", "random"),
)
_PROBES = _TwoPoints(
    "probes",
    "Batch-mate probe",
    "AUC; filled: key encoder, hollow: query encoder, dashed: silence",
    probe("key"),
    probe("query"),
    ("key", "query"),
    scale=1,
    least=0.3,
    line=0.5,
)
_LOSSES = _TwoPoints(
    "losses",
    "Pretext loss",
    "held-out, same mates; hollow: features that tell nothing",
    pretext("loss"),
    Measure("pretext.blind", "", blind_loss, style="decimal"),
    ("loss", "tells nothing"),
    scale=1,
    least=1,
    is_reference=True,
)
_NEIGHBOURS = _TwoPoints(
    "knn", "kNN accuracy", "% of held-out images, population statistics", features("knn")[0], None, ("kNN", "")
)


def _two_points(name: str, rows: _TwoPoints, variants: Sequence[Variant]) -> Panel:
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows(variants)
        words, drawn, missing = [], [], []
        if rows.line is not None:
            axes.axvline(rows.scale * rows.line, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            drawn.append(rows.scale * rows.line)
        for index, variant in enumerate(variants):
            found = [(measure, measure.of(variant)) for measure in rows.measures]
            known = [(measure, spread) for measure, spread in found if spread]
            if not known or (rows.is_reference and rows.filled.of(variant) is None):
                missing.append(index)
                continue
            if len(known) == 2:
                ends = [rows.scale * spread.mean for _, spread in known]
                axes.plot(ends, [index, index], color=color(index), linewidth=2)
            for measure, spread in known:
                _point_on_row(axes, spread, index, CARD if measure is rows.hollow else color(index), rows.scale)
            drawn += [rows.scale * edge for _, spread in known for edge in (spread.low, spread.high)]
            values = {
                measure: "n.a." if spread is None else format_value(spread.mean, measure.style)
                for measure, spread in found
            }
            called = zip(reversed(rows.measures), rows.called, strict=False)
            words.append(f"{variant.label}: " + ", ".join(f"{what} {values[measure]}" for measure, what in called))
        axes.set_xlim(*_limits(drawn, rows.least))
        axes.xaxis.set_major_locator(_round_ticks())
        for index in missing:
            axes.text(axes.get_xlim()[0], index, " n.a.", color=MUTED, va="center")
        return Panel(rows.title, rows.note, to_svg(figure, name), f"{rows.title}, {rows.note}. {_all(words)}")


# --------------------------------------------------------------------------------------- drawing


def _axes(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
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
    margin = max(0.08 * (high - low), (least - (high - low)) / 2, least / 30)
    top = high + margin
    # a little room below zero, so that a marker there is whole
    return (low - margin if low < 0 else max(low - margin, -0.04 * top)), top


def _round_ticks() -> MaxNLocator:
    return MaxNLocator(7, steps=[1, 2, 5, 10])


def _short(label: str, length: int = 20) -> str:
    return label if len(label) <= length else f"{label[: length // 2 - 1]}…{label[-length // 2 :]}"


def _all(words: Sequence[str]) -> str:
    return "; ".join(words) + "."
