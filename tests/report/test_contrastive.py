"""Reports of contrastive runs: features, the pretext task under the swap beside its loss, and honest words."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from leakfree.config import load_config
from leakfree.report import compare
from leakfree.report.finding import cautions, find
from leakfree.report.html import render
from leakfree.report.measures import (
    BLIND_THRESHOLD,
    blind_loss,
    difference,
    features,
    is_blind,
    is_visible_leak,
    leak_gap,
    learned,
    pretext,
)
from leakfree.report.plots import curve_panels, influence_panels, signature_panels
from leakfree.report.runs import group_runs, load_runs
from leakfree.report.tables import cost_table, describe, headline_table, leak_table
from leakfree.training import train
from tests.report.pretext_regime import pretext_record, pretext_rows, write_pretext_runs
from tests.report.regime import write_run
from tests.report.test_html import Page

ROOT = Path(__file__).parents[2]
ALL = ("bn", "shuffle_bn", "sync_bn", "gn")
TINY = [
    "trainer.num_threads=1", "trainer.total_batch_size=16", "trainer.log_period=2", "trainer.eval_period=2",
    "schedule.max_steps=4", "schedule.warmup_steps=1", "model.queue_size=64", "evaluation.precise_images=32",
    "evaluation.max_images=64", "evaluation.online_images=32", "evaluation.backend=torch", "leakage.max_images=64",
    "leakage.influence_probes=2", "leakage.influence_batches=1",
]  # fmt: skip


def group(paths):
    return group_runs(load_runs(paths))


def plain(markup):
    return re.sub(r"\s", " ", markup.striptags())


def said(found):
    return " ".join(map(plain, found.sentences))


def of(variants, label):
    (variant,) = [item for item in variants if item.label == label]
    return variant


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """Two MoCo runs and a SimCLR run as training leaves them: four steps each."""
    folder = tmp_path_factory.mktemp("real")
    wanted = {"bn": [], "eman": ["model.key=eman"], "simclr": ["model.method=simclr"]}
    for name, overrides in wanted.items():
        output = [f"output_dir={folder / name}", f"data.root={folder / 'data'}"]
        train(load_config(ROOT / "configs/contrastive/digits/moco_bn.yaml", [*TINY, *output, *overrides]))
    return [str(folder / name) for name in wanted]


# ------------------------------------------------------------------------------------------ real records


def test_every_number_that_a_run_records_is_in_the_tables(real_runs):
    variants = group(real_runs)
    shown = {
        (row.variant.label, cell.measure): cell.value
        for table in (headline_table(variants), leak_table(variants))
        for row in table.rows
        for cell in row.cells
    }
    for name in ("bn", "eman", "simclr"):
        record = of(variants, name).runs[0].record
        found = record.leakage["pretext"]
        for measure, value in {
            "knn.precise": record.results["precise"]["knn"],
            "knn.population": record.results["population"]["knn"],
            "linear.precise": record.results["precise"]["linear"],
            "linear.population": record.results["population"]["linear"],
            "pretext.same": found["same"],
            "pretext.other": found["other"],
            "pretext.gap": found["gap"],
            "pretext.loss": found["loss"],
            "pretext.moved": found["moved"],
            "probe.query": found["query_probe"],
            "probe.key": found["key_probe"],
            "influence.within_group": record.leakage["influence"]["within_group"],
            "influence.between_groups": record.leakage["influence"]["between_groups"],
            "influence.total_of_groups": record.leakage["influence"]["total"],
        }.items():
            assert shown[name, measure] == (None if value is None else pytest.approx(value)), measure
        unread = set(found) - {"same", "other", "gap", "loss", "moved", "query_probe", "key_probe"}
        assert not unread, "a run records what no report shows"


def test_every_logged_number_of_the_pretext_task_is_drawn(real_runs):
    rows = [json.loads(line) for line in (Path(real_runs[0]) / "metrics.json").read_text().splitlines()]
    assert {"loss", "pretext", "knn", "pretext/same", "pretext/other"} <= {key for row in rows for key in row}
    panels = curve_panels(group(real_runs))
    assert [panel.title for panel in panels] == [
        "Pretext accuracy, training",
        "Pretext accuracy, held-out",
        "kNN accuracy",
        "Pretext loss, training",
    ]
    for name in ("bn", "eman", "simclr"):
        assert f"{name}: pretext/other last" in panels[1].text


def test_real_runs_make_a_page_and_a_console_report(real_runs, tmp_path, capsys):
    compare(real_runs, str(tmp_path / "report.html"), baseline="eman")
    text, page = capsys.readouterr().out, Page((tmp_path / "report.html").read_text())
    assert "each image alone" in text
    assert page.cells("headline", "eman")["pretext.gap"]["text"].strip() == "0.0"
    assert "solve different pretext tasks: they differ in model.method" in page.text
    assert "knn" in page.text
    assert "RoI" not in page.text


def test_the_loss_of_features_that_tell_nothing_is_that_of_each_method(real_runs):
    moco, _, simclr = group(real_runs)
    assert blind_loss(moco.runs[0].record) == pytest.approx(math.log(65))
    assert blind_loss(simclr.runs[0].record) == pytest.approx(math.log(31))


# ---------------------------------------------------------------------------------------------- measures


def test_the_way_of_the_loss_is_from_blind_features_to_aligned_ones():
    def way(loss):
        record = pretext_record("bn", 0)
        record.leakage["pretext"]["loss"] = loss
        return learned().read(record)

    assert way(math.log(513)) == pytest.approx(0)
    assert way(math.log(1 + 512 * math.exp(-1 / 0.2))) == pytest.approx(1)
    assert way(3.41) == pytest.approx((math.log(513) - 3.41) / (math.log(513) - math.log(1 + 512 * math.exp(-5))))
    assert way(None) is None


@pytest.mark.parametrize(
    "model",
    [{"method": "other"}, {"queue_size": None}, {"queue_size": 0}, {"temperature": 0}, {"temperature": "warm"}],
)
def test_a_config_without_the_numbers_gives_no_way(model):
    assert learned().read(pretext_record("bn", 0, **model)) is None
    assert learned().read(replace(pretext_record("bn", 0), config={})) is None


def test_a_leak_is_a_gap_of_a_run_that_learned(tmp_path):
    variants = group(write_pretext_runs(tmp_path, ALL, 3))
    assert {item.label: is_visible_leak(item) for item in variants} == {
        "bn": True, "shuffle_bn": False, "sync_bn": True, "gn": False,
    }  # fmt: skip
    assert {item.label: is_blind(item) for item in variants} == dict.fromkeys(ALL[:3], False) | {"gn": True}
    assert leak_gap(of(variants, "bn")).of(of(variants, "bn")).mean == pytest.approx((0.315 + 0.503 + 0.400) / 3)


def test_a_large_gap_at_the_loss_of_blind_features_is_no_leak(tmp_path):
    record = pretext_record("bn", 0)
    record.leakage["pretext"] |= {"same": 1.0, "other": 0.2, "loss": 5.9}
    variants = group([write_run(tmp_path / "bn", record)])
    assert learned().of(variants[0]).mean < BLIND_THRESHOLD
    assert not is_visible_leak(variants[0])
    found = find(variants)
    assert not found.is_leak
    assert plain(found.headline).startswith("Leakage cannot be judged: the run has not learned")


def test_differences_pair_equal_seeds(tmp_path):
    bn, shuffle = group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn"), 3))
    spread = difference(features("knn")[0], shuffle, bn)
    assert (spread.mean, spread.low, spread.high, spread.count) == (
        pytest.approx((0.308 + 0.240 + 0.225) / 3), pytest.approx(0.225), pytest.approx(0.308), 3,
    )  # fmt: skip


def test_without_equal_seeds_the_difference_is_that_of_the_means(tmp_path):
    (bn,) = group(write_pretext_runs(tmp_path, ("bn",), 1))
    other = replace(pretext_record("shuffle_bn", 1), seed=7)
    (shuffle,) = group([write_run(tmp_path / "other", other)])
    spread = difference(features("knn")[0], shuffle, bn)
    assert (spread.mean, spread.count) == (pytest.approx(0.805 - 0.368), 0)
    assert difference(pretext("moved"), shuffle, replace(bn, runs=[])) is None


# ----------------------------------------------------------------------------------------------- finding


def test_the_leak_is_named_with_its_numbers_and_its_loss(tmp_path):
    found = find(group(write_pretext_runs(tmp_path, ALL, 3)))
    assert found.is_leak
    assert plain(found.headline) == (
        "bn leaks: it finds the right key for 50.1 % of the held-out images when a key is encoded with its own batch, "
        "and for 9.5 % when the same key is encoded among other batch-mates: 40.6 points fewer "
        "(31.5–50.3 over 3 seeds)."
    )
    text = said(found)
    assert "pretext loss of 3.27 is well below that of features that tell nothing (6.24, ln 513)" in text
    assert "AUC of 0.743 from key features and 0.735 from query features" in text
    assert "sync_bn (+6.2) as well" in text
    assert "means over 3 seeds" in text


def test_a_penalty_of_the_features_is_said_with_paired_ranges(tmp_path):
    text = said(find(group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn"), 3))))
    assert "Its kNN accuracy is 45.5 %" in text
    assert "in points over pairs of equal seed, by +25.8 (+22.5 to +30.8) (shuffle_bn)" in text
    assert "this leak goes with worse features" in text


def test_no_penalty_is_said_where_there_is_none(tmp_path):
    found = find(group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn"), 1, "plain")))
    assert found.is_leak
    text = said(found)
    assert (
        "Its kNN accuracy is 97.0 %; runs without a leak differ from it, in points, by −1.2 (shuffle_bn_seed0)" in text
    )
    assert "no kNN penalty is visible" in text
    assert "worse features" not in text


@pytest.mark.parametrize(
    ("clean", "words"),
    [
        ((0.50, 0.50, 0.50), "do not resolve whether the leak costs kNN accuracy"),  # above, below, above
        ((0.37, 0.55, 0.43), "no kNN penalty is visible"),
        ((0.30, 0.30, 0.30), "no kNN penalty is visible"),
    ],
)
def test_a_penalty_is_claimed_only_where_every_pair_of_seeds_has_it(tmp_path, clean, words):
    paths = write_pretext_runs(tmp_path, ("bn",), 3)
    for seed, knn in enumerate(clean):
        record = pretext_record("shuffle_bn", seed)
        record.results["precise"]["knn"] = knn
        paths.append(write_run(tmp_path / f"shuffle_bn_seed{seed}", record))
    text = said(find(group(paths)))
    assert words in text
    assert "worse features" not in text


def test_without_a_clean_run_nothing_is_said_of_a_penalty(tmp_path):
    text = said(find(group(write_pretext_runs(tmp_path, ("bn", "gn"), 1))))
    assert "no run without a leak is here to compare it with" in text


def test_a_collapsed_run_is_told_as_such_whatever_its_accuracy(tmp_path):
    text = said(find(group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn", "gn"), 1))))
    assert (
        "gn_seed0 has collapsed or not yet learned: its pretext loss of 5.59 is near that of features that tell "
        in text
    )
    assert "(6.24, ln 513), so its pretext accuracy (95.0 % held-out, 93.3 % in training) says nothing" in text
    assert "gn_seed0 (" not in text.partition("has collapsed")[2]  # takes no part in the comparison of features


def test_some_collapsed_seeds_are_counted(tmp_path):
    records = [pretext_record("shuffle_bn", seed) for seed in range(3)]
    records[1].leakage["pretext"]["loss"] = 6.2
    paths = [write_run(tmp_path / f"a_seed{seed}", record) for seed, record in enumerate(records)]
    text = said(find(group(paths)))
    assert "a has collapsed or not yet learned in 1 of 3 seeds" in text


def test_without_a_leak_the_largest_gap_is_named(tmp_path):
    found = find(group(write_pretext_runs(tmp_path, ("shuffle_bn", "gn"), 1)))
    assert not found.is_leak
    text = plain(found.headline)
    assert text.startswith("No leak is visible: the run does not lose more than 5.0 points of its pretext accuracy")
    assert "largest: shuffle_bn_seed0, −0.8 points" in text


def test_a_small_gap_of_one_sign_in_all_seeds_is_a_trace(tmp_path):
    paths = []
    for seed in range(3):
        record = pretext_record("sync_bn", seed)
        record.leakage["pretext"]["other"] = record.leakage["pretext"]["same"] - 0.01 * (seed + 2)
        paths.append(write_run(tmp_path / f"sync_seed{seed}", record))
    found = find(group(paths))
    assert not found.is_leak
    assert "Small but positive for every seed in sync (+3.0 (+2.0 to +4.0)): a trace" in said(found)


def test_runs_without_a_swap_cannot_be_judged(tmp_path):
    bare = replace(pretext_record("bn", 0), leakage={})
    assert "no finished run has the pretext accuracy" in plain(find(group([write_run(tmp_path / "a", bare)])).headline)


def test_a_baseline_is_compared_by_knn_in_pairs(tmp_path):
    variants = group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn", "sync_bn"), 3))
    text = said(find(variants, of(variants, "shuffle_bn")))
    assert "kNN accuracy under population statistics against shuffle_bn" in text
    assert "bn −25.8 (−30.8 to −22.5)" in text


def test_other_queues_and_views_are_cautioned_against(tmp_path):
    paths = [write_run(tmp_path / "a", pretext_record("bn", 0))]
    other = pretext_record("bn", 0, queue_size=2048)
    other.config["data"]["views"]["style"] = 0.0
    text = " ".join(map(plain, cautions(group([*paths, write_run(tmp_path / "b", other)]))))
    assert "solve different pretext tasks: they differ in model.queue_size" in text
    assert "not measured alike: they differ in data.views.style" in text


# -------------------------------------------------------------------------------- tables, figures, page, console


def test_a_variant_is_described_by_both_encoders(tmp_path):
    assert [describe(item) for item in group(write_pretext_runs(tmp_path, ("bn", "sync_bn", "gn")))] == [
        "MoCo, query bn, key bn, groups of 4",
        "MoCo, query bn, key sync_bn, groups of 4",
        "MoCo, query gn, key gn",
    ]


def test_what_each_encoder_normalizes_together_is_in_the_table(tmp_path):
    table = cost_table(group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn"))))
    assert table.text_heads[2:] == ["normalized together: query", "normalized together: key"]
    assert [row.texts[2:] for row in table.rows] == [
        ["4 images", "4 images"],
        ["4 images", "4 images, drawn at random from 64"],
    ]


def test_the_signature_stands_beside_the_loss_and_the_features(tmp_path):
    accuracy, losses, neighbours = signature_panels(group(write_pretext_runs(tmp_path, ALL, 3)))
    assert "bn: 50.1, 9.5" in accuracy.text
    assert "gn: loss 5.59, tells nothing 6.24" in losses.text
    assert "shuffle_bn: kNN 71.2" in neighbours.text


def test_the_flow_panels_say_gap_probes_and_influence(tmp_path):
    gaps, probes, influence = influence_panels(group(write_pretext_runs(tmp_path, ALL, 3)))
    assert "bn: +40.6; shuffle_bn: −0.7; sync_bn: +6.2" in gaps.text
    assert "bn: key 0.743, query 0.735" in probes.text
    assert "bn: 0.250 + 0" in influence.text


def test_curves_end_with_the_final_evaluation(tmp_path):
    variants = group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn"), 3))
    _, held_out, neighbours, losses = curve_panels(variants)
    assert "bn: pretext/same last 50.1" in held_out.text
    assert "bn: pretext/other last 9.5" in held_out.text
    assert f"bn: last {100 * ((0.368 + 0.565 + 0.431) / 3 + 0.005):.3g}" in neighbours.text  # running averages
    assert losses.note == "dashed grey: features that tell nothing"


def test_the_curve_of_an_unfinished_run_ends_where_it_was_logged(tmp_path):
    record = replace(pretext_record("bn", 0), status="interrupted")
    rows = pretext_rows("bn", 0)[:24]  # to the second validation
    (path,) = [write_run(tmp_path / "late", record, rows)]
    _, held_out, _, _ = curve_panels(group([path]))
    assert f"late: pretext/same last {100 * 0.410 * (1 - math.exp(-2)):.3g}" in held_out.text


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_page_marks_leaks_and_losses_that_tell_nothing(tmp_path, num_seeds):
    page = Page(render(group(write_pretext_runs(tmp_path, ALL, num_seeds))))
    suffix = "" if num_seeds == 3 else "_seed0"
    assert page.cells("headline", f"bn{suffix}")["pretext.gap"]["text"].split()[-1] == "leak"
    assert page.cells("leak", f"gn{suffix}")["probe.key"]["text"] == "n.a."
    assert any("shares no statistics" in attributes.get("title", "") for _, attributes in page.elements)
    assert page.cells("headline", f"gn{suffix}")["pretext.loss"]["text"].endswith("tells nothing")
    assert "“Tells nothing” marks a loss" in page.text
    assert "RoI" not in page.text
    assert "batches None" not in page.text
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") == 6
    assert sum(attributes.get("role") == "img" for _, attributes in page.elements) == 10
    assert page.tables["runs"][1]["cells"]["pretext.loss"]["text"] == "3.41"


def test_paired_ranges_are_under_the_difference_from_a_baseline(tmp_path):
    variants = group(write_pretext_runs(tmp_path, ("bn", "shuffle_bn"), 3))
    cell = Page(render(variants, baseline=variants[0])).cells("headline", "shuffle_bn")["knn.precise"]
    assert cell["text"].split() == ["71.2", "65.6–80.5", "+25.8", "(+22.5", "to", "+30.8)"]


def test_the_console_prints_the_same_numbers(tmp_path, capsys):
    compare(write_pretext_runs(tmp_path, ALL, 1), baseline="bn_seed0")
    text = capsys.readouterr().out
    for words in (
        "36.8",
        "+30.8",
        "+31.5!",
        "5.59?",
        "0.735",
        "drawn at random",
        "ln 513",
        "? near the loss",
        "from bn_seed0",
    ):
        assert words in text
    assert "RoI" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"results": {}, "leakage": {}, "timing": {}, "batch": {}, "environment": {}},
        {"config": {}},
        {"config": {"model": 3, "trainer": None}},
        {"config": {"model": {"query": "bn", "method": ["moco"]}, "data": {"views": {"name": None}}}},
        {"leakage": {"pretext": {"same": 0.5}}},
        {"leakage": {"pretext": {"same": 0.9, "other": 0.1}}, "results": {}},
        {"leakage": {"pretext": {"loss": 6.24, "query_probe": 0.6}, "influence": {"within_group": 0.1}}},
        {"status": "running", "results": {}},
        {"timing": {"steps": None}},
    ],
)
def test_records_with_holes_still_make_a_report(tmp_path, change, capsys):
    broken = write_run(tmp_path / "a", replace(pretext_record("bn", 0), **change), pretext_rows("bn", 0))
    compare([broken])
    compare([broken, *write_pretext_runs(tmp_path, ("gn",), 1)], str(tmp_path / "page.html"))
    Page((tmp_path / "page.html").read_text())
    assert capsys.readouterr().out.count("\na ") >= 2  # its row in both tables
