import json
import os
from dataclasses import replace

import pytest

from leakfree.errors import RunError
from leakfree.report.runs import Spread, by_task, find_variant, flatten, group_runs, load_runs
from tests.report.regime import NO_BATCH_STATISTICS, make_config, regime_record, write_run

FUTURE = '{"name": "a", "task": "detection", "status": "finished", "seed": 0, "config": {}, "format": "2"}'


def labels(paths):
    return [variant.label for variant in group_runs(load_runs(paths))]


def test_runs_that_differ_in_seed_and_folder_are_one_variant(regime_runs):
    variants = group_runs(load_runs(regime_runs(3, ("bn_image", "gn"))))
    assert [(variant.label, variant.seeds) for variant in variants] == [("bn_image", [0, 1, 2]), ("gn", [0, 1, 2])]


def test_a_difference_in_any_other_key_separates_runs(tmp_path):
    record = regime_record("bn_image", 0)
    other = replace(record, seed=1, config=make_config(seed=1, data__train__digits__seed=1))
    paths = [write_run(tmp_path / "a", record), write_run(tmp_path / "b", other)]
    assert labels(paths) == ["a", "b"]


def test_order_is_as_given(regime_runs):
    paths = regime_runs(2, ("gn", "bn_image"))
    assert labels(paths) == ["gn", "bn_image"]
    assert labels([paths[3], paths[0], paths[2], paths[1]]) == ["bn_image", "gn"]


def test_an_unfinished_run_is_not_averaged_with_finished_ones(tmp_path):
    paths = [
        write_run(tmp_path / "leaky_seed0", regime_record("bn_image", 0)),
        write_run(tmp_path / "leaky_seed1", regime_record("bn_image", 1)),
        write_run(tmp_path / "leaky_seed2", replace(regime_record("bn_image", 2), status="running")),
    ]
    variants = group_runs(load_runs(paths))
    assert [(variant.label, variant.finished, len(variant.runs)) for variant in variants] == [
        ("leaky", True, 2),
        ("leaky_seed2", False, 1),
    ]


def test_an_unfinished_run_says_what_it_lacks(tmp_path):
    record = replace(regime_record("bn_image", 0), status="interrupted", leakage={}, timing={})
    record = replace(record, results={"population": {"bbox/AP": 0.3}})
    (run,) = load_runs([write_run(tmp_path / "a", record, [{"step": 20}, {"step": 240}])])
    assert run.missing == ["results under precise, image, random statistics", "leakage numbers", "timing"]
    assert run.last_step == 240


def test_equal_folder_names_are_told_apart_by_their_parents(tmp_path):
    paths = [
        write_run(tmp_path / "old" / "leaky", regime_record("bn_image", 0)),
        write_run(tmp_path / "new" / "leaky", regime_record("syncbn", 0)),
        write_run(tmp_path / "new" / "gn", regime_record("gn", 0)),
    ]
    assert labels(paths) == ["old/leaky", "new/leaky", "gn"]


@pytest.mark.parametrize("pattern", ["leaky_seed{}", "leaky-s{}", "leaky/seed{}", "leaky/{}", "leaky.Seed={}"])
def test_the_label_of_a_variant_leaves_out_the_seed(tmp_path, pattern):
    paths = [write_run(tmp_path / pattern.format(seed), regime_record("bn_image", seed)) for seed in range(2)]
    assert labels(paths) == ["leaky"]


def test_variants_of_one_stem_still_have_different_labels(tmp_path):
    paths = [
        write_run(tmp_path / f"run_seed{index}", regime_record(name, seed))
        for index, (name, seed) in enumerate([("bn_image", 0), ("bn_image", 1), ("gn", 0), ("gn", 1)])
    ]
    assert labels(paths) == ["run", "run (2)"]


def test_a_variant_of_unlike_folder_names_is_named_after_the_first(tmp_path):
    paths = [
        write_run(tmp_path / "monday", regime_record("gn", 0)),
        write_run(tmp_path / "friday", regime_record("gn", 1)),
    ]
    assert labels(paths) == ["monday and 1 more"]


def test_a_record_path_stands_for_its_folder(regime_runs):
    (path,) = regime_runs(1, ("gn",))
    (run,) = load_runs([os.path.join(path, "record.json")])
    assert str(run.folder) == path
    assert len(run.rows) == 20


@pytest.mark.parametrize("again", ["{}", "{}/", "{}/../{name}", "{}/record.json"])
def test_a_folder_given_twice_is_named(regime_runs, again):
    (path,) = regime_runs(1, ("gn",))
    with pytest.raises(RunError, match="given twice"):
        load_runs([path, again.format(path, name=os.path.basename(path))])


