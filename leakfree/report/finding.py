"""What the numbers say, in sentences: every claim is computed, and says from how many seeds.

Sentences are :class:`markupsafe.Markup`, so names of runs are escaped once, here; the console strips the tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from leakfree.report.measures import (
    LEAK_THRESHOLD,
    accuracy,
    ap,
    format_range,
    format_value,
    is_visible_leak,
    leak_gap,
    pair_gap,
    pairs,
    roi_accuracy,
)
from leakfree.report.runs import Spread, Variant, flatten
from leakfree.report.tables import best_variants, config_differences

__all__ = ["Finding", "cautions", "find", "is_one_class"]

_MEASURED_ALIKE = (
    "data.val.",
    "data.root",
    "data.min_size",
    "data.max_size",
    "data.image_size",
    "data.mean",
    "data.std",
    "evaluation.",
    "leakage.",
)
_MACHINE = re.compile(r"host|cpu|gpu|cuda|device|cores|threads|memory|machine|platform|torch|world_size", re.IGNORECASE)


@dataclass(frozen=True)
class _Words:
    """What a task calls its samples and its structured batches."""

    samples: str
    numbers: str  # what a judgement needs
    alone: str  # the structured statistics, as an adjective
    what: str  # the headline's: what is classified, while what is normalized together


_WORDS = {
    "detection": _Words(
        "RoIs",
        "RoI accuracy under both per-image and population statistics",
        "per-image",
        "{} of the foreground RoIs of validation images correctly while the RoIs of an image are normalized together",
    ),
    "classification": _Words(
        "images",
        "accuracy under both one-class and population statistics",
        "one-class",
        "{} of the validation images correctly while images of one class are normalized together",
    ),
}


def _words(variants: Sequence[Variant]) -> _Words:
    task = variants[0].runs[0].record.task if variants else "detection"
    return _WORDS.get(task, _WORDS["detection"])


@dataclass(frozen=True)
class Finding:
    """The headline and the sentences that support it."""

    headline: Markup
    sentences: list[Markup] = field(default_factory=list)
    is_leak: bool = False


def find(variants: Sequence[Variant], baseline: Variant | None = None) -> Finding:
    """Name the largest gap between structured and population statistics, and what it does to AP."""
    words = _words(variants)
    judged = [variant for variant in variants if variant.finished]
    gaps = [(variant, spread) for variant in judged if (spread := leak_gap(variant).of(variant))]
    if not gaps:
        headline = Markup("Leakage cannot be judged: no finished run has {}.").format(words.numbers)
        return Finding(headline, [*_best(judged, None), *_against(judged, baseline), *_seeds(judged)])
    leaky = sorted((item for item in gaps if is_visible_leak(item[0])), key=lambda item: -item[1].mean)
    if not leaky:
        variant, spread = max(gaps, key=lambda item: item[1].mean)
        runs = "the run" if len(gaps) == 1 else f"none of the {len(gaps)} runs"
        verb = "does not classify" if len(gaps) == 1 else "classifies"
        headline = Markup(
            "No leak is visible: {} with batch statistics {} {} better by more than {} under "
            "{} than under population statistics{}."
        ).format(
            runs,
            verb,
            words.samples,
            _points(LEAK_THRESHOLD),
            words.alone,
            Markup(" (largest: {}, {} points)").format(_name(variant), _gap(spread)),
        )
        return Finding(headline, [*_best(judged, None), *_against(judged, baseline), *_seeds(judged)])
    first = leaky[0][0]
    sentences = [*_detection(first), *_pairs(first), *_others(leaky[1:], gaps), *_best(judged, first)]
    return Finding(_headline(*leaky[0]), [*sentences, *_against(judged, baseline), *_seeds(judged)], is_leak=True)


def cautions(variants: Sequence[Variant]) -> list[Markup]:
    """What limits the comparison: unfinished runs, other data or measurement, other machines, equal seeds."""
    found = []
    for variant in variants:
        for run in (run for run in variant.runs if not run.finished):
            where = f" at step {run.last_step}" if run.last_step is not None else ""
            lacks = f"; missing: {', '.join(run.missing)}" if run.missing else ""
            found.append(
                Markup("{} is unfinished ({}{}){}. It takes no part in the finding and in best values.").format(
                    _name(variant), run.record.status, where, lacks
                )
            )
        if len(set(variant.seeds)) < len(variant.seeds):
            found.append(
                Markup("{} holds runs of equal seed ({}): its range understates the spread over seeds.").format(
                    _name(variant), ", ".join(map(str, variant.seeds))
                )
            )
    keys = [key for key, _ in config_differences(variants, variants[0]).rows] if variants else []
    unlike = [key for key in keys if key.startswith(_MEASURED_ALIKE)]
    if unlike:
        found.append(
            Markup("The runs were not measured alike: they differ in {}. Compare their numbers with care.").format(
                ", ".join(unlike)
            )
        )
    if _machines_differ(variants) or any(key.startswith("trainer.num_") for key in keys):
        found.append(
            Markup(
                "The runs were timed on different machines, software or numbers of ranks: "
                "do not compare time and memory."
            )
        )
    return found


def is_one_class(variants: Sequence[Variant]) -> bool:
    """Whether a run uses the embedded scenes in which all objects of an image are of one class."""
    return any(
        flat.get(f"data.{split}.name") == "digit_scenes" and flat.get(f"data.{split}.digits.class_sharing") == 1
        for flat in (flatten(variant.config) for variant in variants)
        for split in ("train", "val")
    )


def _headline(variant: Variant, spread: Spread) -> Markup:
    classifies = variant.runs[0].record.task == "classification"
    structured, _, population, _ = accuracy() if classifies else roi_accuracy("val")
    return Markup("{} leaks: it classifies {}, and {} under population statistics: {} fewer{}.").format(
        _name(variant),
        Markup(_words([variant]).what).format(_accuracy(structured.of(variant))),
        _accuracy(population.of(variant)),
        _points(spread.mean),
        _over_seeds(spread),
    )


def _detection(variant: Variant) -> list[Markup]:
    """What the same weights do to box and mask AP."""
    parts = []
    for name, part in (("box AP", "bbox"), ("mask AP", "segm")):
        image, _, population, _ = ap(part)
        left, right = image.of(variant), population.of(variant)
        if left and right:
            verb = "falls" if right.mean < left.mean else "changes"
            parts.append(f"{name} {verb} from {_percent(left.mean)} to {_percent(right.mean)}")
    return [Markup("With the same weights its {}.").format(" and its ".join(parts))] if parts else []


def _pairs(variant: Variant) -> list[Markup]:
    same, random, spread = pairs("same_class").of(variant), pairs("random_pair").of(variant), pair_gap().of(variant)
    if not (same and random and spread):
        return []
    text = Markup(
        "It classifies {} of RoIs correctly when two images of the same class share statistics and {} when "
        "two random images do"
    ).format(_accuracy(same), _accuracy(random))
    if spread.mean > LEAK_THRESHOLD and spread.low > 0:
        text += f": at equal group size the companion's class alone is worth {_points(spread.mean)}"
    return [text + "."]


def _others(leaky: Sequence[tuple[Variant, Spread]], gaps: Sequence[tuple[Variant, Spread]]) -> list[Markup]:
    """The weaker leaks, and the span of the gaps of everything else."""
    sentences = []
    if leaky:
        names = Markup(", ").join(Markup("{} ({})").format(_name(item), _gap(spread)) for item, spread in leaky)
        sentences.append(Markup("The gap is above {} in {} as well.").format(_points(LEAK_THRESHOLD), names))
    clean = [spread.mean for variant, spread in gaps if not is_visible_leak(variant)]
    if clean:
        low, high = format_value(min(clean), "points"), format_value(max(clean), "points")
        which = f"the other {len(clean)}" if len(clean) > 1 else "the other one"
        span = f"between {low} and {high}" if low != high else low
        sentences.append(Markup("In {} with batch statistics this gap is {} points.").format(which, span))
    return sentences


def _best(variants: Sequence[Variant], leaky: Variant | None) -> list[Markup]:
    """The best run under population statistics, and how far a leaky one is from it."""
    columns = {ap("bbox")[2]: "box AP", roi_accuracy("val")[2]: "RoI accuracy", accuracy()[2]: "accuracy"}
    measure = next((item for item in columns if any(map(item.of, variants))), None)
    if measure is None:
        return []
    what = columns[measure]
    known = [(variant, spread) for variant in variants if (spread := measure.of(variant))]
    best, spread = max(known, key=lambda item: item[1].mean)
    if len(known) < 2:
        return [
            Markup("Under population statistics {} reaches {} {}.").format(_name(best), what, _percent(spread.mean))
        ]
    text = Markup("Under population statistics {} is best, with {} {}").format(_name(best), what, _percent(spread.mean))
    if leaky is not None and leaky is not best and (other := measure.of(leaky)):
        text += Markup(", {} above {}").format(_points(spread.mean - other.mean), _name(leaky))
    close = [variant for variant in best_variants(measure, variants) if variant is not best]
    if close:
        names = Markup(", ").join(map(_name, close))
        text += (
            Markup("; the seeds do not separate it from {}").format(names)
            if spread.count > 1
            else Markup("; the same number as {}").format(names)
        )
    return [text + "."]


def _against(variants: Sequence[Variant], baseline: Variant | None) -> list[Markup]:
    measure = ap("bbox")[2]
    reference = None if baseline is None else measure.of(baseline)
    others = [(item, spread) for item in variants if item is not baseline and (spread := measure.of(item))]
    if baseline is None or reference is None or not others:
        return []
    parts = Markup(", ").join(
        Markup("{} {}").format(_name(item), format_value(spread.mean - reference.mean, "points"))
        for item, spread in others
    )
    return [Markup("Box AP under population statistics against {}: {}.").format(_name(baseline), parts)]


def _seeds(variants: Sequence[Variant]) -> list[Markup]:
    counts = sorted({len(variant.runs) for variant in variants})
    if not counts:
        return []
    if counts == [1]:
        return [Markup("One seed per run: differences of a point or two may be chance.")]
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [Markup("Numbers are means over {} seeds; the tables give the ranges.").format(many)]


def _machines_differ(variants: Sequence[Variant]) -> bool:
    facts = {
        str(sorted((k, str(v)) for k, v in flatten(run.record.environment).items() if _MACHINE.search(k)))
        for variant in variants
        for run in variant.runs
        if run.record.environment
    }
    return len(facts) > 1


def _name(variant: Variant) -> Markup:
    return Markup('<b class="run">{}</b>').format(variant.label)


def _percent(value: float) -> str:
    return format_value(value, "percent")


def _accuracy(spread: Spread | None) -> str:
    return "n.a." if spread is None else f"{_percent(spread.mean)}\N{NO-BREAK SPACE}%"


def _points(value: float) -> str:
    return f"{format_value(value, 'points').lstrip('+')}\N{NO-BREAK SPACE}points"


def _gap(spread: Spread) -> str:
    return format_value(spread.mean, "points")


def _over_seeds(spread: Spread) -> str:
    return f" ({format_range(spread, 'percent')} over {spread.count} seeds)" if spread.count > 1 else ""
