"""Runs of several tasks in one comparison: a section for each, and nothing compared across them."""

import re

import pytest

from leakfree.report import compare
from leakfree.report.html import render
from leakfree.report.runs import find_variant, group_runs, load_runs
from tests.report.pretext_regime import write_pretext_runs
from tests.report.test_html import Page


@pytest.fixture
def mixed(tmp_path, regime_runs):
    """Two detection variants and two contrastive ones, given in turn."""
    detection, contrastive = regime_runs(1, ("bn_image", "gn")), write_pretext_runs(tmp_path / "moco", ("bn", "gn"))
    return [detection[0], contrastive[0], detection[1], contrastive[1]]


def test_each_task_has_its_finding_tables_and_words(mixed):
    text = render(group_runs(load_runs(mixed)))
    page = Page(text)
    assert "Batch leakage in 2 detection runs and 2 contrastive runs" in page.text
    assert "it classifies 72.2" in page.text
    assert "it finds the right key for 41.0" in page.text
    assert list(page.tables) == [
        name + suffix for suffix in ("", "-2") for name in ("headline", "leak", "cost", "metrics", "config", "runs")
    ]
    assert page.cells("headline", "bn_image_seed0")["gap.precise"]["text"].split() == ["+42.9", "leak"]
    assert page.cells("headline-2", "bn_seed0")["pretext.gap"]["text"].split() == ["+31.5", "leak"]
    assert "pretext.gap" not in page.cells("headline", "bn_image_seed0")
    assert "bbox/AP.precise" not in page.cells("headline-2", "bn_seed0")


def test_ids_are_unique_references_lead_somewhere_and_figures_are_counted_through(mixed):
    page = Page(render(group_runs(load_runs(mixed))))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("href", "aria-labelledby"):
            target = attributes.get(key, "").removeprefix("#")
            assert not target or target.startswith("data:") or target in ids
    assert re.findall(r"Table (\d+)\.", page.text) == [str(number) for number in range(1, 13)]
    assert re.findall(r"Figure (\d+)\.", page.text) == [str(number) for number in range(1, 7)]


def test_a_baseline_concerns_its_own_task(mixed):
    variants = group_runs(load_runs(mixed))
    page = Page(render(variants, baseline=find_variant(variants, "gn_seed0")))  # of detection: the first of the name
    assert page.text.count("difference from") == 1


def test_no_caution_or_config_key_crosses_tasks(mixed):
    page = Page(render(group_runs(load_runs(mixed))))
    assert "not measured alike" not in page.text
    keys = {row["label"] for row in page.tables["config-2"]}
    assert not any("box_head" in key for key in keys)


def test_the_console_has_a_heading_for_each_task(mixed, tmp_path, capsys):
    compare(mixed, str(tmp_path / "report.html"))
    text = capsys.readouterr().out
    first, second = text.split("== contrastive ==")
    assert first.startswith("== detection ==")
    assert "Box AP" in first
    assert "Pretext" not in first
    assert "Pretext" in second
    assert "Box AP" not in second
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_one_task_has_no_heading(mixed, capsys):
    compare(mixed[::2])
    assert "==" not in capsys.readouterr().out
