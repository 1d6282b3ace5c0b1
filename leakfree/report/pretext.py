"""What the numbers of contrastive runs say: who finds a key by its batch-mates, who has learned nothing, and what that
does to the features.

A pretext accuracy is never judged alone: near the loss of features that tell nothing it can be anything from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from leakfree.report.measures import (
    BLIND_THRESHOLD,
    LEAK_THRESHOLD,
    blind_loss,
    difference,
    features,
    format_value,
    is_blind,
    is_visible_leak,
    learned,
    pretext,
    pretext_gap,
    probe,
)
from leakfree.report.runs import Spread, Variant
from leakfree.report.sentences import (
    Finding,
    against,
    best,
    difference_text,
    name,
    names,
    others,
    over_seeds,
    percent,
    points,
    seeds,
    signed,
)

__all__ = ["cautions", "find"]

_CHANCE = 0.02  # of kNN accuracy, where one seed gives no range
_MANY_SEEDS = 3  # from here on, a small gap of one sign says something
_SAME_PRETEXT = ("model.method", "model.queue_size", "model.temperature")


def find(variants: Sequence[Variant], baseline: Variant | None = None) -> Finding:
    """Name the largest gap between keys among the same and among other batch-mates, and what it goes with."""
    judged = [variant for variant in variants if variant.finished]
    gaps = [(item, spread) for item in judged if (spread := pretext_gap().of(item)) and not is_blind(item)]
    end = [*against(judged, baseline), *seeds(judged)]
    if not gaps:
        blind = [variant for variant in judged if is_blind(variant)]
        headline = (
            Markup("Leakage cannot be judged: {} learned, as far as the pretext loss tells.").format(
                "the run has not" if len(blind) == 1 else "no run has"
            )
            if blind
            else Markup(
                "Leakage cannot be judged: no finished run has the pretext accuracy of keys among the same and among "
                "other batch-mates."
            )
        )
        return Finding(headline, [*_blind(judged), *best(judged, None), *end])
    leaky = sorted((item for item in gaps if is_visible_leak(item[0])), key=lambda item: -item[1].mean)
    if not leaky:
        variant, spread = max(gaps, key=lambda item: item[1].mean)
        who = "the run does not lose" if len(gaps) == 1 else f"none of the {len(gaps)} runs that learned loses"
        headline = Markup(
            "No leak is visible: {} more than {} of its pretext accuracy when keys are encoded among other batch-mates "
            "(largest: {}, {} points)."
        ).format(who, points(LEAK_THRESHOLD), name(variant), signed(spread))
        return Finding(headline, [*_traces(gaps), *_blind(judged), *best(judged, None), *end])
    first, spread = leaky[0]
    end = end if baseline is not first else seeds(judged)  # the sentence on features says it
    sentences = [*_loss(first), *_probes(first), *_features(judged, first)]
    sentences += [*others(leaky[1:], gaps, " that learned"), *_traces(gaps), *_blind(judged)]
    return Finding(_headline(first, spread), [*sentences, *end], is_leak=True)


def cautions(keys: Sequence[str]) -> list[Markup]:
    """What of ``keys``, in which the configs differ, makes the pretext tasks of the runs different ones."""
    unlike = [key for key in keys if key in _SAME_PRETEXT or key == "trainer.total_batch_size"]
    if not unlike:
        return []
    text = (
        "The runs solve different pretext tasks: they differ in {}. Compare gaps and features, not accuracy and loss."
    )
    return [Markup(text).format(", ".join(unlike))]


def _headline(variant: Variant, spread: Spread) -> Markup:
    return Markup(
        "{} leaks: it finds the right key for {} of the held-out images when a key is encoded with its own batch, and "
        "for {} when the same key is encoded among other batch-mates: {} fewer{}."
    ).format(
        name(variant),
        percent(pretext("same").of(variant)),
        percent(pretext("other").of(variant)),
        points(spread.mean),
        over_seeds(spread),
    )


def _loss(variant: Variant) -> list[Markup]:
    loss, way, blind = pretext("loss").of(variant), learned().of(variant), _blind_loss(variant)
    if not (loss and way and blind):
        return []
    text = "Its pretext loss of {} is well below that of features that tell nothing ({}), so this is no collapse."
    return [Markup(text).format(format_value(loss.mean, "decimal"), blind)]


def _probes(variant: Variant) -> list[Markup]:
    known = {f"{encoder} features": probe(encoder).of(variant) for encoder in ("key", "query")}
    parts = [f"{format_value(spread.mean, 'share')} from {what}" for what, spread in known.items() if spread]
    text = "Whether two images shared statistics can be told with an AUC of {} (0.5 is silence)."
    return [Markup(text).format(" and ".join(parts))] if parts else []


def _traces(gaps: Sequence[tuple[Variant, Spread]]) -> list[Markup]:
    """Gaps below the threshold that have one sign in all of several seeds."""
    found = [
        Markup("{} ({})").format(name(variant), difference_text(spread))
        for variant, spread in gaps
        if not is_visible_leak(variant) and spread.count >= _MANY_SEEDS and spread.low > 0
    ]
    text = "Small but positive for every seed in {}: a trace of the batch stays in the keys."
    return [Markup(text).format(Markup(", ").join(found))] if found else []


def _blind(variants: Sequence[Variant]) -> list[Markup]:
    """Runs whose accuracy means nothing, whatever it is."""
    sentences = []
    for variant in variants:
        runs = [
            run for run in variant.runs if (way := learned().read(run.record)) is not None and way < BLIND_THRESHOLD
        ]
        if not runs:
            continue
        loss, same = (Spread.of(pretext(key).read(run.record) for run in runs) for key in ("loss", "same"))
        trained = Spread.of(run.last("pretext") for run in runs)
        part = f" in {len(runs)} of {len(variant.runs)} seeds" if len(runs) < len(variant.runs) else ""
        sentences.append(
            Markup(
                "{} has collapsed or not yet learned{}: its pretext loss of {} is near that of features that tell "
                "nothing ({}), so its pretext accuracy ({} held-out{}) says nothing, high or low."
            ).format(
                name(variant),
                part,
                "n.a." if loss is None else format_value(loss.mean, "decimal"),
                _blind_loss(variant),
                percent(same),
                f", {percent(trained)} in training" if trained else "",
            )
        )
    return sentences


def _features(variants: Sequence[Variant], leaky: Variant) -> list[Markup]:
    """Whether the leak goes with worse features, as kNN sees them; said as it is where it does not."""
    measure = features("knn")[0]
    mine = measure.of(leaky)
    if mine is None:
        return []
    value = percent(mine)
    others = [item for item in variants if item is not leaky and not is_visible_leak(item) and not is_blind(item)]
    found = [(item, spread) for item in others if (spread := difference(measure, item, leaky))]
    if not found:
        text = "Its kNN accuracy is {}; no run without a leak is here to compare it with."
        return [Markup(text).format(value)]
    ranges = any(spread.count > 1 for _, spread in found)
    text = Markup("Its kNN accuracy is {}; runs without a leak differ from it, in points{}, by {}").format(
        value,
        " over pairs of equal seed" if ranges else "",
        Markup(", ").join(Markup("{} ({})").format(difference_text(spread), name(item)) for item, spread in found),
    )
    better = [item for item, spread in found if _is_above(spread)]
    if len(better) == len(found):
        return [text + Markup(": this leak goes with worse features.")]
    if better:
        return [text + Markup(": its features are worse than those of {}, not of all.").format(names(better))]
    if any(spread.mean > _CHANCE for _, spread in found):
        return [text + Markup(": the seeds do not resolve whether the leak costs kNN accuracy.")]
    return [text + Markup(": no kNN penalty is visible. The cheating shows in the pretext task alone.")]


def _is_above(spread: Spread) -> bool:
    return spread.low > 0 if spread.count > 1 else spread.mean > _CHANCE


def _blind_loss(variant: Variant) -> str:
    """The loss of features that tell nothing, with the logarithm it is."""
    value = blind_loss(variant.runs[0].record)
    return "" if value is None else f"{format_value(value, 'decimal')}, ln {round(math.exp(value))}"
