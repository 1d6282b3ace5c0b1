import re
from dataclasses import replace

from leakfree.report.plots import curve_panels, influence_panels, signature_panels
from leakfree.report.runs import group_runs, load_runs
from tests.report.regime import curve_rows, regime_record, write_run


def group(paths):
    return group_runs(load_runs(paths))


def test_the_signature_says_its_numbers_in_words(regime_runs):
    panels = signature_panels(group(regime_runs(3)))
    assert [panel.title for panel in panels] == ["RoI accuracy", "Box AP", "Mask AP"]
    assert "bn_image: 72.0, 36.1, 28.8" in panels[0].text
    assert "gn: n.a., n.a., 49.3" in panels[1].text


def test_panels_without_numbers_are_left_out(tmp_path):
    record = regime_record("bn_image", 0)
    boxes = {mode: {"bbox/AP": values["bbox/AP"]} for mode, values in record.results.items()}
    variants = group([write_run(tmp_path / "a", replace(record, results=boxes, leakage={}))])
    assert [panel.title for panel in signature_panels(variants)] == ["Box AP"]
    assert influence_panels(variants) == []
    assert curve_panels(variants) == []


def test_the_leak_panels_say_gap_pairs_and_influence(regime_runs):
    gaps, pairs, influence = influence_panels(group(regime_runs(3)))
    assert "bn_image: +43.2; syncbn: −12.0" in gaps.text
    assert "bn_image: same class 73.1, random 47.4" in pairs.text
    assert "bn_shuffle: 0.028 + 0.190" in influence.text
    assert "gn: 0 + 0" in influence.text


def test_curves_show_loss_classification_loss_and_accuracy(regime_runs):
    panels = curve_panels(group(regime_runs(3)))
    assert [panel.title for panel in panels] == ["Loss", "Classification loss", "RoI accuracy"]


def test_a_resumed_run_counts_the_later_row_of_a_step(tmp_path):
    rows = [{"step": 20, "loss": 9.0}, {"step": 40, "loss": 100.0}, {"step": 40, "loss": 3.0}]
    (panel,) = curve_panels(group([write_run(tmp_path / "a", regime_record("gn", 0), rows)]))
    assert "a: last 3." in panel.text


def test_curves_average_over_the_steps_that_all_seeds_logged(tmp_path):
    rows = [
        [{"step": 20, "loss": 1.0}, {"step": 40, "loss": 2.0}],
        [{"step": 20, "loss": 3.0}, {"step": 40, "loss": 6.0}],
    ]
    rows[0].append({"step": 60, "loss": 99.0})
    paths = [write_run(tmp_path / f"a_seed{seed}", regime_record("gn", seed), rows[seed]) for seed in range(2)]
    (panel,) = curve_panels(group(paths))
    assert "a: last 4." in panel.text


def test_a_long_curve_is_averaged_in_bins_and_says_so(tmp_path):
    rows = [{"step": step, "loss": 1.0} for step in range(0, 90000, 20)]
    (panel,) = curve_panels(group([write_run(tmp_path / "a", regime_record("gn", 0), rows)]))
    assert panel.note == "training, means of 19 rows"
    assert len(panel.svg) < 60_000


def test_odd_rows_are_passed_over(tmp_path):
    rows = [
        {"step": 20, "loss": 1.0},
        {"step": None, "loss": 1.0},
        {"loss": 2.0},
        {"step": 30, "loss": float("nan")},
        {"step": 40, "loss": "?"},
        3,
        {"step": 60, "loss": 0.5},
    ]
    (panel,) = curve_panels(group([write_run(tmp_path / "a", regime_record("gn", 0), rows)]))
    assert "a: last 0.5." in panel.text


def test_an_unfinished_run_has_its_curve(tmp_path):
    record = replace(regime_record("bn_image", 0), status="running", results={}, leakage={})
    variants = group([write_run(tmp_path / "a", record, curve_rows("bn_image", 0, 200))])
    assert len(curve_panels(variants)) == 3
    assert signature_panels(variants) == []


def test_a_variant_keeps_its_colour_in_every_panel(regime_runs):
    variants = group(regime_runs(1, ("gn", "bn_image")))
    for panel in (*signature_panels(variants), *influence_panels(variants), *curve_panels(variants)):
        assert "var(--series-1)" in panel.svg
        assert not re.search(r"var\(--series-[2-7]\)", panel.svg)


def test_many_variants_with_long_names_fit(tmp_path):
    paths = []
    for index in range(12):
        record = regime_record("bn_image", 0)
        record = replace(record, config={**record.config, "extra": index})
        paths.append(write_run(tmp_path / f"a_very_long_name_of_a_run_that_goes_on_and_on_{index}", record))
    assert all(panel.svg for panel in (*signature_panels(group(paths)), *influence_panels(group(paths))))
