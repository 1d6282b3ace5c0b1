"""Who may write into an output folder, and where a run in it goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leakfree.config import config_to_dict
from leakfree.config.schema import DetectionRunConfig
from leakfree.errors import CheckpointError, RunError
from leakfree.records import RunRecord, read_record, write_record
from leakfree.sealed import write_checkpoint
from leakfree.training import RankError, Stopped
from leakfree.training.checkpoints import FINAL, checkpoint_name
from leakfree.training.folder import (
    Start,
    interrupted_record,
    start_of_evaluation,
    start_of_training,
)


@pytest.fixture
def config(tmp_path):
    config = DetectionRunConfig(output_dir=str(tmp_path))
    config.schedule.max_steps = 30
    return config


def leave(folder, config, *steps, status="running", trained=True, world_size=1):
    """Write what a run has left behind."""
    record = RunRecord(
        name="run",
        task="detection",
        status=status,
        seed=0,
        config=config_to_dict(config),
        environment={"world_size": world_size},
        timing={"steps": max(steps, default=0) if trained else None},
    )
    write_record(folder, record)
    for step in steps:
        name = FINAL if step == config.schedule.max_steps else checkpoint_name(step)
        write_checkpoint({"leakfree": {}, "x": torch.zeros(10)}, folder / name)


def begin(config, folder, *, resume=True, world_size=1):
    return start_of_training(config, folder, world_size, resume=resume)


def test_an_empty_folder_starts_from_the_beginning_and_resume_says_so(config, tmp_path):
    assert begin(config, tmp_path, resume=False) == Start()
    start = begin(config, tmp_path)
    assert (start.step, start.weights) == (0, "")
    assert start.notices == (f"--resume: {tmp_path} holds no checkpoint, starting from the beginning",)


def test_a_start_without_a_checkpoint_leaves_nothing_to_protect(config, tmp_path):
    leave(tmp_path, config)
    (tmp_path / "metrics.json").write_text('{"step": 1}\n')
    (tmp_path / ".checkpoint_0000010.pt.x.tmp").write_text("half")
    config.seed = 1
    assert begin(config, tmp_path, resume=False) == Start()
    assert (tmp_path / "metrics.json").read_text() == ""
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_resume_goes_on_from_the_newest_checkpoint_and_drops_later_rows(config, tmp_path):
    leave(tmp_path, config, 10, 20)
    rows = [{"step": step, "loss": 1.5} for step in (5, 10, 15, 20, 20, 25)]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    start = begin(config, tmp_path)
    assert (start.step, Path(start.weights).name, start.finished) == (20, "checkpoint_0000020.pt", False)
    kept = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert kept == rows[:5]
    leave(tmp_path, config, 30)
    assert begin(config, tmp_path).step == 30  # what remains is the evaluation
    leave(tmp_path, config, status="finished")
    assert begin(config, tmp_path).finished


def test_work_is_never_overwritten(config, tmp_path):
    leave(tmp_path, config, 10)
    with pytest.raises(
        RunError, match=r"already holds this run \(stopped, newest checkpoint_0000010.pt\); add --resume"
    ):
        begin(config, tmp_path, resume=False)
    leave(tmp_path, config, 10, status="finished")
    with pytest.raises(RunError, match=r"already holds this run \(finished\); choose another output_dir"):
        begin(config, tmp_path, resume=False)
    (tmp_path / "record.json").unlink()
    with pytest.raises(RunError, match=r"holds checkpoints but no record\.json"):
        begin(config, tmp_path)
    leave(tmp_path, config, status="finished", trained=False)
    with pytest.raises(RunError, match="holds the results of an evaluation"):
        begin(config, tmp_path)


@pytest.mark.parametrize("resume", [True, False])
def test_another_config_is_refused_by_its_keys(config, tmp_path, resume):
    leave(tmp_path, config, 10)
    config.optimizer = replace(config.optimizer, lr=0.5)
    config.model.box_head.norm = "GN"
    with pytest.raises(RunError) as caught:
        begin(config, tmp_path, resume=resume)
    assert "optimizer.lr was 0.02, now 0.5" in str(caught.value)
    assert "model.box_head.norm was 'none', now 'GN'" in str(caught.value)


def test_settings_that_do_not_reach_the_weights_may_change(config, tmp_path):
    leave(tmp_path, config, 10)
    config.trainer = replace(config.trainer, num_threads=3, log_period=1, checkpoint_period=7, num_gpus=1)
    config.data.num_workers = 5
    config.output_dir = f"{tmp_path}/."
    assert begin(config, tmp_path).step == 10


def test_another_number_of_ranks_is_refused_with_the_reason(config, tmp_path):
    leave(tmp_path, config, 10, world_size=2)
    with pytest.raises(RunError, match=r"started on 2 ranks and cannot go on with 4: .* 4 images in place of 8"):
        begin(config, tmp_path, world_size=4)
    leave(tmp_path, config, 10, world_size="2")
    with pytest.raises(RunError, match=r"environment\.world_size: expected a number of ranks, got '2'"):
        begin(config, tmp_path, world_size=4)
    config.model.mask_head.norm = "MBN"
    leave(tmp_path, config, 10, world_size=2)
    with pytest.raises(RunError, match=r"use 2 ranks again\. It cannot be converted: model\.backbone\.norm: BN norm"):
        start_of_training(config, tmp_path, 4, resume=True, convert_ranks=True)


def test_a_damaged_checkpoint_is_passed_over_loudly(config, tmp_path):
    leave(tmp_path, config, 10, 20)
    (tmp_path / checkpoint_name(20)).write_bytes(b"half")
    start = begin(config, tmp_path)
    assert start.step == 10
    assert "checkpoint_0000020.pt is damaged" in start.notices[0]


def test_only_a_running_record_is_marked_interrupted(config, tmp_path):
    interrupted_record(tmp_path)
    assert not list(tmp_path.iterdir())
    for status, after in (("running", "interrupted"), ("finished", "finished")):
        leave(tmp_path, config, status=status)
        interrupted_record(tmp_path)
        assert read_record(tmp_path).status == after


def begun(started, ended=""):
    return {"started": started, "from_step": 0, "host": "node7", "job": "", "world_size": 1, "ended": ended}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (Stopped("SIGTERM", "step 3 of 9 is saved in run"), "stopped by SIGTERM"),
        (RankError("rank 1 failed. Its traceback:\nTraceback"), "failed: rank 1 failed. Its traceback:"),
        (ValueError(), "failed: ValueError"),
    ],
)
def test_a_session_tells_how_it_ended_and_keeps_what_others_told(config, tmp_path, error, words):
    for sessions, ended in (
        ([begun(100.0), begun(200.0)], ["", words]),
        ([begun(100.0), begun(150.0)], ["", ""]),  # killed; the work that ended now never got to its record
        ([begun(200.0, "finished")], ["finished"]),
        ([], []),
    ):
        leave(tmp_path, config)
        record = read_record(tmp_path)
        record.sessions = sessions
        write_record(tmp_path, record)
        interrupted_record(tmp_path, error, since=180.0)
        assert read_record(tmp_path).status == "interrupted"
        assert [session["ended"] for session in read_record(tmp_path).sessions] == ended


def test_sessions_go_on_also_where_they_left_no_checkpoint(config, tmp_path):
    leave(tmp_path, config)
    record = read_record(tmp_path)
    record.sessions = [begun(100.0)]
    write_record(tmp_path, record)
    assert begin(config, tmp_path).sessions == (begun(100.0),)
    config.trainer.num_threads = 2
    assert begin(config, tmp_path).sessions == (begun(100.0),)
    leave(tmp_path, config, 10)
    record.timing["steps"] = 10
    write_record(tmp_path, record)
    start = begin(config, tmp_path)
    assert start.sessions == (begun(100.0),)
    assert "on node7) ended without a word: killed, or its machine died" in start.notices[0]
    (tmp_path / checkpoint_name(10)).unlink()
    config.seed = 5  # another run, which may have the folder
    assert begin(config, tmp_path) == Start(notices=begin(config, tmp_path).notices)


def test_evaluation_takes_the_folder_s_own_weights_or_those_it_is_given(config, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to evaluate: it is empty"):
        start_of_evaluation(config, tmp_path)
    config.model.weights = "pretrained.pt"
    assert start_of_evaluation(config, tmp_path).weights == "pretrained.pt"
    leave(tmp_path, config)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        start_of_evaluation(config, tmp_path)
    leave(tmp_path, config, 10, 30)
    config.evaluation.statistics = ["image"]
    start = start_of_evaluation(config, tmp_path)  # the training started from pretrained.pt; its result is meant
    assert (start.weights, start.step) == (str(tmp_path / FINAL), 30)
    config.model.weights = str(tmp_path / FINAL)
    assert start_of_evaluation(config, tmp_path).weights == str(tmp_path / FINAL)
    config.model.weights = str(tmp_path / checkpoint_name(10))
    with pytest.raises(RunError, match=r"whose record is about model_final.pt; to evaluate .* choose another"):
        start_of_evaluation(config, tmp_path)
    config.model.box_head.norm = "GN"
    with pytest.raises(RunError, match=r"another config: model\.box_head\.norm"):
        start_of_evaluation(config, tmp_path)
