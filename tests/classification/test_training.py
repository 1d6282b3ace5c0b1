"""Classification runs from their configs to their records: all norms, resuming, ranks, and what is told of mistakes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leakfree.config import load_config
from leakfree.data import build_images
from leakfree.errors import CheckpointError, ConfigError, DataError
from leakfree.norms import BatchRenorm, CrossIterationBatchNorm
from leakfree.records import read_metrics, read_record
from leakfree.schedules import burn_in_steps, renorm_ramp
from leakfree.sealed import read_checkpoint
from leakfree.state import load_weights
from leakfree.training import evaluate, train, work
from leakfree.training.classification import ClassificationTask
from tests.ranks import run_ranks
from tests.runs import launched, same, stop_at, weights_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs/classification").glob("digits_*.yaml"))
MBN = ["model.norm=MBN", "schedule.double_forward=true"]


def test_a_run_leaves_curves_and_numbers_in_its_folder(make_config, tmp_path):
    record = train(make_config("run", "trainer.eval_period=4"))
    assert (record.status, record.task) == ("finished", "classification")
    assert record.batch == {"total": 80, "per_rank": 80, "normalization": {"model": "8 images"}}
    assert list(record.results) == ["population", "precise", "random", "same_class"]
    assert set(record.leakage) == {"composition", "influence"}
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 4, 6]
    assert 0 < rows[0]["accuracy"] < 1
    assert rows[0]["loss"] == rows[0]["loss_classifier"]
    curves = {"val_accuracy/population", "val_accuracy/random", "val_accuracy/same_class"}
    assert curves < set(rows[2])
    assert load_config(tmp_path / "run" / "config.yaml").schedule.max_steps == 6
    again = evaluate(make_config("run", "trainer.eval_period=4", "evaluation.statistics=[population]"))
    assert again.results == record.results


@pytest.mark.parametrize(
    "settings",
    [
        ["data.composition=same_class", "data.min_crop=0.5", "data.flip=0.5"],
        ["model.norm=ShuffleBN"],
        MBN,
        ["model.norm=CBN", "schedule.burn_in=0.4"],
        ["model.norm=BatchRenorm"],
        ["schedule.freeze_bn_at=0.5"],
        ["schedule.freeze_bn_at=3", "schedule.freeze_bn_unit=step"],
        ["schedule.freeze_bn_at=0.2", "schedule.freeze_bn_unit=epoch"],
    ],
    ids=["BN", "ShuffleBN", "MBN", "CBN", "BatchRenorm", "freeze", "freeze at a step", "freeze at an epoch"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_config, tmp_path, settings):
    whole = train(make_config("whole", *settings))
    for stopped in (2, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / f"cut{stopped}")
        stop_at(tmp_path / f"cut{stopped}", stopped)
        record = train(make_config(f"cut{stopped}", *settings), resume=True)
        assert same(weights_of(tmp_path / f"cut{stopped}"), weights_of(tmp_path / "whole"))
        assert record.results == whole.results
        assert record.leakage == whole.leakage


@pytest.mark.parametrize(("at", "unit"), [(0.5, "share"), (3, "step"), (0.2, "epoch")])
def test_batch_norms_freeze_at_a_share_a_step_or_an_epoch(make_config, tmp_path, at, unit):
    """An epoch of the 1,200 training digits is 15 steps of 80 images; the run has 6."""
    settings = [f"schedule.freeze_bn_at={at}", f"schedule.freeze_bn_unit={unit}", "trainer.checkpoint_period=1"]
    assert len(build_images(make_config().data, "train")) == 1200
    train(make_config("run", *settings, "leakage.enabled=false", "evaluation.statistics=[population]"))
    names = [f"checkpoint_{step:07d}.pt" for step in range(1, 6)]
    states = [read_checkpoint(tmp_path / "run" / name)["leakfree"]["freeze_bn"] for name in names]
    assert [state["frozen_at"] for state in states] == [None, None, None, 3, 3]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_a_step_and_is_measured(path, tmp_path):
    short = [
        "schedule.max_steps=1",
        "schedule.warmup_steps=0",
        "trainer.num_threads=1",
        "evaluation.precise_images=160",
    ]
    small = ["evaluation.max_images=64", "leakage.influence_batches=1", "leakage.influence_probes=2"]
    frozen = ["schedule.freeze_bn_at=1.0"] if load_config(path).schedule.freeze_bn_at < 1 else []
    record = train(load_config(path, [f"output_dir={tmp_path}/run", *short, *small, *frozen]))
    assert record.status == "finished"
    config = load_config(path)
    assert list(record.results) == config.evaluation.statistics
    values = {kind: values["accuracy"] for kind, values in record.results.items() if values}
    assert {"precise", "embeddings"} & values.keys()
    assert all(0 <= value <= 1 for value in values.values())
    mixes = record.results.get("random") != {}
    assert (record.leakage["influence"]["total"] > 0) == mixes
    assert mixes == (path.stem.split("_")[1] not in ("GN", "LN", "IN", "PN", "ProxyNorm"))


def test_there_is_a_config_for_every_norm():
    named = {load_config(path).model.norm for path in CONFIGS}
    assert {"BN", "SyncBN", "GhostBN", "ShuffleBN", "BatchStatBN", "BatchRenorm", "BGN", "CBN", "MBN", "IEBN"} < named
    assert {"DomainBN", "GN", "LN", "IN", "PN", "ProxyNorm"} < named
    measured = {kind for path in CONFIGS for kind in load_config(path).evaluation.statistics}
    assert {"target", "embeddings"} < measured
    assert any(load_config(path).schedule.freeze_bn_at < 1 for path in CONFIGS)


# --------------------------------------------------------------------------------- what norms want of a run


def task_after(make_config, *settings, monkeypatch):
    """The task of a run, as its training left it."""
    tasks = []

    class Kept(ClassificationTask):
        def __init__(self, *args):
            super().__init__(*args)
            tasks.append(self)

    monkeypatch.setattr(work, "ClassificationTask", Kept)
    train(make_config("run", *settings, "leakage.enabled=false", "evaluation.statistics=[population]"))
    return tasks[0]


@pytest.mark.parametrize("scaled", [True, False])
def test_ramps_follow_the_length_of_the_run(make_config, monkeypatch, scaled):
    switch = f"schedule.scale_ramps={str(scaled).lower()}"
    task = task_after(make_config, "model.norm=BatchRenorm", switch, monkeypatch=monkeypatch)
    layer = next(module for module in task.model.modules() if isinstance(module, BatchRenorm))
    assert layer.ramp == (renorm_ramp(6) if scaled else (5_000, 25_000, 40_000))


@pytest.mark.parametrize("scaled", [True, False])
def test_the_burn_in_follows_the_length_of_the_run(make_config, monkeypatch, scaled):
    options = [] if scaled else ["schedule.scale_ramps=false", "model.norm_options={burn_in: 1}"]
    task = task_after(make_config, "model.norm=CBN", *options, monkeypatch=monkeypatch)
    layer = next(module for module in task.model.modules() if isinstance(module, CrossIterationBatchNorm))
    assert layer.burn_in == (burn_in_steps(6) if scaled else 1)


def test_double_forward_makes_the_memory_that_of_the_new_weights(make_config, tmp_path):
    single = ["schedule.max_steps=1", "schedule.warmup_steps=0", "trainer.checkpoint_period=1"]
    train(make_config("once", *MBN[:1], *single))
    train(make_config("twice", *MBN, *single))
    once, twice = weights_of(tmp_path / "once"), weights_of(tmp_path / "twice")
    trained = [name for name in once if "running" not in name and "memory" not in name]
    assert same({name: once[name] for name in trained}, {name: twice[name] for name in trained})
    assert torch.equal(once["model.features.1.memory_count"], twice["model.features.1.memory_count"])
    assert not torch.equal(once["model.features.4.memory_mean"][0], twice["model.features.4.memory_mean"][0])
    with pytest.raises(ConfigError, match=r"schedule\.double_forward: the model has no MBN"):
        train(make_config("none", "schedule.double_forward=true"))


def test_a_checkpoint_of_bn_starts_a_run_of_another_norm(make_config, tmp_path):
    train(make_config("BN"))
    weights = tmp_path / "BN" / "model_final.pt"
    for norm in ("MBN", "CBN", "ShuffleBN"):
        task = ClassificationTask(make_config("other", f"model.norm={norm}"), str(weights))
        state = task.model.state_dict()
        own = weights_of(tmp_path / "BN")
        assert all(torch.equal(state[name.removeprefix("model.")], value) for name, value in own.items())
    model = ClassificationTask(make_config("other", "model.norm=none")).model
    with pytest.raises(CheckpointError, match="another model"):
        load_weights(model, str(weights))


# --------------------------------------------------------------------------------------------- mistakes


def test_a_folder_of_images_trains_and_its_mistakes_are_told(make_config, tmp_path):
    rng = np.random.default_rng(0)
    for split, names in (("train", "ab"), ("val", "ab"), ("other", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.jpg")
    folders = [f"data.root={tmp_path}", "data.train.noise=0", "data.val.noise=0"]
    for split in ("train", "val"):
        folders += [f"data.{split}.name=image_folder", f"data.{split}.path={split}"]
    settings = [*folders, "trainer.total_batch_size=4", "model.images_per_group=2", "schedule.max_steps=2",
                "schedule.warmup_steps=0", "data.image_size=16"]  # fmt: skip
    record = train(make_config("run", *settings))
    assert record.status == "finished"
    assert weights_of(tmp_path / "run")["model.fc.weight"].shape[0] == 2
    with pytest.raises(DataError, match=r"data\.val: .*'b' is only in data\.train \(2 classes in train, 2 in val\)"):
        ClassificationTask(make_config("wrong", *settings, "data.val.path=other"))
    with pytest.raises(ConfigError, match=r"model\.num_classes: is 1, but the training data has 2"):
        ClassificationTask(make_config("wrong", *settings, "model.num_classes=1"))
    (tmp_path / "train/a/0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.train: .*a/0\.jpg: broken image file"):
        train(make_config("broken", *settings))


# --------------------------------------------------------------------------------------------- two ranks


@pytest.mark.parametrize("settings", [[], MBN], ids=["BN", "MBN"])
def test_two_ranks_train_evaluate_and_resume_bitwise(config_file, tmp_path, settings):
    def run(name, resume=False):
        overrides = [f"output_dir={tmp_path / name}", "trainer.num_processes=2", *settings]
        return run_ranks(launched, 2, "train", str(config_file), overrides, resume, timeout=120)

    first = run("run")
    assert first[0][0] == "finished"
    assert first[0] == first[1]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    stop_at(tmp_path / "cut", 4)
    assert run("cut", resume=True) == first
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "run"))
    assert read_record(tmp_path / "run").batch["per_rank"] == 40
