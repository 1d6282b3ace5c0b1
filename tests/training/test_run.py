"""A run from its config to its record, in this process and over the ranks of the test pool."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leakfree.config import load_config
from leakfree.errors import CheckpointError, RunError
from leakfree.records import read_record
from leakfree.training import Stopped, evaluate, run, train, work
from leakfree.training.detection import DetectionTask
from leakfree.training.module import seed_step
from tests.ranks import run_ranks
from tests.runs import RESUMES, launched, same, stop_at, weights_of


def train_on_two(config_file, folder, *overrides, resume=False):
    overrides = [f"output_dir={folder}", "trainer.num_processes=2", *overrides]
    return run_ranks(launched, 2, "train", config_file, overrides, resume, timeout=120)


def test_the_process_that_only_watches_over_ranks_loads_no_torch():
    code = "import sys, leakfree.training; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stop_stays_one_beside_a_record_that_cannot_be_read(make_config):
    config = make_config()
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "record.json").write_text("{")
    with pytest.raises(Stopped), run._guarded(config):
        raise Stopped("SIGTERM", "step 3 is saved")
    assert "stopped by SIGTERM: step 3 is saved" in (folder / "log.txt").read_text()


def test_a_folder_that_cannot_be_cleared_is_one_line(make_config, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "start_of_training", full)
    with pytest.raises(RunError, match=r"^output_dir: \S+ cannot be read or written \(No space left on device\): make"):
        train(make_config())


# ------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def lively(config_file, tmp_path_factory):
    """Settings under which even untrained metrics move with the statistics: every RoI is some digit's."""
    seed_step(0, 0, 0)
    model = DetectionTask(load_config(config_file), "").model
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
        model.roi_heads.box_predictor.cls_score.bias[0] = -100
    path = tmp_path_factory.mktemp("lively") / "weights.pt"
    torch.save(model.state_dict(), path)
    return [f"model.weights={path}", "optimizer.lr=1e-4", "leakage.enabled=true", "leakage.max_images=8"]


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory, lively):
    """A finished run; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = ["trainer.eval_period=4", "evaluation.statistics=[population,precise,image]", *lively]
    train(load_config(config_file, [f"output_dir={folder}", *settings]))
    return folder, settings


def test_a_run_leaves_everything_in_its_folder(finished, read_rows):
    folder, _ = finished
    record = read_record(folder)
    assert record.status == "finished"
    assert record.name == "run"
    assert record.timing["steps"] == 6
    assert record.timing["seconds"] > record.timing["seconds_per_step"] > record.timing["data_seconds_per_step"] > 0
    assert record.timing["peak_memory_mib"] > 50
    assert record.batch["total"] == 2
    assert record.batch["normalization"]["box head"] == "1 image"
    assert set(record.results) == {"population", "precise", "image"}
    assert 0 <= record.results["population"]["bbox/AP"] <= 1
    assert 0 < record.leakage["roi_accuracy/train"]["population"] < 1
    assert {"influence", "roi_accuracy/train", "roi_accuracy/val", "pairs"} <= set(record.leakage)
    assert (folder / "last_checkpoint").read_text() == "model_final.pt\n"
    assert {path.name for path in folder.glob("*.pt")} == {
        "checkpoint_0000002.pt",
        "checkpoint_0000004.pt",
        "model_final.pt",
    }
    assert not list(folder.glob(".*.tmp"))
    assert load_config(folder / "config.yaml").schedule.max_steps == 6
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == [2, 4, 4, 6]
    assert rows[0]["loss"] == pytest.approx(sum(value for name, value in rows[0].items() if name.startswith("loss_")))
    assert rows[0]["lr"] == pytest.approx(1e-4 * (0.001 * 0.5 + 0.5))  # of the second step, half way up the warm-up
    assert "bbox/AP" in rows[2]
    log = (folder / "log.txt").read_text()
    assert "rank 0 of 1" in log
    assert str(folder / "config.yaml") in log
    assert "2 images in total, 2 per rank; normalized together: box head: 1 image" in log
    assert "step: 6/6" in log
    board = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4, 6]


@pytest.mark.parametrize("stopped", [2, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(finished, tmp_path, config_file, read_rows, stopped):
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "run")
    stop_at(tmp_path / "run", stopped)
    record = train(load_config(config_file, [f"output_dir={tmp_path / 'run'}", *settings]), resume=True)
    assert record.status == "finished"
    assert same(weights_of(tmp_path / "run"), weights_of(folder))
    assert record.results == read_record(folder).results
    assert record.leakage == read_record(folder).leakage
    rows, before = read_rows(tmp_path / "run"), read_rows(folder)
    assert [row["step"] for row in rows] == [row["step"] for row in before]
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in before]
    assert f"continuing from {tmp_path / 'run'}/checkpoint_000000{stopped}.pt" in (tmp_path / "run/log.txt").read_text()
    assert record.timing["steps"] == 6


def test_optimizer_steps_are_exact_after_a_resume(finished, tmp_path, config_file):
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "run")
    stop_at(tmp_path / "run", 4)
    train(load_config(config_file, [f"output_dir={tmp_path / 'run'}", *settings]), resume=True)
    content = torch.load(tmp_path / "run/model_final.pt", weights_only=True)
    assert content["global_step"] == content["leakfree"]["step"] == 6
    assert content["lr_schedulers"][0]["last_epoch"] == 6


def test_the_interval_of_checkpoints_does_not_reach_the_weights(finished, make_config, tmp_path):
    folder, settings = finished
    train(make_config("rare", *settings, "trainer.checkpoint_period=5", "trainer.keep_checkpoints=1"))
    assert same(weights_of(tmp_path / "rare"), weights_of(folder))
    assert {path.name for path in (tmp_path / "rare").glob("*.pt")} == {"checkpoint_0000005.pt", "model_final.pt"}


def test_an_evaluation_that_was_interrupted_goes_on_without_training(finished, tmp_path, config_file, read_rows):
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "run")
    record = json.loads((folder / "record.json").read_text())
    (tmp_path / "run/record.json").write_text(json.dumps({**record, "status": "interrupted", "results": {}}))
    written = (tmp_path / "run/model_final.pt").stat().st_mtime_ns
    resumed = train(load_config(config_file, [f"output_dir={tmp_path / 'run'}", *settings]), resume=True)
    assert resumed.status == "finished"
    assert resumed.results == read_record(folder).results
    assert resumed.timing["seconds"] == read_record(folder).timing["seconds"]
    assert (tmp_path / "run/model_final.pt").stat().st_mtime_ns == written
    assert read_rows(tmp_path / "run") == read_rows(folder)


def test_resuming_a_finished_run_returns_its_record(finished, config_file, capsys):
    folder, settings = finished
    before = (folder / "log.txt").stat().st_size
    record = train(load_config(config_file, [f"output_dir={folder}", *settings]), resume=True)
    assert record == read_record(folder)
    assert "is finished" in capsys.readouterr().out
    assert (folder / "log.txt").stat().st_size == before


def test_frozen_batch_norms_stay_frozen_over_a_resume_and_in_evaluate(make_config, tmp_path):
    settings = ["schedule.freeze_bn_at=0.5", "schedule.freeze_bn_statistics=precise"]
    train(make_config("whole", *settings))
    buffers = [name for name in weights_of(tmp_path / "whole") if "running" in name]
    before, after, end = (
        weights_of(tmp_path / "whole", name)
        for name in ("checkpoint_0000002.pt", "checkpoint_0000004.pt", "model_final.pt")
    )
    assert buffers
    assert all(torch.equal(after[name], end[name]) for name in buffers)
    assert not any(torch.equal(before[name], after[name]) for name in buffers)
    for stopped in (2, 4):  # before and after the switch
        shutil.copytree(tmp_path / "whole", tmp_path / f"stopped{stopped}")
        stop_at(tmp_path / f"stopped{stopped}", stopped)
        train(make_config(f"stopped{stopped}", *settings), resume=True)
        assert same(weights_of(tmp_path / f"stopped{stopped}"), end)
    # frozen layers mix no samples: evaluate knows it from the checkpoint
    measured = ["leakage.enabled=true", "evaluation.statistics=[population]"]
    record = evaluate(make_config("whole", *settings, *measured))
    assert record.leakage["influence"]["total"] == 0.0


def test_sixty_four_bit_training_with_clipped_gradients(make_config, tmp_path):
    settings = [
        "trainer.precision=64-true",
        "optimizer.clip_gradients=0.1",
        "optimizer.name=adamw",
        "schedule.max_steps=2",
        "schedule.decay=cosine",
        "optimizer.weight_decay_norm=0",
    ]
    train(make_config("run", *settings))
    content = torch.load(tmp_path / "run/model_final.pt", weights_only=True)
    assert all(value.dtype == torch.float64 for value in content["state_dict"].values() if value.is_floating_point())
    groups = content["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert len(groups[1]["params"]) == 4  # weight and bias of one batch norm in each head


def test_a_diverging_run_names_the_step_and_the_losses(make_config, tmp_path):
    settings = ["optimizer.lr=1e30", "schedule.warmup_steps=0", "trainer.checkpoint_period=1"]
    with pytest.raises(RunError, match=r"diverged at step \d: loss_classifier is nan.*optimizer\.lr \(now 1e\+30\)"):
        train(make_config("run", *settings))
    assert read_record(tmp_path / "run").status == "interrupted"


def test_a_disk_that_fills_up_loses_nothing(finished, tmp_path, config_file):
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "run")
    stop_at(tmp_path / "run", 2)
    kept = (tmp_path / "run/checkpoint_0000002.pt").read_bytes()
    config = load_config(config_file, [f"output_dir={tmp_path / 'run'}", *settings])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, before[1]))  # checkpoints no longer fit
    try:
        with pytest.raises(RunError, match=r"checkpoint_0000004\.pt: the checkpoint could not be written") as caught:
            train(config, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run/checkpoint_0000002.pt").read_bytes() == kept
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert read_record(tmp_path / "run").status == "interrupted"
    train(config, resume=True)
    assert same(weights_of(tmp_path / "run"), weights_of(folder))


# --------------------------------------------------------------------------------------- evaluate


def test_evaluate_adds_to_the_record_of_a_training(finished, tmp_path, config_file):
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "run")
    asked = [*settings, "evaluation.statistics=[random]", "leakage.enabled=false"]
    record = evaluate(load_config(config_file, [f"output_dir={tmp_path / 'run'}", *asked]))
    before = read_record(folder)
    assert set(record.results) == {"population", "precise", "image", "random"}
    assert record.results["population"] == before.results["population"]
    assert record.leakage == before.leakage
    assert record.timing["steps"] == 6
    assert record.status == "finished"
    assert record.config == before.config  # the run's own: it can still be resumed
    fewer = [*asked, "evaluation.max_images=1"]  # other images: such numbers cannot stand beside the others
    with pytest.raises(RunError, match=r"evaluation\.max_images was 2, now 1; choose another output_dir"):
        evaluate(load_config(config_file, [f"output_dir={tmp_path / 'run'}", *fewer]))


def test_evaluate_loads_a_checkpoint_whole_whatever_a_training_would_start_from(finished, make_config):
    folder, _ = finished
    asked = ["model.weights_parts=[backbone]", f"model.weights={folder / 'model_final.pt'}"]
    record = evaluate(make_config("whole", *asked))
    assert record.results["population"] == read_record(folder).results["population"]


def test_numbers_of_two_checkpoints_are_not_mixed(finished, tmp_path, config_file):
    folder, settings = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "model_final.pt").write_bytes(b"half")
    with pytest.raises(
        RunError, match=r"has numbers of step 6, but its newest undamaged checkpoint is checkpoint_000000"
    ):
        evaluate(load_config(config_file, [f"output_dir={tmp_path / 'run'}", *settings]))


def test_evaluate_of_a_weights_file_equals_the_training_s_own(finished, make_config):
    folder, _ = finished
    record = evaluate(make_config("elsewhere", f"model.weights={folder / 'model_final.pt'}"))
    assert record.results["population"] == read_record(folder).results["population"]
    assert record.timing["steps"] is None
    assert record.status == "finished"
    with pytest.raises(RunError, match="holds the results of an evaluation"):
        train(make_config("elsewhere"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "nothing to evaluate: it is empty, and output_dir"),
        (["model.weights=/no/such/file.pt"], "no file /no/such/file.pt"),
        (["model.weights={folder}/config.yaml"], "cannot be read as a checkpoint"),
        (["model.weights={folder}/model_final.pt", "model.mask_head.enabled=false"], "another model"),
    ],
)
def test_weights_that_cannot_be_evaluated(finished, make_config, overrides, words):
    with pytest.raises(CheckpointError, match=words):
        evaluate(make_config("run", *(text.format(folder=finished[0]) for text in overrides)))


# --------------------------------------------------------------------------------------- two ranks


def test_two_ranks_resume_bitwise_and_keep_statistics_of_their_own(config_file, tmp_path, lively):
    first = train_on_two(config_file, tmp_path / "run", *lively)
    assert first[0][0] == "finished"
    assert first[0] == first[1]
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    stop_at(tmp_path / "stopped", 4)
    assert train_on_two(config_file, tmp_path / "stopped", *lively, resume=True) == first
    assert same(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "run"))
    content = torch.load(tmp_path / "run/model_final.pt", weights_only=True)
    name = "roi_heads.box_head.0.1.running_mean"
    zero, one = (buffers[name] for buffers in content["leakfree"]["rank_buffers"])
    assert not torch.equal(zero, one)
    assert torch.allclose(content["state_dict"][f"model.{name}"], (zero + one) / 2)
    assert (tmp_path / "stopped/log.txt").exists()
    answers = train_on_two(config_file, tmp_path / "run", *lively)
    assert "already holds this run" in answers[0]
    assert answers[0] == answers[1]  # told on every rank, no one waits


def _statistics_seen(rank, world_size, config_file, overrides):
    """Train; return the running means that each evaluation, during training and at its end, has looked at."""
    seen = []

    class Looking(DetectionTask):
        def validate(self, track):
            seen.append(self.model.roi_heads.box_head[0][1].running_mean.clone())
            return super().validate(track)

        def evaluate(self, track):
            seen.append(self.model.roi_heads.box_head[0][1].running_mean.clone())
            return super().evaluate(track)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "DetectionTask", Looking)
        launched(rank, world_size, "train", config_file, overrides, False)
    return seen


def test_every_evaluation_is_of_the_pooled_statistics_that_the_checkpoint_holds(config_file, tmp_path):
    overrides = [f"output_dir={tmp_path / 'run'}", "trainer.num_processes=2", "trainer.eval_period=4"]
    first, second = run_ranks(_statistics_seen, 2, config_file, overrides, timeout=120)
    saved = [
        weights_of(tmp_path / "run", name)["model.roi_heads.box_head.0.1.running_mean"]
        for name in ("checkpoint_0000004.pt", "model_final.pt")
    ]
    for one, two, file in zip(first, second, saved, strict=True):
        assert torch.equal(one, file)
        assert torch.equal(two, file)


@pytest.mark.slow
def test_ctrl_c_then_kill_9_then_the_same_command_is_the_uninterrupted_run(config_file, tmp_path):
    """Two real ranks, stopped twice by signals while they train."""
    long = ["trainer.num_processes=2", "schedule.max_steps=100", "trainer.checkpoint_period=5", "data.num_workers=1"]
    (tmp_path / "again.py").write_text(RESUMES)
    command = [sys.executable, str(tmp_path / "again.py"), str(config_file), f"output_dir={tmp_path / 'run'}", *long]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    newest = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command, start_new_session=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 90
        while not any(int(path.stem[-7:]) > newest for path in (tmp_path / "run").glob("checkpoint_*.pt")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        out, errors = process.communicate(timeout=30)
        newest = max(int(path.stem[-7:]) for path in (tmp_path / "run").glob("checkpoint_*.pt"))
        assert 0 < newest < 100
        if number == signal.SIGINT:
            assert process.returncode == 130
            line = f"interrupted: step {newest} of 100 is saved in {tmp_path / 'run'}; "
            assert errors == line + "the same command with --resume goes on from there\n"
            assert read_record(tmp_path / "run").status == "interrupted"
            assert "starting from the beginning" in out
        else:
            assert "continuing from" in out
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    train_on_two(config_file, tmp_path / "whole", *long[1:3])  # loader processes change nothing either
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_ranks_without_objects_take_part(config_file, tmp_path):
    """All images of all ranks empty, with every norm that communicates: no hang, no NaN."""
    empty = ["data.keep_empty=true", "data.train.digits.objects_per_image=0", "schedule.max_steps=2"]
    for norm in ("BN", "SyncBN", "ShuffleBN"):
        done = train_on_two(
            config_file, tmp_path / norm, *empty, f"model.box_head.norm={norm}", f"model.mask_head.norm={norm}"
        )
        assert done[0][0] == "finished", done
        assert all(value.isfinite().all() for value in weights_of(tmp_path / norm).values())


def test_one_rank_without_objects_takes_part(config_file, tmp_path):
    """Half of the images are empty, one image per rank: some steps have one empty rank."""
    from leakfree.data import build_dataset, build_train_loader

    config = load_config(config_file)
    dataset = build_dataset(config.data, "train")
    source = json.loads((dataset.folder.parent / "instances.json").read_text())
    full = {image["id"] for image in source["images"][:4]}
    source["annotations"] = [item for item in source["annotations"] if item["image_id"] in full]
    (tmp_path / "half.json").write_text(json.dumps(source))
    data = [
        "seed=9",
        "data.train.name=coco",
        f"data.train.images={dataset.folder}",
        f"data.train.annotations={tmp_path}/half.json",
        "data.keep_empty=true",
        "data.val.name=coco",
        f"data.val.images={dataset.folder}",
        f"data.val.annotations={tmp_path}/half.json",
    ]
    config = load_config(config_file, data)
    dataset = build_dataset(config.data, "train")
    counts = [
        [
            len(target["boxes"])
            for _, (target,) in build_train_loader(
                dataset, config.data, images_per_rank=1, rank=rank, world_size=2, seed=config.seed, max_steps=6
            )
        ]
        for rank in range(2)
    ]
    assert any(not zero and one for zero, one in zip(*counts, strict=True))
    assert any(zero and not one for zero, one in zip(*counts, strict=True))
    done = train_on_two(config_file, tmp_path / "run", *data)
    assert done[0][0] == "finished", done
    # the mask head saw rows in the steps with objects only, on each rank by itself
    saw = [sum(count > 0 for count in rank) for rank in counts]
    assert saw == [4, 2]  # with rank 0's buffers broadcast in every step, rank 1 would end with 4
    content = torch.load(tmp_path / "run/model_final.pt", weights_only=True)
    name = "roi_heads.mask_head.0.1.num_batches_tracked"
    assert [int(buffers[name]) for buffers in content["leakfree"]["rank_buffers"]] == saw
    assert content["state_dict"][f"model.{name}"] == max(saw)


def test_evaluation_over_two_ranks_equals_one_process(finished, config_file, tmp_path):
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"model.weights={finished[0] / 'model_final.pt'}",
        "trainer.num_processes=2",
    ]
    (status, results), other = run_ranks(launched, 2, "evaluate", config_file, overrides, False, timeout=120)
    assert status == "finished"
    assert results == other[1]
    assert results["population"] == read_record(finished[0]).results["population"]
