import io
from dataclasses import replace

import pytest
from rich.console import Console

from leakfree.report.console import print_comparison
from leakfree.report.measures import HEADLINE, format_value
from leakfree.report.runs import group_runs, load_runs
from tests.report.regime import regime_record, write_run


def printed(paths, width=80, encoding="utf-8", **options):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    variants = group_runs(load_runs(paths))
    print_comparison(variants, Console(file=stream, width=width, highlight=False, markup=False, **options))
    return raw.getvalue().decode(encoding), variants


@pytest.mark.parametrize("width", [40, 80, 120, 400])
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_headline_number_is_printed_whole_at_any_width(regime_runs, width, num_seeds):
    text, variants = printed(regime_runs(num_seeds), width)
    for group in HEADLINE:
        for measure in group.measures:
            for variant in variants:
                spread = measure.of(variant)
                assert spread is None or format_value(spread.mean, measure.style) in text
    assert "…" not in text


def test_tables_keep_to_the_width(regime_runs):
    text, _ = printed(regime_runs(3), 80)
    table_lines = [line for line in text.splitlines() if not line.startswith(("-", "[", "AP", "*", "bn_image leaks"))]
    assert max(len(line.rstrip()) for line in table_lines) <= 80


@pytest.mark.parametrize("width", [20, 60, 80, 81, 82, 83, 84, 120])
def test_every_block_names_every_run(tmp_path, width):
    paths = [write_run(tmp_path / name, regime_record(norm, 0)) for name, norm in (("bn", "bn_image"), ("gn", "gn"))]
    lines = printed(paths, width)[0].splitlines()
    blocks = sum(line.startswith("run ") for line in lines)
    assert blocks > 0
    for name in ("bn ", "gn "):
        assert sum(line.startswith(name) and " leaks" not in line for line in lines) == blocks


def test_without_a_terminal_there_are_no_escape_codes(regime_runs):
    text, _ = printed(regime_runs(1))
    assert "\x1b" not in text


def test_ranges_over_seeds_are_printed(regime_runs):
    text, _ = printed(regime_runs(3, ("bn_image",)))
    assert "30.8–37.0" in text


def test_a_range_of_signed_numbers_is_printed_with_blanks(regime_runs):
    text, _ = printed(regime_runs(3, ("bn_image",)))
    assert "+41.4 to +45.3" in text
    assert "?" not in text


def test_marks_and_notes_are_explained(regime_runs):
    text, _ = printed(regime_runs(1))
    assert "+42.9!" in text
    assert "53.1*" in text
    assert "49.5°" in text
    assert "n.a.[1]" in text
    assert "[1] image, random, precise: n.a.: the RoI heads have no batch statistics" in text


def test_an_unfinished_run_is_marked(tmp_path):
    record = replace(regime_record("bn_image", 0), status="interrupted", results={}, leakage={}, timing={})
    text, _ = printed([write_run(tmp_path / "late", record)])
    assert "late is unfinished (interrupted)" in text


def test_a_console_without_unicode_gets_plain_signs(regime_runs):
    text, _ = printed(regime_runs(3), encoding="ascii")
    assert "30.8-37.0" in text
    assert "-12.0" in text


def test_markup_and_control_signs_in_names_are_only_text(tmp_path):
    text, _ = printed([write_run(tmp_path / "[red]a\x1b[31m[bold]", regime_record("gn", 0))])
    assert "[red]a?[31m[bold]" in text
    assert "\x1b" not in text
