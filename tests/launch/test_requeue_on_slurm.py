"""Signals to jobs of a real cluster, with a training that only stops: which jobs come back, and what their logs say."""

import pytest

from tests.launch import stand_in
from tests.launch.jobs import TWO_NODES, launched


def stopping(here, tmp_path, *words):
    (job,) = launched(here, tmp_path, *TWO_NODES, *words, training=stand_in.Stopping)
    for rank in (0, 1):
        job.until(f"start 0 of rank {rank}", rank)
    return job


@pytest.mark.long
@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signal_requeues_the_job(tmp_path, here, name):
    job = stopping(here, tmp_path)
    job.signal(name)
    job.until("is back in the queue")
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}
    assert f"stopped by SIG{name}: step 3 of 6 is saved" in job.log()
    assert "(1000 remaining timeouts)" in job.log()  # the time limit was far: it does not count
    assert [rank for rank in (0, 1) if "start 1 of rank" not in job.log(rank)] == []


@pytest.mark.long
def test_scontrol_requeue_is_left_to_slurm(tmp_path, here):
    job = stopping(here, tmp_path)
    here.run("scontrol", "requeue", job.job_id)
    job.until("Slurm has put the job back into the queue")
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("partition", "why"),
    [("spare", "Slurm has put the job back into the queue"), ("grace", "SIGTERM while Slurm calls the job RUNNING")],
)
def test_a_preempted_job_comes_back(tmp_path, here, partition, why):
    job = stopping(here, tmp_path, "--partition", partition)
    here.claim()
    job.until(why)
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}
    assert [rank for rank in (0, 1) if "start 1 of rank" not in job.log(rank)] == []


@pytest.mark.long
def test_a_cancelled_job_stays_away(tmp_path, here):
    job = stopping(here, tmp_path)
    here.run("scancel", job.job_id)
    job.until("cancelled by the user: the job is not requeued")
    assert job.ended()["JobState"] == "CANCELLED"
    assert job.ended()["Restarts"] == "0"


def test_a_lost_machine_requeues_the_job_before_slurm_knows_of_it(tmp_path, here):
    (job,) = launched(here, tmp_path, *TWO_NODES, training=stand_in.LostMachine)
    job.until("a lost machine while Slurm calls the job RUNNING")
    assert job.ended() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "2"}
    assert "leakfree: failed: rank 1 on n2 does not answer any more" in job.log()
    assert job.log().count("is back in the queue") == 2
    assert [rank for rank in (0, 1) if "start 2 of rank" not in job.log(rank)] == []


def test_where_requeueing_is_refused_the_log_says_what_to_do(tmp_path, here):
    job = stopping(here, tmp_path, "--sbatch", "no-requeue")
    job.signal("USR2")
    job.until(f"give it by hand: scontrol requeue {job.job_id} ")
    assert "scontrol refuses (see its line above; requeueing may be disabled here)" in job.log()
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


@pytest.mark.long
def test_a_time_limit_requeues_as_often_as_allowed(tmp_path, here):
    words = [*TWO_NODES[:4], "--time", "1", "--signal-delay", "45", "--max-requeues", "1", "--env", "STAND_IN_STARTS=9"]
    (job,) = launched(here, tmp_path, *words, training=stand_in.Stopping)
    job.until("(0 remaining timeouts)", seconds=100)
    job.until("as often as --max-requeues allows", seconds=100)
    assert job.ended() == {"JobState": "FAILED", "ExitCode": "75:0", "Restarts": "1"}
