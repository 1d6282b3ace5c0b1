from dataclasses import replace

import pytest

from leakfree.report.measures import (
    LEAK_THRESHOLD,
    ap,
    format_range,
    format_value,
    gap,
    is_visible_leak,
    pair_gap,
    roi_accuracy,
)
from leakfree.report.runs import Spread, group_runs, load_runs
from tests.report.regime import REGIME, regime_record, write_run


def variants_of(paths):
    return {variant.label: variant for variant in group_runs(load_runs(paths))}


def test_a_gap_is_taken_in_each_run_and_then_averaged(regime_runs):
    variant = variants_of(regime_runs(3, ("bn_image",)))["bn_image"]
    differences = [image - precise for image, _, precise in REGIME["bn_image"]["roi"]]
    spread = gap("precise").of(variant)
    assert spread.mean == pytest.approx(sum(differences) / 3)
    assert (spread.low, spread.high) == (pytest.approx(min(differences)), pytest.approx(max(differences)))


def test_a_gap_with_one_missing_side_is_missing():
    record = regime_record("bn_image", 0)
    for mode in ("image", "random"):
        broken = replace(record, leakage={"roi_accuracy/val": {**record.leakage["roi_accuracy/val"], mode: None}})
        assert gap("random").read(broken) is None
    assert pair_gap().read(regime_record("gn", 0)) is None
    assert pair_gap().read(record) == pytest.approx(0.731 - 0.474)


def test_stored_statistics_stand_in_only_where_precise_ones_are_missing():
    population = ap("bbox")[2]
    with_both, without = regime_record("bn_image", 0), regime_record("gn", 0)
    assert population.read(with_both) == with_both.results["precise"]["bbox/AP"]
    assert not population.stands_in(with_both)
    assert population.read(without) == without.results["population"]["bbox/AP"]
    assert population.stands_in(without)


def test_a_gap_without_per_image_accuracy_has_no_stand_in_mark():
    assert not gap("precise").stands_in(regime_record("gn", 0))


@pytest.mark.parametrize(
    ("name", "leaks"),
    [("bn_image", True), ("bn_image_frozen_tail", True), ("syncbn", False), ("bn_shuffle", False), ("gn", False)],
)
def test_the_threshold_separates_the_measured_regime(regime_runs, name, leaks):
    assert is_visible_leak(variants_of(regime_runs(3, (name,)))[name]) is leaks


def test_a_gap_that_is_not_positive_for_every_seed_is_no_visible_leak(tmp_path):
    def record(seed, image):
        base = regime_record("bn_image", seed)
        return replace(base, leakage={"roi_accuracy/val": {"image": image, "random": 0.5, "precise": 0.5}})

    paths = [write_run(tmp_path / "a_seed0", record(0, 0.9)), write_run(tmp_path / "a_seed1", record(1, 0.49))]
    (variant,) = variants_of(paths).values()
    assert gap("precise").of(variant).mean > LEAK_THRESHOLD
    assert not is_visible_leak(variant)


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (0.52, "percent", "52.0"),
        (1.0, "percent", "100.0"),
        (0.4321, "points", "+43.2"),
        (-0.1204, "points", "−12.0"),
        (-0.0001, "points", "0.0"),
        (-0.0001, "percent", "0.0"),
        (0.0, "share", "0"),
        (1e-9, "share", "<0.001"),
        (0.2136, "share", "0.214"),
        (0.07, "seconds", "0.0700"),
        (123.4, "seconds", "123"),
        (400, "count", "400"),
        (812.4, "count", "812"),
        (7.6333, "minutes", "7.6"),
    ],
)
def test_numbers_look_as_in_the_field(value, style, text):
    assert format_value(value, style) == text


def test_a_range_is_shown_only_where_it_can_be_seen():
    assert format_range(Spread(0.34, 0.308, 0.37, 3), "percent") == "30.8–37.0"
    assert format_range(Spread(-0.1, -0.12, 0.08, 3), "points").replace("\xa0", " ") == "−12.0 to +8.0"
    assert format_range(Spread(0.34, 0.34, 0.34, 1), "percent") == ""
    assert format_range(Spread(0.34, 0.34001, 0.34002, 3), "percent") == ""


def test_the_four_kinds_of_statistics_read_their_own_numbers():
    record = regime_record("bn_image", 1)
    image, random, precise, stored = (measure.read(record) for measure in roi_accuracy("val"))
    assert (image, random, precise) == REGIME["bn_image"]["roi"][1]
    assert stored == record.leakage["roi_accuracy/val"]["population"]
