from dataclasses import replace

import pytest

from leakfree.report.measures import ap, timing
from leakfree.report.runs import group_runs, load_runs
from leakfree.report.tables import (
    best_variants,
    config_differences,
    cost_table,
    describe,
    environment_rows,
    footnotes,
    headline_table,
    leak_table,
    metric_table,
    shown,
)
from tests.report.regime import NO_BATCH_STATISTICS, make_config, regime_record, write_run


def group(paths):
    return group_runs(load_runs(paths))


def cells(table, label):
    (row,) = [row for row in table.rows if row.variant.label == label]
    return {cell.measure: cell for cell in row.cells}


def test_a_cell_is_the_mean_with_the_range_over_seeds(regime_runs):
    cell = cells(headline_table(group(regime_runs(3))), "bn_image")["bbox/AP.precise"]
    assert (cell.text, cell.range) == ("34.0", "30.8–37.0")
    assert cell.value == pytest.approx((0.308 + 0.370 + 0.343) / 3)


def test_a_missing_number_is_na_with_the_reason_and_a_footnote(regime_runs):
    variants = group(regime_runs(1))
    cell = cells(headline_table(variants), "gn_seed0")["bbox/AP.image"]
    assert (cell.text, cell.value, cell.reason, cell.footnote) == ("n.a.", None, NO_BATCH_STATISTICS, 1)
    assert footnotes(variants) == [[NO_BATCH_STATISTICS]]


def test_a_missing_number_without_a_note_says_so(tmp_path):
    bare = replace(regime_record("bn_image", 0), leakage={})
    variants = group([write_run(tmp_path / "a", bare), write_run(tmp_path / "b", regime_record("syncbn", 0))])
    cell = cells(headline_table(variants), "a")["gap.precise"]
    assert (cell.reason, cell.footnote) == ("Not recorded by this run.", 0)


def test_a_mean_over_some_of_the_seeds_says_over_how_many(tmp_path):
    records = [regime_record("bn_image", seed) for seed in range(3)]
    records[1] = replace(records[1], leakage={})
    variants = group([write_run(tmp_path / f"a_seed{seed}", record) for seed, record in enumerate(records)])
    table = headline_table(variants)
    assert cells(table, "a")["gap.precise"].partial == "2 of 3 runs"
    assert cells(table, "a")["bbox/AP.image"].partial == ""


def test_the_best_mean_is_marked_and_what_the_seeds_do_not_separate_from_it(regime_runs):
    variants = group(regime_runs(3))
    assert [item.label for item in best_variants(ap("bbox")[2], variants)] == ["syncbn", "bn_shuffle"]


def test_with_one_seed_only_the_best_number_is_marked(regime_runs):
    variants = group(regime_runs(1))
    assert [item.label for item in best_variants(ap("bbox")[2], variants)] == ["syncbn_seed0"]


def test_low_is_best_for_time(tmp_path):
    fast = replace(regime_record("gn", 0), timing={"seconds_per_step": 0.01})
    variants = group([write_run(tmp_path / "slow", regime_record("bn_image", 0)), write_run(tmp_path / "fast", fast)])
    measure = timing("seconds_per_step", "", "seconds", "low")
    assert [item.label for item in best_variants(measure, variants)] == ["fast"]


def test_per_image_statistics_have_no_best_value(regime_runs):
    table = headline_table(group(regime_runs(3)))
    for row in table.rows:
        assert not any(cell.is_best for cell in row.cells if cell.measure.endswith((".image", ".random")))


def test_an_unfinished_run_is_never_best(tmp_path, regime_runs):
    lucky = replace(regime_record("bn_shuffle", 0), status="interrupted", results={"precise": {"bbox/AP": 0.99}})
    variants = group([*regime_runs(1), write_run(tmp_path / "lucky", lucky)])
    assert "lucky" not in [item.label for item in best_variants(ap("bbox")[2], variants)]
    assert cells(headline_table(variants), "lucky")["bbox/AP.precise"].text == "99.0"


def test_a_mark_that_all_share_is_left_out(regime_runs):
    variants = group(regime_runs(1, ("syncbn",)))
    assert best_variants(ap("bbox")[2], variants) == []
    same_time = timing("seconds_per_step", "", "seconds", "low")
    assert best_variants(same_time, group(regime_runs(1, ("bn_image", "gn")))) == []


