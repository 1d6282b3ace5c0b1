"""Runs as jobs of a real two-node cluster: what they compute, what they say, and how they come back."""

import json
import os
import stat

import pytest

from leakfree.cli import main
from tests.launch import stand_in
from tests.launch.jobs import launched
from tests.runs import same, weights_of

TWO_NODES = ["--num-machines", "2", "--num-processes", "1", "--time", "5", "--cpus-per-task", "1"]


@pytest.fixture
def here(cluster, monkeypatch):
    """The cluster, as the commands of this process see it."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


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
    here.run("scancel", "--signal=KILL", job.job_id)  # it sleeps on: Slurm would give it KillWait to end
    assert job.ended()["Restarts"] == "0"


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
    (job,) = launched(here, tmp_path, *TWO_NODES, "--setup", "export SLURM_NTASKS_PER_NODE=2 SLURM_NTASKS=4")
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "2:0", "Restarts": "0"}
    assert "the job has 4 tasks on 2 machines, the run was launched for 2 on 2" in job.log()


def test_the_traceback_of_any_rank_is_in_the_first_log_and_ends_all(tmp_path, here):
    (job,) = launched(here, tmp_path, *TWO_NODES, training=stand_in.Broken)
    job.until("ZeroDivisionError: the loss of rank 1")
    here.run("scancel", "--signal=KILL", job.job_id)  # rank 0 sleeps on
    assert job.ended()["JobState"] == "FAILED"
    assert job.log().count("ZeroDivisionError") == 1


# ------------------------------------------------------------------------------- signals and requeues


def stopping(here, tmp_path, *words):
    (job,) = launched(here, tmp_path, *TWO_NODES, *words, training=stand_in.Stopping)
    for rank in (0, 1):
        job.until(f"start 0 of rank {rank}", rank)
    return job


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signal_requeues_the_job(tmp_path, here, name):
    job = stopping(here, tmp_path)
    job.signal(name)
    job.until("is back in the queue")
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}
    assert f"stopped by SIG{name}: step 3 of 6 is saved" in job.log()
    assert "(1000 remaining timeouts)" in job.log()  # the time limit was far: it does not count
    assert [rank for rank in (0, 1) if "start 1 of rank" not in job.log(rank)] == []


def test_scontrol_requeue_is_left_to_slurm(tmp_path, here):
    job = stopping(here, tmp_path)
    here.run("scontrol", "requeue", job.job_id)
    job.until("Slurm has put the job back into the queue")
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}


def test_a_cancelled_job_stays_away(tmp_path, here):
    job = stopping(here, tmp_path)
    here.run("scancel", job.job_id)
    job.until("cancelled by the user: the job is not requeued")
    assert job.ended()["JobState"] == "CANCELLED"
    assert job.ended()["Restarts"] == "0"


def test_where_requeueing_is_refused_the_log_says_what_to_do(tmp_path, here):
    job = stopping(here, tmp_path, "--sbatch", "no-requeue")
    job.signal("USR2")
    job.until(
        f"scontrol refuses (see its line above; requeueing may be disabled here); give it by hand: scontrol requeue {job.job_id}"
    )
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "75:0", "Restarts": "0"}


def test_only_the_element_of_an_array_is_requeued(tmp_path, here):
    words = ["--time", "5", "--seeds", "2", "--output", str(tmp_path / "sweep")]
    one, two = launched(here, tmp_path, *words, training=stand_in.Stopping)
    for job in (one, two):
        job.until("start 0 of rank 0")
    two.signal("USR2")
    two.until("is back in the queue")
    assert two.ended()["Restarts"] == "1"
    assert here.job(one.job_id)["JobState"] == "RUNNING"
    here.run("scancel", one.job_id)
    assert one.ended()["Restarts"] == "0"


@pytest.mark.slow
def test_a_time_limit_requeues_as_often_as_allowed(tmp_path, here):
    words = [*TWO_NODES[:4], "--time", "1", "--signal-delay", "45", "--max-requeues", "1", "--env", "STAND_IN_STARTS=9"]
    (job,) = launched(here, tmp_path, *words, training=stand_in.Stopping)
    job.until("(0 remaining timeouts)", seconds=100)
    job.until("as often as --max-requeues allows", seconds=100)
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "75:0", "Restarts": "1"}
