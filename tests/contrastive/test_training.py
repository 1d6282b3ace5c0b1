"""Contrastive runs from their configs to their records: resuming, ranks, signals, the evaluate command."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from leakfree.cli import main
from leakfree.config import load_config
from leakfree.contrastive import build_contrastive
from leakfree.errors import ConfigError
from leakfree.records import read_metrics, read_record
from leakfree.training import evaluate, train
from leakfree.training.contrastive import ContrastiveTask
from tests.contrastive.conftest import MakeConfig
from tests.ranks import run_ranks
from tests.runs import RESUMES, launched, same, stop_at, weights_of

ROOT = Path(__file__).parents[2]
CONFIGS = [path for path in sorted((ROOT / "configs/contrastive").rglob("*.yaml")) if path.stem != "base"]
QUIET = ["leakage.enabled=false", "evaluation.statistics=[population]"]


def test_a_run_leaves_curves_and_numbers_in_its_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    record = train(make_config("run", "trainer.eval_period=4"))
    assert (record.status, record.task) == ("finished", "contrastive")
    assert record.batch == {"total": 24, "per_rank": 24, "normalization": {"query": "4 images", "key": "4 images"}}
    assert list(record.results) == ["population", "precise"]
    for numbers in record.results.values():
        assert set(numbers) == {"knn", "knn_few", "linear"}
        assert all(0 < value < 1 for value in numbers.values() if value is not None)
    assert record.results["population"] != record.results["precise"]
    assert set(record.leakage) == {"pretext", "influence"}
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 4, 6]
    assert rows[0]["loss"] == rows[0]["loss_contrast"]
    assert 0 <= rows[0]["pretext"] <= 1
    assert {"knn", "pretext/same", "pretext/other"} < set(rows[2])
    state = weights_of(tmp_path / "run")
    assert int(state["model.queue_pointer"]) == 6 * 24 % 40
    assert load_config(tmp_path / "run" / "config.yaml").schedule.max_steps == 6


WORDS = {
    "shuffle_bn": ["model.key=shuffle_bn"],
    "loader_shuffle": ["model.key=loader_shuffle", "data.views.name=moco_v2", "data.num_workers=2", *QUIET],
    "eman": ["model.key=eman", "model.momentum_end=1.0", *QUIET],
    "copy": ["model.teacher_statistics=copy", *QUIET],
    "simclr": [
        "model.method=simclr",
        "model.key=shuffle_images",
        "optimizer.name=lars",
        "trainer.precision=bf16-mixed",
    ],
    "frozen": ["schedule.freeze_bn_at=0.5", *QUIET],
}


@pytest.mark.parametrize("word", WORDS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_config: MakeConfig, tmp_path: Path, word: str) -> None:
    settings = WORDS[word]
    whole = train(make_config("whole", *settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    stop_at(tmp_path / "cut", 2)
    record = train(make_config("cut", *settings), resume=True)
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))
    assert record.results == whole.results
    assert record.leakage == whole.leakage
    losses = [[row.get("loss") for row in read_metrics(tmp_path / name)] for name in ("cut", "whole")]
    assert losses[0] == losses[1]
    contents = [torch.load(tmp_path / name / "model_final.pt", weights_only=True) for name in ("whole", "cut")]
    one, two = (content["optimizer_states"][0]["state"] for content in contents)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key]["momentum_buffer"], two[key]["momentum_buffer"]) for key in one)


def test_evaluating_during_training_does_not_reach_the_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = ["model.key=shuffle_bn", *QUIET]
    train(make_config("seldom", *settings))
    train(make_config("often", *settings[:1], "trainer.eval_period=1", "trainer.checkpoint_period=3"))
    assert same(weights_of(tmp_path / "seldom"), weights_of(tmp_path / "often"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_digits_trains_a_step_and_is_measured(path: Path, tmp_path: Path) -> None:
    if "digits" not in str(path.relative_to(ROOT)):
        pytest.skip("its data are not here")
    short = ["schedule.max_steps=1", "schedule.warmup_steps=0", "trainer.num_threads=1", "trainer.num_processes=1"]
    small = ["evaluation.precise_images=64", "evaluation.max_images=100", "leakage.max_images=256"]
    probes = ["leakage.influence_batches=1", "leakage.influence_probes=2"]
    frozen = ["schedule.freeze_bn_at=1.0"] if load_config(path).schedule.freeze_bn_at < 1 else []
    record = train(load_config(path, [f"output_dir={tmp_path}/run", *short, *small, *probes, *frozen]))
    assert record.status == "finished"
    assert 0 <= record.results["population"]["knn"] <= 1  # type: ignore[operator]


# -------------------------------------------------------------------------------------------- evaluate


def test_the_evaluate_command_finds_the_training_s_numbers(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = train(make_config("run", "model.key=shuffle_bn"))
    config = str(tmp_path / "run" / "config.yaml")
    elsewhere = [f"output_dir={tmp_path}/other", f"model.weights={tmp_path}/run/model_final.pt"]
    assert main(["evaluate", "--config-file", config, *elsewhere]) == 0
    other = read_record(tmp_path / "other")
    assert other.results == record.results
    assert other.leakage == record.leakage
    assert main(["evaluate", "--config-file", config, "evaluation.statistics=[precise]"]) == 0
    again = read_record(tmp_path / "run")
    assert again.results == record.results
    assert again.leakage == record.leakage
    capsys.readouterr()
    wrong = [*elsewhere[1:], f"output_dir={tmp_path}/wrong", "model.feature_dim=8"]
    assert main(["evaluate", "--config-file", config, *wrong]) == 2
    assert "is a checkpoint of another model" in capsys.readouterr().err
    assert main(["evaluate", "--config-file", config, f"output_dir={tmp_path}/none"]) == 2
    assert "nothing to evaluate" in capsys.readouterr().err


def test_weights_start_a_run_of_another_word(make_config: MakeConfig, tmp_path: Path) -> None:
    """One checkpoint of plain batch norms goes with every word that shares statistics."""
    train(make_config("run", *QUIET))
    weights = [
        f"model.weights={tmp_path}/run/model_final.pt",
        *QUIET,
        "schedule.max_steps=1",
        "schedule.warmup_steps=0",
    ]
    for word in ("sync_bn", "shuffle_images", "eman"):
        assert train(make_config(word, f"model.key={word}", *weights)).status == "finished"
    part = ["model.weights_parts=[query.backbone]", "model.freeze=[query.backbone]", "model.head=mlp"]
    train(make_config("frozen", *weights, *part))
    one, two = weights_of(tmp_path / "run"), weights_of(tmp_path / "frozen")
    backbone = [name for name in one if name.startswith("model.query.backbone.")]
    assert all(torch.equal(one[name], two[name]) for name in backbone)
    with pytest.raises(
        ConfigError, match=r"model\.freeze: the model has no part 'backbone'; choose from .*query\.backbone"
    ):
        train(make_config("wrong", *weights, "model.freeze=[backbone]"))


# -------------------------------------------------------------------------------------------- two ranks


def on_two(config_file: Path, folder: Path, *settings: str, resume: bool = False) -> list[Any]:
    overrides = [f"output_dir={folder}", "trainer.num_processes=2", *settings]
    return run_ranks(launched, 2, "train", str(config_file), overrides, resume, timeout=120)


@pytest.mark.parametrize("word", ["bn", "loader_shuffle", "eman"])
def test_two_ranks_train_evaluate_and_resume_bitwise(config_file: Path, tmp_path: Path, word: str) -> None:
    settings = [f"model.key={word}", "model.images_per_group=0"]
    first = on_two(config_file, tmp_path / "run", *settings)
    assert first[0][0] == "finished", first
    assert first[0] == first[1]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    stop_at(tmp_path / "cut", 2)
    assert on_two(config_file, tmp_path / "cut", *settings, resume=True) == first
    assert same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "run"))
    assert read_record(tmp_path / "cut").leakage == read_record(tmp_path / "run").leakage
    contents = [torch.load(tmp_path / name / "model_final.pt", weights_only=True) for name in ("run", "cut")]
    own, theirs = (content["leakfree"]["rank_buffers"] for content in contents)
    for mine, other in zip(own, theirs, strict=True):
        assert same(mine, other)
    differ = set(own[0])
    assert any("running_mean" in name for name in differ) == (word != "eman")
    assert not any("queue" in name for name in differ)  # the ranks' queues are one


def test_evaluation_over_two_ranks_is_that_of_one_process(
    config_file: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config("run", "model.key=shuffle_bn"))
    weights = ["model.key=shuffle_bn", f"model.weights={tmp_path}/run/model_final.pt"]
    alone = evaluate(make_config("alone", *weights))
    overrides = [f"output_dir={tmp_path}/two", "trainer.num_processes=2", *weights]
    found = run_ranks(launched, 2, "evaluate", str(config_file), overrides, False, timeout=120)
    assert found[0] == found[1]
    for mode, numbers in alone.results.items():
        assert found[0][1][mode] == pytest.approx(numbers, abs=0.02), mode
    two = read_record(tmp_path / "two").leakage
    assert two["pretext"] == pytest.approx(alone.leakage["pretext"], rel=1e-3, abs=1e-3)
    assert two["influence"] == pytest.approx(alone.leakage["influence"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGKILL)], ids=["ctrl-c", "kill -9"])
def test_a_run_stopped_by_a_signal_goes_on_as_if_it_had_not_been(
    config_file: Path, make_config: MakeConfig, tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    """Processes of their own that load with others; then the same command, here without loader processes."""
    long = ["model.key=shuffle_bn", "schedule.max_steps=40", "trainer.checkpoint_period=2", "trainer.log_period=50"]
    long += [*QUIET, f"trainer.num_processes={ranks}"]
    (tmp_path / "again.py").write_text(RESUMES)
    command = [sys.executable, str(tmp_path / "again.py"), str(config_file), f"output_dir={tmp_path}/run", *long]
    told = tmp_path / "told.txt"  # a file: loader processes that outlive a killed rank would hold a pipe open
    with told.open("w") as file:
        process = subprocess.Popen(
            [*command, "data.num_workers=2"],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint_*.pt")):
        assert process.poll() is None, told.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.wait(timeout=60)
    assert not (tmp_path / "run" / "model_final.pt").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130, told.read_text()
        assert "the same command with --resume goes on from there" in told.read_text()
    if ranks == 1:
        record = train(make_config("run", *long), resume=True)
        assert record.results == train(make_config("whole", *long)).results
    else:
        first = on_two(config_file, tmp_path / "run", *long, resume=True)
        assert first[0][0] == "finished", first
        assert first == on_two(config_file, tmp_path / "whole", *long)
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize("parts", [["query"], ["query.backbone"], ["query.backbone", "key.head"]])
def test_a_key_encoder_starts_as_the_query_encoder_where_only_that_is_loaded(
    make_config: MakeConfig, tmp_path: Path, parts: list[str]
) -> None:
    torch.manual_seed(1)
    torch.save(build_contrastive(make_config("source")).state_dict(), tmp_path / "source.pt")
    source = torch.load(tmp_path / "source.pt", weights_only=True)
    model = ContrastiveTask(make_config("other"), str(tmp_path / "source.pt"), parts).model
    for name, value in model.state_dict().items():
        if name.startswith("key."):
            given = name.startswith("key.backbone.") or "query" in parts or "key.head" in parts
            assert torch.equal(value, source[name]) == (given or torch.equal(value, torch.zeros_like(value))), name
    assert not torch.equal(model.state_dict()["queue"], source["queue"])
