"""What sentences about runs have in common: names, numbers with their ranges, the best run, differences, seeds.

Sentences are :class:`markupsafe.Markup`, so names of runs are escaped once, here; the console strips the tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from leakfree.report.measures import (
    LEAK_THRESHOLD,
    Measure,
    accuracy,
    ap,
    difference,
    features,
    format_range,
    format_value,
    is_visible_leak,
    roi_accuracy,
)
from leakfree.report.runs import Spread, Variant
from leakfree.report.tables import best_variants

__all__ = [
    "Finding", "against", "best", "difference_text", "name", "names", "others",
    "over_seeds", "percent", "points", "seeds",
    "signed",
]  # fmt: skip

_NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Finding:
    """The headline and the sentences that support it."""

    headline: Markup
    sentences: list[Markup] = field(default_factory=list)
    is_leak: bool = False


def name(variant: Variant) -> Markup:
    return Markup('<b class="run">{}</b>').format(variant.label)


def names(variants: Sequence[Variant]) -> Markup:
    return Markup(", ").join(map(name, variants))


def percent(spread: Spread | None) -> str:
    return "n.a." if spread is None else f"{format_value(spread.mean, 'percent')}{_NO_BREAK}%"


def points(value: float) -> str:
    return f"{format_value(value, 'points').lstrip('+')}{_NO_BREAK}points"


def signed(spread: Spread) -> str:
    return format_value(spread.mean, "points")


def over_seeds(spread: Spread) -> str:
    return f" ({format_range(spread, 'percent')} over {spread.count} seeds)" if spread.count > 1 else ""


def difference_text(spread: Spread) -> str:
    """A difference of two variants, and where pairs of equal seed give one, its range."""
    span = format_range(spread, "points") if spread.count > 1 else ""
    return signed(spread) + (f" ({span})" if span else "")


def best(variants: Sequence[Variant], leaky: Variant | None) -> list[Markup]:
    """The best run under population statistics, and how far a leaky one is from it."""
    measure, what = _aim(variants)
    if measure is None:
        return []
    known = [(variant, spread) for variant in variants if (spread := measure.of(variant))]
    first, spread = max(known, key=lambda item: item[1].mean)
    value = format_value(spread.mean, "percent")
    if len(known) < 2:
        return [Markup("Under population statistics {} reaches {} {}.").format(name(first), what, value)]
    text = Markup("Under population statistics {} is best, with {} {}").format(name(first), what, value)
    if leaky is not None and leaky is not first and (other := measure.of(leaky)):
        text += Markup(", {} above {}").format(points(spread.mean - other.mean), name(leaky))
    close = [variant for variant in best_variants(measure, variants) if variant is not first]
    if close:
        text += (
            Markup("; the seeds do not separate it from {}").format(names(close))
            if spread.count > 1
            else Markup("; the same number as {}").format(names(close))
        )
    return [text + "."]


def others(leaky: Sequence[tuple[Variant, Spread]], gaps: Sequence[tuple[Variant, Spread]], which: str) -> list[Markup]:
    """The weaker leaks, and the span of the gaps of everything else; ``which``: of these, as a clause."""
    sentences = []
    if leaky:
        parts = Markup(", ").join(Markup("{} ({})").format(name(item), signed(spread)) for item, spread in leaky)
        sentences.append(Markup("The gap is above {} in {} as well.").format(points(LEAK_THRESHOLD), parts))
    clean = [spread.mean for variant, spread in gaps if not is_visible_leak(variant)]
    if clean:
        low, high = format_value(min(clean), "points"), format_value(max(clean), "points")
        rest = f"the other {len(clean)}" if len(clean) > 1 else "the other one"
        span = f"between {low} and {high}" if low != high else low
        sentences.append(Markup("In {}{} this gap is {} points.").format(rest, which, span))
    return sentences


def against(variants: Sequence[Variant], baseline: Variant | None) -> list[Markup]:
    """The differences of all from the baseline under population statistics, paired by seed."""
    measure, what = _aim(variants)
    if baseline is None or measure is None:
        return []
    found = [(item, difference(measure, item, baseline)) for item in variants if item is not baseline]
    known = [(item, spread) for item, spread in found if spread]
    if not known:
        return []
    parts = Markup(", ").join(Markup("{} {}").format(name(item), difference_text(spread)) for item, spread in known)
    ranges = any("(" in difference_text(spread) for _, spread in known)
    return [
        Markup("{} under population statistics against {}{}: {}.").format(
            what if what.startswith("kNN") else f"{what[0].upper()}{what[1:]}",
            name(baseline),
            ", mean and range of the differences of equal seeds" if ranges else "",
            parts,
        )
    ]


def seeds(variants: Sequence[Variant]) -> list[Markup]:
    counts = sorted({len(variant.runs) for variant in variants})
    if not counts:
        return []
    if counts == [1]:
        return [Markup("One seed per run: differences of a point or two may be chance.")]
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [Markup("Numbers are means over {} seeds; the tables give the ranges.").format(many)]


def _aim(variants: Sequence[Variant]) -> tuple[Measure | None, str]:
    """What the runs are trained for, and its name in a sentence."""
    columns = {
        ap("bbox")[2]: "box AP",
        roi_accuracy("val")[2]: "RoI accuracy",
        accuracy()[2]: "accuracy",
        features("knn")[0]: "kNN accuracy",
    }
    return next(((item, what) for item, what in columns.items() if any(map(item.of, variants))), (None, ""))
