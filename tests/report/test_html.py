import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from leakfree.report.html import render
from leakfree.report.measures import HEADLINE, LEAK
from leakfree.report.runs import group_runs, load_runs
from leakfree.report.tables import headline_table
from tests.report.regime import NO_BATCH_STATISTICS, REGIME, make_config, regime_record, write_run

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&--><b>"


class Page(HTMLParser):
    """The page as a list of elements, and per table its cells by row and measure."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables, self.text = [], [], {}, ""
        self.feed(text)
        assert self.open == [], f"elements left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self.rows.append({"label": "", "cells": {}})
        elif tag in ("td", "th"):
            self.key = attributes.get("data-measure")
            if self.key:
                self.rows[-1]["cells"][self.key] = {"text": "", "value": attributes.get("data-value")}

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "tr" in self.open:
            if "td" in self.open and self.key:
                self.rows[-1]["cells"][self.key]["text"] += data
            elif self.open[-3:] == ["th", "span", "span"]:
                self.rows[-1]["label"] += data

    def cells(self, table, label):
        (row,) = [row for row in self.tables[table] if row["label"] == label]
        return row["cells"]


def group(paths):
    return group_runs(load_runs(paths))


def page_of(paths, **options):
    return Page(render(group(paths), **options))


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_numbers_of_the_page_are_those_of_the_records(regime_runs, num_seeds):
    variants = group(regime_runs(num_seeds))
    page = Page(render(variants))
    for name, groups in (("headline", HEADLINE), ("leak", LEAK)):
        for variant in variants:
            shown = page.cells(name, variant.label)
            known = [item for part in groups for item in part.measures if any(item.of(other) for other in variants)]
            assert len(known) > 10
            for measure in known:
                values = [measure.read(run.record) for run in variant.runs]
                if None in values:
                    assert shown[measure.key]["text"].startswith("n.a.")
                else:
                    assert float(shown[measure.key]["value"]) == pytest.approx(sum(values) / len(values))


def test_ap_is_shown_times_100_with_its_range(regime_runs):
    page = page_of(regime_runs(3))
    assert page.cells("headline", "bn_image")["bbox/AP.precise"]["text"].split() == ["34.0", "30.8–37.0"]
    assert page.cells("headline", "bn_image")["gap.precise"]["text"].split() == [
        "+43.2",
        "+41.4",
        "to",
        "+45.3",
        "leak",
    ]


def test_every_run_is_listed_with_its_own_numbers(regime_runs):
    page = page_of(regime_runs(3))
    rows = page.tables["runs"][1:]
    assert len(rows) == 18
    shown = [float(row["cells"]["bbox/AP.precise"]["value"]) for row in rows if row["label"] == "bn_image"]
    assert shown == [precise for _, _, precise in REGIME["bn_image"]["ap"]]


def test_a_missing_number_has_its_reason(regime_runs):
    page = page_of(regime_runs(1))
    assert page.cells("headline", "gn_seed0")["bbox/AP.image"]["text"] == "n.a.1"
    reasons = [attributes.get("title") for tag, attributes in page.elements if tag == "span"]
    assert NO_BATCH_STATISTICS in reasons
    assert "note-1" in [attributes.get("id") for _, attributes in page.elements]


def test_hostile_names_notes_and_values_are_only_text(tmp_path):
    record = replace(
        regime_record("gn", 0),
        config=make_config(model__weights=HOSTILE),
        environment={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        status="interrupted" + HOSTILE,
        batch={"normalization": {HOSTILE: HOSTILE}},
        results={HOSTILE: {HOSTILE: 0.5}},
    )
    paths = [
        write_run(tmp_path / HOSTILE.replace("/", "-"), record),
        write_run(tmp_path / "b", regime_record("bn_image", 0)),
    ]
    text = render(group(paths), title=HOSTILE, command=HOSTILE)
    page = Page(text)
    assert "script" not in [tag for tag, _ in page.elements]
    assert not re.search(r"<script|-->", text)
    assert page.text.count("<script>alert(1)") >= 8


def test_the_page_needs_no_network(regime_runs):
    text = render(group(regime_runs(1)))
    assert "http" not in text
    assert "@import" not in text
    assert "url(#" in text
    assert not re.search(r"url\((?!#)", text)
    for tag, attributes in Page(text).elements:
        assert tag not in ("script", "img", "iframe", "object", "embed")
        for key in ("src", "href", "srcset", "xlink:href", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:,"))
        assert not [key for key in attributes if key.startswith("on")]


def test_ids_are_unique_and_references_lead_somewhere(regime_runs):
    page = page_of(regime_runs(3))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("href", "aria-labelledby"):
            target = attributes.get(key, "").removeprefix("#")
            assert not target or target.startswith("data:") or target in ids


def test_the_page_is_readable_without_seeing_it(regime_runs):
    page = page_of(regime_runs(3))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") == 6
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    figures = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(figures) == 9
    assert all(len(attributes["aria-label"]) > 40 for attributes in figures)
    assert all(
        attributes.get("tabindex") == "0" for _, attributes in page.elements if attributes.get("class") == "scroll"
    )
    assert ("html", {"lang": "en"}) in page.elements


def test_both_colour_schemes_define_every_variable(regime_runs):
    text = render(group(regime_runs(1)))
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--serif", "--sans", "--mono"}
    assert {f"--series-{index}" for index in range(6)} <= used
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))


def test_an_unfinished_run_is_marked_with_what_is_missing(tmp_path, regime_runs):
    record = replace(regime_record("bn_image", 0), status="interrupted", results={}, leakage={}, timing={})
    page = page_of([*regime_runs(1), write_run(tmp_path / "late", record, [{"step": 240, "loss": 1.0}])])
    assert "late is unfinished (interrupted at step 240); missing: results under population" in page.text
    assert ("small", {"class": "chip"}) in page.elements
    assert page.cells("headline", "late")["bbox/AP.precise"]["text"] == "n.a."


def test_the_one_class_caveat_is_shown_only_where_it_holds(tmp_path, regime_runs):
    assert "extreme, constructed case" in page_of(regime_runs(1)).text
    coco = replace(regime_record("bn_image", 0), config=make_config(data__train__name="coco", data__val__name="coco"))
    assert "extreme, constructed case" not in page_of([write_run(tmp_path / "coco", coco)]).text


def test_config_differences_are_listed(regime_runs):
    page = page_of(regime_runs(1))
    assert "model.box_head.norm" in page.text
    assert "data.root" not in page.text


def test_commands_to_repeat_quote_paths(tmp_path):
    path = write_run(tmp_path / "a b", regime_record("gn", 0))
    page = page_of([path])
    assert f"leakfree train --config-file '{path}/config.yaml'" in page.text
    (tmp_path / "a b" / "config.yaml").unlink()
    assert "config.yaml is missing in this folder" in page_of([path]).text


def test_best_values_are_bold_and_explained(regime_runs):
    variants = group(regime_runs(1))
    text = render(variants)
    (best,) = [
        cell for row in headline_table(variants).rows for cell in row.cells if cell.is_best and cell.value == 0.531
    ]
    assert f"<b>{best.text}</b>" in text
    assert "Bold: best mean" in text


@pytest.mark.parametrize(
    "change",
    [
        {"results": {}, "leakage": {}, "timing": {}, "batch": {}, "environment": {}},
        {"config": {}},
        {"leakage": {"influence": {}}},
        {"results": {"precise": {"bbox/AP": None}}},
        {"results": {"precise": {"accuracy": 0.7}}, "leakage": {}, "task": "classification"},
        {"batch": {"total": [1], "normalization": "all"}},
        {"environment": {"nested": {"list": [1, None]}}, "notes": [3]},
        {"status": "finished", "config": {"data": {"val": {"name": "digit_scenes"}}, "schedule": None}},
        {"config": {"model": {"box_head": {"norm": None}}, "evaluation": {"statistics": None}}, "status": "running"},
    ],
)
def test_records_with_holes_still_make_a_page(tmp_path, change):
    record = replace(regime_record("bn_image", 0), **change)
    Page(render(group([write_run(tmp_path / "a", record)])))
    Page(render(group([str(tmp_path / "a"), write_run(tmp_path / "b", replace(record, seed=1, config={"a": 1}))])))


def test_the_same_runs_make_the_same_page(regime_runs):
    variants = group(regime_runs(1))
    assert render(variants) == render(variants)
