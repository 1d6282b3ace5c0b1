"""Reports of classification runs: their own columns, words and finding."""

import re

import pytest

from leakfree.records import RunRecord, write_record
from leakfree.report import compare
from leakfree.report.finding import find
from leakfree.report.html import render
from leakfree.report.measures import accuracy, accuracy_gap, is_visible_leak
from leakfree.report.runs import group_runs, load_runs
from leakfree.report.tables import describe

ACCURACY = {  # same class, random, precise: as a run of each on digits gave
    "BN_one_class": (0.901, 0.620, 0.638),
    "ShuffleBN_one_class": (0.482, 0.693, 0.692),
    "GN": (None, None, 0.665),
}


@pytest.fixture
def folders(tmp_path):
    paths = []
    for name, values in ACCURACY.items():
        modes = dict(zip(("same_class", "random", "precise"), values, strict=True))
        results = {mode: {} if value is None else {"accuracy": value} for mode, value in modes.items()}
        results["population"] = {"accuracy": values[2] + 0.002}
        norm = name.partition("_")[0]
        composition = "same_class" if "class" in name else "random"
        config = {
            "data": {"composition": composition, "group_size": 16, "val": {"name": "digits"}},
            "model": {"norm": norm},
            "schedule": {"max_steps": 320, "freeze_bn_at": 1.0},
        }
        total = 0.0 if norm == "GN" else 0.04
        record = RunRecord(
            name=name,
            task="classification",
            status="finished",
            seed=0,
            config=config,
            results=results,
            leakage={"influence": {"within_class": total / 4, "between_classes": total * 3 / 4, "total": total}},
            notes=["random, same_class: n.a., the model has no batch statistics"] if norm == "GN" else [],
        )
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
        paths.append(str(tmp_path / name))
    return paths


def test_a_leak_is_named_in_words_of_images(folders):
    variants = group_runs(load_runs(folders))
    assert [is_visible_leak(variant) for variant in variants] == [True, False, False]
    finding = find(variants)
    text = re.sub(r"\s", " ", finding.headline.striptags())
    assert finding.is_leak
    assert text == (
        "BN_one_class leaks: it classifies 90.1 % of the validation images correctly while images of one class are "
        "normalized together, and 63.8 % under population statistics: 26.3 points fewer."
    )
    said = " ".join(sentence.striptags() for sentence in finding.sentences)
    assert "ShuffleBN_one_class is best, with accuracy 69.2, 5.4 points above BN_one_class" in re.sub(r"\s", " ", said)
    assert "RoI" not in said


def test_without_a_leak_it_is_told_of_images(folders):
    finding = find(group_runs(load_runs(folders[1:])))
    assert not finding.is_leak
    text = finding.headline.striptags()
    assert "none of the 1 runs" not in text
    assert "images better by more than" in text
    assert "under one-class than under population statistics" in text


def test_numbers_are_in_the_console_and_on_the_page(folders, tmp_path, capsys):
    compare(folders, str(tmp_path / "report.html"))
    text, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for number in ("90.1", "63.8", "+26.3", "−21.0", "66.5"):
        assert number in text
        assert number in page
    assert "(d) statistics of images of one class" in text
    for words in ("RoI", "AP times", "per image", "box AP"):
        assert words not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


def test_columns_and_gaps_read_the_record(folders):
    leaky, shuffled, alone = group_runs(load_runs(folders))
    assert [measure.of(leaky).mean for measure in accuracy()] == pytest.approx([0.901, 0.620, 0.638, 0.640])
    assert accuracy_gap("precise").of(leaky).mean == pytest.approx(0.263)
    assert accuracy_gap("random").of(shuffled).mean == pytest.approx(0.482 - 0.693)
    assert accuracy_gap("precise").of(alone) is None


def test_a_run_is_described_by_its_norm_and_groups(folders):
    variants = group_runs(load_runs(folders))
    assert [describe(variant) for variant in variants] == [
        "BN, groups of 16 images of one class",
        "ShuffleBN, groups of 16 images of one class",
        "GN",
    ]


def test_one_run_makes_a_page(folders):
    assert "Batch leakage in one classification run" in render(group_runs(load_runs(folders[:1])))


def test_statistics_of_a_target_and_mixtures_of_domains_have_columns_and_words(folders, tmp_path, capsys):
    plain = render(group_runs(load_runs(folders)))
    assert "AdaBN" not in plain
    for name, results in (
        ("AdaBN", {"population": {"accuracy": 0.529}, "precise": {"accuracy": 0.528}, "target": {"accuracy": 0.625}}),
        ("BNE", {"embeddings": {"accuracy": 0.734}}),
    ):
        record = RunRecord(name, "classification", "finished", 0, {"model": {"norm": name}}, results=results)
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
        folders.append(str(tmp_path / name))
    page = render(group_runs(load_runs(folders)))
    for words in ("target domain (AdaBN)", "mixture of domains (BNE)", "Target domain, mixture of domains", "62.5"):
        assert words in page
    assert 'data-measure="accuracy.target"' in page
    assert 'data-measure="accuracy.embeddings"' in page
    compare(folders[-2:], str(tmp_path / "report.html"))
    said = capsys.readouterr().out
    assert "targ." in said
    assert "mix.: mixture of domains" in said
    assert "73.4" in said
