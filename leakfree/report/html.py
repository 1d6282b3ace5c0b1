"""The report as one HTML file that needs nothing else: styles, figures and text are inside.

Every text goes through Jinja2 with autoescape; the only markup passed in ready-made is ours (the style
sheet, the SVG of :mod:`leakfree.report.svg`, the sentences of :mod:`leakfree.report.finding`).
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from leakfree.report import finding, plots, svg, tables
from leakfree.report.measures import LEAK_THRESHOLD, adapted, format_value
from leakfree.report.runs import Run, Variant, by_task, flatten
from leakfree.report.words import ADAPTED, words_of

__all__ = ["render"]

_HERE = Path(__file__).parent
# the markers of svg.MARKERS on a 14 x 14 canvas, for the legend and the tables
_SHAPES = {
    "o": "M7 2.6a4.4 4.4 0 1 1 0 8.8a4.4 4.4 0 1 1 0-8.8z",
    "s": "M3 3h8v8h-8z",
    "D": "M7 1.6l5.4 5.4l-5.4 5.4l-5.4-5.4z",
    "^": "M7 2.4l5 9h-10z",
    "v": "M7 11.6l-5-9h10z",
    "P": "M5.2 2h3.6v3.2h3.2v3.6h-3.2v3.2h-3.6v-3.2h-3.2v-3.6h3.2z",
    "X": "M4.3 2l2.7 2.7l2.7-2.7l2.3 2.3l-2.7 2.7l2.7 2.7l-2.3 2.3l-2.7-2.7l-2.7 2.7l-2.3-2.3l2.7-2.7l-2.7-2.7z",
    "p": "M7 2l5 3.8l-1.9 5.8h-6.2l-1.9-5.8z",
}
_MODES = {
    "image": "(a) per image",
    "same_class": "(d) one class",
    "random": "(b) random groups",
    "precise": "(c) precise population",
    "population": "(c) stored in the model",
    "target": "target domain (AdaBN)",
    "embeddings": "mixture of domains (BNE)",
}


def render(
    variants: Sequence[Variant],
    *,
    title: str | None = None,
    baseline: Variant | None = None,
    command: str = "",
) -> str:
    """The page that compares ``variants``, with a section for each task if there are several.

    Args:
        title: heading; by default it counts the variants.
        baseline: the variant that differences in AP and in the config refer to.
        command: how this page was made.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["mode"] = lambda name: _MODES.get(name, name)
    environment.filters["breakable"] = _breakable
    environment.globals["swatch"] = _swatch
    for counted in ("table", "figure"):
        environment.globals[f"next_{counted}"] = itertools.count(1).__next__
    sections = [
        # ids of the first section are bare, so that links to a page of one task stay what they are
        _section(task, members, baseline, "" if number == 0 else f"-{number + 1}")
        for number, (task, members) in enumerate(by_task(variants).items())
    ]
    page = environment.get_template("report.html").render(
        sections=sections,
        title=title or _title(variants),
        subtitle=_subtitle(variants),
        environment=tables.environment_rows([run for variant in variants for run in variant.runs]),
        command=command,
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        threshold=format_value(LEAK_THRESHOLD, "percent"),
    )
    return re.sub(r"\n\s*\n+", "\n", page).strip() + "\n"


def _section(task: str, variants: Sequence[Variant], baseline: Variant | None, suffix: str) -> dict[str, Any]:
    """What the page says of the variants of one task; ids end in ``suffix``."""
    baseline = next((item for item in variants if item is baseline), None)
    notes = tables.footnotes(variants)
    headline = tables.headline_table(variants, baseline)
    cells = [cell for row in headline.rows for cell in row.cells]
    return {
        "task": task,
        "suffix": suffix,
        "words": words_of(task),
        "variants": variants,
        "describe": tables.describe,
        "facts": _facts(variants),
        "finding": finding.find(variants, baseline),
        "cautions": finding.cautions(variants),
        "baseline": baseline,
        "headline": headline,
        "marks": {
            name: any(getattr(cell, name) for cell in cells)
            for name in ("stands_in", "is_leak", "is_blind", "delta_range")
        },
        "many_seeds": any(len(variant.runs) > 1 for variant in variants),
        "one_class": finding.is_one_class(variants),
        "uneven_seeds": len({len(variant.runs) for variant in variants if variant.finished}) > 1,
        "leak": tables.leak_table(variants),
        "cost": tables.cost_table(variants),
        "metrics": tables.recorded_metrics(variants),
        "metric_rows": tables.metric_table(variants),
        "signature": plots.signature_panels(variants),
        "curves": plots.curve_panels(variants),
        "influence": plots.influence_panels(variants),
        "terms": _terms(task, variants),
        "differences": tables.config_differences(variants, baseline or variants[0]),
        "footnotes": [(number, entry, _holders(variants, entry)) for number, entry in enumerate(notes, start=1)],
        "run_rows": [_run_row(index, variant, run) for index, variant in enumerate(variants) for run in variant.runs],
    }