def test_a_link_to_a_folder_is_that_folder(regime_runs, tmp_path):
    (path,) = regime_runs(1, ("gn",))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RunError, match=r"link: given twice \(first as .*gn_seed0\)"):
        load_runs([path, str(tmp_path / "link")])


def test_runs_of_different_tasks_are_different_variants(tmp_path, regime_runs):
    paths = regime_runs(2, ("gn",))
    other = write_run(tmp_path / "moco", replace(regime_record("gn", 0), task="contrastive"))
    tasks = by_task(group_runs(load_runs([paths[0], other, paths[1]])))
    assert {task: [(item.label, len(item.runs)) for item in members] for task, members in tasks.items()} == {
        "detection": [("gn", 2)],
        "contrastive": [("moco", 1)],
    }


def test_nothing_to_compare_is_refused():
    with pytest.raises(RunError, match="give the output folders"):
        load_runs([])


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(RunError, match=r"holds no record\.json"):
        load_runs([str(tmp_path)])
    with pytest.raises(RunError, match=r"holds no record\.json"):
        load_runs([str(tmp_path / "missing")])


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '{"name": "a"}', "\x00\x01", FUTURE])
def test_a_broken_record_is_one_clear_line(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RunError) as caught:
        load_runs([str(tmp_path)])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("results", [1], "results: expected dict"),
        ("results", {"image": 3}, "results.image: expected an object of numbers, got 3"),
        ("results", {"image": {"bbox/AP": "high"}}, "results.image.bbox/AP: expected a number or null, got 'high'"),
        ("leakage", {"pairs": {"same_class": True}}, "leakage.pairs.same_class: expected a number or null, got True"),
        ("timing", {"steps": [4]}, "timing.steps: expected a number"),
        ("config", "gn", "config: expected dict, got 'gn'"),
        ("seed", "zero", "seed: expected int"),
        ("notes", "none", "notes: expected list"),
    ],
)
def test_a_record_of_wrong_types_is_one_clear_line(tmp_path, key, value, words):
    path = write_run(tmp_path / "a", regime_record("gn", 0))
    record = json.loads((tmp_path / "a" / "record.json").read_text()) | {key: value}
    (tmp_path / "a" / "record.json").write_text(json.dumps(record))
    with pytest.raises(RunError) as caught:
        load_runs([path])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_count_as_missing(tmp_path):
    path = write_run(tmp_path / "a", regime_record("gn", 0))
    text = (tmp_path / "a" / "record.json").read_text().replace('"seconds_per_step": 0.0675', '"seconds_per_step": NaN')
    assert "NaN" in text
    (tmp_path / "a" / "record.json").write_text(text)
    (run,) = load_runs([path])
    assert run.record.timing["seconds_per_step"] is None


@pytest.mark.parametrize("content", [b"{]\n{}\n", b"\xff\xfe\n{}\n"])
def test_broken_metrics_are_one_clear_line(tmp_path, content):
    path = write_run(tmp_path / "a", regime_record("gn", 0))
    (tmp_path / "a" / "metrics.json").write_bytes(content)
    with pytest.raises(RunError, match=r"metrics\.json"):
        load_runs([path])


def test_a_variant_lists_each_note_once(regime_runs):
    (variant,) = group_runs(load_runs(regime_runs(3, ("gn",))))
    assert variant.notes == [NO_BATCH_STATISTICS]


def test_a_baseline_is_found_by_label_name_or_path(regime_runs):
    paths = regime_runs(2, ("bn_image", "gn"))
    variants = group_runs(load_runs(paths))
    for name in ("gn", "gn_seed1", paths[2]):
        assert find_variant(variants, name) is variants[1]
    with pytest.raises(RunError, match="baseline 'gm' is none of the runs: gn, bn_image"):
        find_variant(variants, "gm")


def test_spread_is_mean_and_range_of_what_exists():
    assert Spread.of([0.3, None, 0.6]) == Spread(pytest.approx(0.45), 0.3, 0.6, 2)
    assert Spread.of([None]) is None
    equal = Spread.of([0.1, 0.1, 0.1])
    assert equal.low == equal.mean == equal.high


def test_the_last_number_of_a_name_is_found_past_odd_rows(tmp_path):
    rows = [{"step": 1, "pretext": 0.5}, {"step": 2, "pretext": 1}, {"step": 3, "pretext": None}, {"step": 4}]
    (run,) = load_runs([write_run(tmp_path / "a", regime_record("gn", 0), rows)])
    assert run.last("pretext") == 1.0
    assert run.last("knn") is None


def test_flatten_keeps_lists_and_empty_dicts():
    assert flatten({"a": {"b": {"c": [1]}, "d": {}}, "e": None}) == {"a.b.c": [1], "a.d": {}, "e": None}
