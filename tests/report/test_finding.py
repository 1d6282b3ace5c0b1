from dataclasses import replace

from leakfree.report.finding import cautions, find, is_one_class
from leakfree.report.runs import group_runs, load_runs
from tests.report.regime import make_config, regime_record, write_run


def group(paths):
    return group_runs(load_runs(paths))


def words(markup):
    return markup.striptags()


def test_the_run_with_the_largest_gap_is_named_with_its_numbers(regime_runs):
    found = find(group(regime_runs(3, ("gn", "bn_image_frozen_tail", "bn_image", "bn_shuffle"))))
    assert found.is_leak
    text = words(found.headline)
    assert text.startswith("bn_image leaks")
    for number in ("72.0 %", "28.8 %", "43.2 points", "41.4–45.3 over 3 seeds"):
        assert number in text


def test_the_sentences_say_what_it_costs_and_who_does_better(regime_runs):
    text = " ".join(map(words, find(group(regime_runs(3))).sentences))
    assert "box AP falls from 59.5 to 34.0" in text
    assert "73.1 % of RoIs correctly when two images of the same class" in text
    assert "47.4 % when two random images" in text
    assert "25.7 points" in text
    assert "bn_image_frozen_tail (+13.4) as well" in text
    assert "In the other 2 with batch statistics this gap is between −12.0 and −10.6 points" in text
    assert "syncbn is best, with box AP 52.2, 18.1 points above bn_image" in text
    assert "the seeds do not separate it from bn_shuffle" in text
    assert "means over 3 seeds" in text


def test_without_a_gap_above_the_threshold_no_leak_is_claimed(regime_runs):
    found = find(group(regime_runs(3, ("bn_shuffle", "syncbn", "gn"))))
    assert not found.is_leak
    text = words(found.headline)
    assert text.startswith("No leak is visible: none of the 2 runs with batch statistics")
    assert "more than 5.0 points" in text
    assert "largest: bn_shuffle, −10.6 points" in text


def test_a_single_clean_run_is_a_sentence_too(regime_runs):
    text = words(find(group(regime_runs(1, ("syncbn",)))).headline)
    assert text.startswith("No leak is visible: the run with batch statistics does not classify RoIs better")


def test_runs_without_batch_statistics_cannot_be_judged(regime_runs):
    found = find(group(regime_runs(1, ("gn", "frozenbn"))))
    assert words(found.headline).startswith("Leakage cannot be judged")
    assert any("gn_seed0 is best, with box AP 49.5" in words(sentence) for sentence in found.sentences)


def test_an_unfinished_run_takes_no_part(tmp_path, regime_runs):
    leaky = replace(regime_record("bn_image", 0), status="running")
    variants = group([*regime_runs(1, ("syncbn", "gn")), write_run(tmp_path / "leaky", leaky)])
    assert not find(variants).is_leak
    (caution,) = cautions(variants)
    assert words(caution).startswith("leaky is unfinished (running)")


def test_the_difference_of_one_seed_is_called_chance(regime_runs):
    assert "One seed per run" in words(find(group(regime_runs(1))).sentences[-1])


def test_a_baseline_is_compared_with_every_other_run(regime_runs):
    variants = group(regime_runs(1, ("bn_image", "syncbn", "gn")))
    text = " ".join(map(words, find(variants, variants[0]).sentences))
    assert "against bn_image_seed0: syncbn_seed0 +22.3, gn_seed0 +18.7." in text


def test_names_are_escaped_in_sentences(tmp_path):
    path = write_run(tmp_path / "<i>a&b", regime_record("bn_image", 0))
    found = find(group([path]))
    assert "&lt;i&gt;a&amp;b" in found.headline
    assert words(found.headline).startswith("<i>a&b leaks")


def test_runs_measured_on_other_data_are_cautioned_against(tmp_path):
    record = regime_record("gn", 0)
    other = replace(record, config=make_config(data__val__digits__num_images=10))
    variants = group([write_run(tmp_path / "a", record), write_run(tmp_path / "b", other)])
    text = " ".join(map(words, cautions(variants)))
    assert "not measured alike: they differ in data.val.digits.num_images" in text


def test_other_machines_are_cautioned_against_and_other_versions_of_us_are_not(tmp_path):
    record = regime_record("gn", 0)
    paths = [write_run(tmp_path / "a_seed0", record)]
    paths.append(write_run(tmp_path / "a_seed1", replace(record, seed=1, environment={**record.environment, "x": 1})))
    assert cautions(group(paths)) == []
    other = replace(record, seed=2, environment={**record.environment, "cpu": "aarch64, 64 cores"})
    paths.append(write_run(tmp_path / "a_seed2", other))
    assert "different machines" in words(cautions(group(paths))[0])


def test_equal_seeds_are_cautioned_against(tmp_path):
    paths = [write_run(tmp_path / name, regime_record("gn", 0)) for name in ("gn_seed0", "gn_seed1")]
    assert "runs of equal seed (0, 0)" in words(cautions(group(paths))[0])


def test_one_class_scenes_are_known_from_the_config(tmp_path):
    record = regime_record("gn", 0)
    half = make_config(data__train__digits__class_sharing=0.5, data__val__digits__class_sharing=0.5)
    coco = make_config(data__train__name="coco", data__val__name="coco")
    answers = [
        is_one_class(group([write_run(tmp_path / str(index), replace(record, config=config))]))
        for index, config in enumerate((record.config, half, coco))
    ]
    assert answers == [True, False, False]
