"""What the numbers say, in sentences: every claim is computed, and says from how many seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

from leakfree.report import pretext
from leakfree.report.measures import (
    LEAK_THRESHOLD,
    accuracy,
    ap,
    format_value,
    is_visible_leak,
    leak_gap,
    pair_gap,
    pairs,
    roi_accuracy,
)
from leakfree.report.runs import Spread, Variant, flatten
from leakfree.report.sentences import Finding, against, best, name, others, over_seeds, percent, points, seeds, signed
from leakfree.report.tables import config_differences
from leakfree.report.words import words_of

__all__ = ["cautions", "find", "is_one_class"]

_MEASURED_ALIKE = (
    "data.val.",
    "data.root",
    "data.min_size",
    "data.max_size",
    "data.image_size",
    "data.views.",
    "data.mean",
    "data.std",
    "evaluation.",
    "leakage.",
)
_MACHINE = re.compile(r"host|cpu|gpu|cuda|device|cores|threads|memory|machine|platform|torch|world_size", re.IGNORECASE)


def find(variants: Sequence[Variant], baseline: Variant | None = None) -> Finding:
    """Name the largest gap that a leak of this task shows in, and what it does to what the runs are for.

    Args:
        variants: of one task.
    """
    if variants and variants[0].task == "contrastive":
        return pretext.find(variants, baseline)
    words = words_of(variants[0].task if variants else "detection").finding
    judged = [variant for variant in variants if variant.finished]
    gaps = [(variant, spread) for variant in judged if (spread := leak_gap(variant).of(variant))]
    if not gaps:
        headline = Markup("Leakage cannot be judged: no finished run has {}.").format(words.numbers)
        return Finding(headline, [*best(judged, None), *against(judged, baseline), *seeds(judged)])
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
            points(LEAK_THRESHOLD),
            words.alone,
            Markup(" (largest: {}, {} points)").format(name(variant), signed(spread)),
        )
        return Finding(headline, [*best(judged, None), *against(judged, baseline), *seeds(judged)])
    first = leaky[0][0]
    sentences = [
        *_detection(first),
        *_pairs(first),
        *others(leaky[1:], gaps, " with batch statistics"),
        *best(judged, first),
    ]
    return Finding(_headline(*leaky[0]), [*sentences, *against(judged, baseline), *seeds(judged)], is_leak=True)


def cautions(variants: Sequence[Variant]) -> list[Markup]:
    """What limits the comparison: unfinished runs, other data or measurement, other machines, equal seeds."""
    found = []
    for variant in variants:
        for run in (run for run in variant.runs if not run.finished):
            where = f" at step {run.last_step}" if run.last_step is not None else ""
            lacks = f"; missing: {', '.join(run.missing)}" if run.missing else ""
            found.append(
                Markup("{} is unfinished ({}{}){}. It takes no part in the finding and in best values.").format(
                    name(variant), run.record.status, where, lacks
                )
            )
        if len(set(variant.seeds)) < len(variant.seeds):
            found.append(
                Markup("{} holds runs of equal seed ({}): its range understates the spread over seeds.").format(
                    name(variant), ", ".join(map(str, variant.seeds))
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
    found += pretext.cautions(keys) if variants and variants[0].task == "contrastive" else []
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
    classifies = variant.task == "classification"
    structured, _, population, _ = accuracy() if classifies else roi_accuracy("val")
    return Markup("{} leaks: it classifies {}, and {} under population statistics: {} fewer{}.").format(
        name(variant),
        Markup(words_of(variant.task).finding.what).format(percent(structured.of(variant))),
        percent(population.of(variant)),
        points(spread.mean),
        over_seeds(spread),
    )


def _detection(variant: Variant) -> list[Markup]:
    """What the same weights do to box and mask AP."""
    parts = []
    for what, part in (("box AP", "bbox"), ("mask AP", "segm")):
        image, _, population, _ = ap(part)
        left, right = image.of(variant), population.of(variant)
        if left and right:
            verb = "falls" if right.mean < left.mean else "changes"
            parts.append(f"{what} {verb} from {_times_100(left)} to {_times_100(right)}")
    return [Markup("With the same weights its {}.").format(" and its ".join(parts))] if parts else []


def _pairs(variant: Variant) -> list[Markup]:
    same, random, spread = pairs("same_class").of(variant), pairs("random_pair").of(variant), pair_gap().of(variant)
    if not (same and random and spread):
        return []
    text = Markup(
        "It classifies {} of RoIs correctly when two images of the same class share statistics and {} when "
        "two random images do"
    ).format(percent(same), percent(random))
    if spread.mean > LEAK_THRESHOLD and spread.low > 0:
        text += f": at equal group size the companion's class alone is worth {points(spread.mean)}"
    return [text + "."]


def _machines_differ(variants: Sequence[Variant]) -> bool:
    facts = {
        str(sorted((k, str(v)) for k, v in flatten(run.record.environment).items() if _MACHINE.search(k)))
        for variant in variants
        for run in variant.runs
        if run.record.environment
    }
    return len(facts) > 1


def _times_100(spread: Spread) -> str:
    return format_value(spread.mean, "percent")
