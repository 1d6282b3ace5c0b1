"""Runs as jobs of a real two-node cluster: what they compute, what they say, and how they come back."""

import json
import os
import stat

import pytest

from leakfree.cli import main
from tests.launch import stand_in
from tests.launch.jobs import TWO_NODES, launched
from tests.runs import same, weights_of


def refused(capsys, tmp_path, here, *words):
    before = here.run("squeue", "--noheader", "--states=all")
    (tmp_path / "tiny.yaml").write_text("task: classification\n")
    line = ["launch", "--config-file", str(tmp_path / "tiny.yaml"), f"output_dir={tmp_path / 'run'}"]
    assert main([*line, "--log-dir", str(tmp_path / "jobs"), *words]) == 2
    assert here.run("squeue", "--noheader", "--states=all") == before
    assert not (tmp_path / "run").exists()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_a_typo_waits_in_no_queue(capsys, tmp_path, here):
    assert "no partition 'mian'; there are: main" in refused(
        capsys, tmp_path, here, "--time", "5", "--partition", "mian"
    )
    assert "is more than the 01:00:00" in refused(capsys, tmp_path, here, "--time", "61")
    assert "optimizer.lrr" in refused(capsys, tmp_path, here, "--time", "5", "optimizer.lrr=1")
    assert "sbatch refuses: unrecognized option '--exlude=n1'" in refused(
        capsys, tmp_path, here, "--time", "5", "--sbatch", "exlude=n1"
    )
    assert list((tmp_path / "jobs").iterdir()) == []


def test_two_nodes_compute_what_two_local_ranks_compute(capsys, tmp_path, here):
    (job,) = launched(here, tmp_path, *TWO_NODES[:-1], "2", "--env", "A_WORD=of mine", "--setup", "echo set up $A_WORD")
    shown = capsys.readouterr().out
    assert f"submitted job {job.job_id}: 1 run, 2 x 1 ranks (CPU)" in shown
    assert f"scancel {job.job_id}" in shown
    local = ["train", "--config-file", str(tmp_path / "tiny.yaml"), "--num-processes", "2"]
    assert main([*local, f"output_dir={tmp_path / 'local'}", "trainer.num_threads=2"]) == 0
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "0"}
    assert same(weights_of(job.folder), weights_of(tmp_path / "local"))
    log = job.log()
    assert "set up of mine" in log
    assert "preflight: 2 ranks on 2 machines (n1, n2), 2 CPUs each, all-reduce in" in log
    assert "2 threads per rank" in log  # CPUs per task have come through srun
    assert stat.S_IMODE(os.stat(job.logs).st_mode) == 0o700
    facts = json.loads((job.folder / "launch.json").read_text())
    assert facts.pop("submitted") > 0
    assert facts.pop("command")[:2] == ["leakfree", "launch"]
    assert facts == {"format": 1, "launcher": "slurm", "job_id": job.job_id, "folder": str(job.logs)}
    assert not list(job.folder.glob(".preflight*"))


def test_seeds_are_one_array(tmp_path, here):
    jobs = launched(here, tmp_path, "--seeds", "2", "--output", str(tmp_path / "sweep"), "--time", "5")
    main_id = jobs[0].job_id.partition("_")[0]
    assert [(job.job_id, job.folder.name) for job in jobs] == [(f"{main_id}_0", "tiny"), (f"{main_id}_1", "tiny_seed1")]
    for job in jobs:
        assert job.ended()["JobState"] == "COMPLETED"
    seeds = [json.loads((job.folder / "record.json").read_text())["seed"] for job in jobs]
    assert seeds == [0, 1]
    assert not same(*(weights_of(job.folder) for job in jobs))


# --------------------------------------------------------------------------------------- failures


def test_a_rank_that_never_comes_is_named(tmp_path, here):
    (job,) = launched(here, tmp_path, *TWO_NODES, "--preflight-seconds", "3", training=stand_in.Late)
    job.until("rank 1 (on n2) did not arrive within 3 s")
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")


def test_a_folder_that_is_not_shared(tmp_path, here):
    (tmp_path / "run").mkdir()
    words = ["--preflight-seconds", "4", "--env", f"STAND_IN_FOLDER={tmp_path / 'run'}"]
    (job,) = launched(here, tmp_path, *TWO_NODES, *words, training=stand_in.PrivateFolder)
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "2:0", "Restarts": "0"}
    if "no private mount here" in job.log(1):
        pytest.skip("this machine allows no mounts")
    assert f"rank 1 (on n2) cannot see what rank 0 on n1 wrote to {tmp_path / 'run'}: output_dir must be" in job.log()
    assert not list((tmp_path / "run").glob(".preflight*"))


def test_another_number_of_tasks_than_launched(tmp_path, here):
    (job,) = launched(here, tmp_path, *TWO_NODES, "--setup", "export SLURM_NTASKS=1 SLURM_NPROCS=1")
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "2:0", "Restarts": "0"}
    assert "the job has 1 tasks on 2 machines, the run was launched for 2 on 2" in job.log()


def test_the_traceback_of_any_rank_is_in_the_first_log_and_ends_all(tmp_path, here):
    (job,) = launched(here, tmp_path, *TWO_NODES, training=stand_in.Broken)
    job.until("ZeroDivisionError: the loss of rank 1")
    assert job.ended()["JobState"] == "FAILED"
    assert job.log().count("rank 1: leakfree: failed, with this traceback:") == 1