def test_columns_without_any_number_are_left_out(tmp_path):
    record = regime_record("bn_image", 0)
    boxes_only = {mode: {"bbox/AP": values["bbox/AP"]} for mode, values in record.results.items()}
    table = headline_table(group([write_run(tmp_path / "a", replace(record, results=boxes_only))]))
    assert "Mask AP" not in [item.head for item in table.groups]


def test_differences_from_the_baseline_are_signed(regime_runs):
    variants = group(regime_runs(1))
    table = headline_table(variants, variants[0])
    assert cells(table, "syncbn_seed0")["bbox/AP.precise"].delta == "+22.3"
    assert cells(table, "bn_image_seed0")["bbox/AP.precise"].delta == ""


def test_only_keys_that_differ_are_listed_without_seed_and_folder(regime_runs):
    variants = group(regime_runs(2, ("bn_image", "syncbn", "bn_image_frozen_tail")))
    differences = config_differences(variants, variants[0])
    assert dict(differences.rows) == {
        "model.images_per_group": [("1", True), ("0", False), ("1", True)],
        "model.box_head.norm": [("BN", True), ("SyncBN", False), ("BN", True)],
        "model.mask_head.norm": [("BN", True), ("SyncBN", False), ("BN", True)],
        "schedule.freeze_bn_at": [("1.0", True), ("1.0", True), ("0.75", False)],
    }


def test_a_key_that_one_config_lacks_is_a_difference(tmp_path):
    record = regime_record("gn", 0)
    longer = replace(record, config=make_config(optimizer__lr=0.1))
    variants = group([write_run(tmp_path / "a", record), write_run(tmp_path / "b", longer)])
    assert ("optimizer.lr", [("–", True), ("0.1", False)]) in config_differences(variants, variants[0]).rows


def test_an_environment_that_differs_names_the_runs(tmp_path):
    record = regime_record("gn", 0)
    other = replace(record, seed=1, environment={**record.environment, "torch": "2.6.0"})
    paths = [write_run(tmp_path / "a", record), write_run(tmp_path / "b", other)]
    rows = dict(environment_rows(load_runs(paths)))
    assert rows["torch"] == [("2.15.0", [paths[0]]), ("2.6.0", [paths[1]])]
    assert rows["python"] == [("3.11.9", [])]


def test_the_cost_table_shows_what_is_normalized_together(regime_runs):
    table = cost_table(group(regime_runs(1, ("bn_image", "syncbn"))))
    heads = ["images per step", "per rank", "normalized together: box head", "normalized together: mask head"]
    assert table.text_heads == heads
    assert [row.texts[2] for row in table.rows] == ["32 RoIs (1 image)", "256 RoIs (8 images)"]


def test_every_recorded_metric_has_a_row_per_kind_of_statistics(regime_runs):
    table = metric_table(group(regime_runs(1, ("bn_image", "gn"))))
    assert [(variant.label, [mode for mode, _ in rows]) for variant, _, rows in table] == [
        ("bn_image_seed0", ["image", "random", "precise", "population"]),
        ("gn_seed0", ["population"]),
    ]
    assert [cell.text for cell in table[0][2][0][1]] == ["59.5", "86.3", "53.5", "41.6", "84.5", "36.9"]


def test_exact_zero_influence_does_not_look_like_a_small_one(tmp_path):
    tiny = replace(regime_record("syncbn", 0), leakage={"influence": {"total": 1e-7}})
    table = leak_table(group([write_run(tmp_path / "a", tiny), write_run(tmp_path / "b", regime_record("gn", 0))]))
    assert cells(table, "a")["influence.total"].text == "<0.001"
    assert cells(table, "b")["influence.total"].text == "0"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bn_image", "BN, 1 image per group"),
        ("syncbn", "SyncBN"),
        ("bn_image_frozen_tail", "BN, 1 image per group, frozen at 75 %"),
        ("gn", "GN"),
    ],
)
def test_a_variant_is_described_by_what_normalizes_its_head(regime_runs, name, words):
    assert describe(group(regime_runs(1, (name,)))[0]) == words


def test_a_freeze_point_is_told_in_its_unit(tmp_path):
    record = regime_record("bn_image_frozen_tail", 0)
    record.config["schedule"] |= {"freeze_bn_at": 80.0, "freeze_bn_unit": "epoch"}
    (variant,) = group([write_run(tmp_path / "a", record)])
    assert describe(variant) == "BN, 1 image per group, frozen at epoch 80"


def test_values_are_shown_as_in_a_config():
    assert [shown(value) for value in (None, "", "BN", True, 1.0, [1, "a"])] == [
        "–", '""', "BN", "true", "1.0", '[1, "a"]',
    ]  # fmt: skip