def _terms(task: str, variants: Sequence[Variant]) -> tuple[tuple[str, Markup], ...]:
    """What the numbers of these variants mean."""
    seen = any(measure.of(variant) for measure in adapted() for variant in variants)
    return (*words_of(task).terms, *([ADAPTED] if seen else []))


def _run_row(index: int, variant: Variant, run: Run) -> dict[str, Any]:
    """A run in the list of runs: its own numbers, without averaging, and the command that repeats it."""
    single = Variant(variant.label, [run])
    spreads = [(measure, measure.of(single)) for _, measure in words_of(variant.task).of_a_run]
    given = Path(run.path)
    config = (given if given.is_dir() else given.parent) / "config.yaml"
    return {
        "index": index,
        "label": variant.label,
        "run": run,
        "cells": [
            (
                measure.key,
                "n.a." if spread is None else format_value(spread.mean, measure.style),
                spread and spread.mean,
            )
            for measure, spread in spreads
        ],
        "command": f"leakfree train --config-file {shlex.quote(str(config))}",
        "config_exists": (run.folder / "config.yaml").is_file(),
    }


def _swatch(index: int) -> Markup:
    """The marker of a variant in its colour, as in the figures."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true" focusable="false">'
        '<path d="{}" style="fill: var(--series-{})"/></svg>'
    ).format(_SHAPES[svg.marker(index)], index % svg.NUM_COLORS)


def _breakable(text: str) -> Markup:
    """Let a long name break after its separators rather than anywhere."""
    pieces = re.split(r"(?<=[_./-])", text)
    return Markup("<wbr>").join(pieces)


def _holders(variants: Sequence[Variant], entry: list[str]) -> list[str]:
    return [variant.label for variant in variants if variant.notes == entry]


def _kind(variants: Sequence[Variant]) -> str:
    return "variant" if any(len(variant.runs) > 1 for variant in variants) else "run"


def _title(variants: Sequence[Variant]) -> str:
    parts = [
        f"{'one' if len(members) == 1 else len(members)} {task} {_kind(members)}{'s' * (len(members) > 1)}"
        for task, members in by_task(variants).items()
    ]
    return f"Batch leakage in {' and '.join(parts)}"


def _subtitle(variants: Sequence[Variant]) -> list[str]:
    """What was compared, in a few facts; several tasks have their own beside what they share."""
    num_runs = sum(len(variant.runs) for variant in variants)
    seeds = sorted({seed for variant in variants for seed in variant.seeds})
    facts = [f"{num_runs} training{'s' * (num_runs > 1)}"]
    facts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return facts if len(by_task(variants)) > 1 else facts + _facts(variants)


def _facts(variants: Sequence[Variant]) -> list[str]:
    """Data and length of the runs of one task."""
    flat = flatten(variants[0].config)
    facts = []
    if flat.get("data.val.name") == "digit_scenes":
        sharing = flat.get("data.val.digits.class_sharing")
        facts.append(
            f"digit scenes, class sharing {sharing:g}" if isinstance(sharing, (int, float)) else "digit scenes"
        )
    elif "data.views.name" in flat:
        style = flat.get("data.views.style")
        of_style = f", class-free illumination {style:g}" if isinstance(style, (int, float)) and style else ""
        facts.append(f"{flat.get('data.val.name')}, {flat.get('data.views.name')} views{of_style}")
    elif flat.get("data.val.name") == "digits":
        facts.append(f"digits, batches {str(flat.get('data.composition')).replace('_', ' ')}")
    elif flat.get("data.val.annotations"):
        facts.append(f"validated on {Path(str(flat['data.val.annotations'])).name}")
    steps = flat.get("schedule.max_steps")
    return facts + ([f"{steps} steps"] if steps else [])
