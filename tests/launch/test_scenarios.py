"""What a cluster does to a run, done by a real Slurm: each time the finished weights are the undisturbed run's.

Two nodes, one rank on each, a loader process for each rank. Nothing is repaired by hand between the disturbance and the
end.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leakfree.config import load_config
from leakfree.records import read_metrics, read_record
from leakfree.training import train
from tests.runs import same, weights_of
from tests.training.conftest import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Steps enough that a run is in the middle of them whenever something happens to it; checkpoints come from the
# signals, not from the period, unless a scenario says otherwise.
LENGTH = ["schedule.max_steps=400", "trainer.checkpoint_period=1000", "trainer.log_period=20", "data.num_workers=1"]

SHORT = "schedule.max_steps=160"


class Job:
    """A run that was launched on the test cluster."""

    def __init__(self, cluster, config_file, folder, *arguments, overrides=()):
        self.cluster, self.folder = cluster, Path(folder)
        command = [
            sys.executable, "-m", "leakfree.cli", "launch", "--config-file", str(config_file), "--launcher", "slurm",
            "--num-machines", "2", "--num-processes", "1", "--cpus-per-task", "1",
            "--log-dir", str(self.folder.parent / "jobs"), *arguments, f"output_dir={folder}", *LENGTH, *overrides,
        ]  # fmt: skip
        done = subprocess.run(
            command, env=dict(cluster.environment), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    @property
    def job_id(self):
        return json.loads((self.folder / "launch.json").read_text())["job_id"]

    def log(self):
        logs = Path(json.loads((self.folder / "launch.json").read_text())["folder"])
        return "\n".join(
            path.read_text(errors="replace") for path in sorted(logs.rglob("*.out")) + sorted(logs.rglob("*.err"))
        )

    def until_step(self, step, seconds=120):
        self._until(lambda: any(row["step"] >= step for row in read_metrics(self.folder)), f"step {step}", seconds)

    def until_finished(self, seconds=240):
        path = self.folder / "record.json"
        self._until(lambda: path.exists() and read_record(self.folder).status == "finished", "end", seconds)
        self.cluster.wait_for_state(self.job_id, "COMPLETED", seconds=30)

    def _until(self, condition, what, seconds):
        end = time.monotonic() + seconds
        while not condition():
            state = self.cluster.job(self.job_id)
            assert time.monotonic() < end, f"no {what} within {seconds} s: {state}\n{self.log()[-5000:]}"
            assert state["JobState"] not in ("FAILED", "CANCELLED"), self.log()[-5000:]
            time.sleep(0.2)

    def until_session(self, number, seconds=120):
        """Wait until the run has been started so many times."""
        self._until(lambda: len(self.steps_of_sessions()) >= number, f"session {number}", seconds)

    def steps_of_sessions(self):
        return [session["from_step"] for session in read_record(self.folder).sessions]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(CONFIG.format(root=folder / "data"))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(load_config(config_file, [f"output_dir={folder}", "trainer.num_processes=2", *LENGTH]))
    return folder


def assert_as_undisturbed(job, undisturbed):
    assert same(weights_of(job.folder), weights_of(undisturbed))
    times = ("seconds_per_step", "data_seconds_per_step", "peak_memory_mib")
    rows, expected = (
        [{name: value for name, value in row.items() if name not in times} for row in read_metrics(folder)]
        for folder in (job.folder, undisturbed)
    )
    assert rows == expected
    assert read_record(job.folder).results == read_record(undisturbed).results


@pytest.mark.alone
def test_a_time_limit_requeues_the_run_and_it_goes_on(cluster, config_file, tmp_path, undisturbed):
    # Slurm's limits are whole minutes. The signal comes 20 s after the start, whatever the speed of this machine: the
    # run is longer.
    steps = max(400, int(25 / read_record(undisturbed).timing["seconds_per_step"]))
    longer = f"schedule.max_steps={steps}"
    whole = tmp_path / "whole"
    train(load_config(config_file, [f"output_dir={whole}", "trainer.num_processes=2", *LENGTH, longer]))
    job = Job(cluster, config_file, tmp_path / "run", "--time", "1", "--signal-delay", "40", overrides=[longer])
    job.until_finished(seconds=400)
    assert len(job.steps_of_sessions()) >= 2
    assert_as_undisturbed(job, whole)
    assert "SIGUSR2" in job.log()


def test_a_requeue_then_sigterm_alone_then_a_lost_node(cluster, config_file, tmp_path, undisturbed):
    """One run meets all three. What ends with a signal loses no step; a node's end, those since the last checkpoint."""
    job = Job(cluster, config_file, tmp_path / "run", "--time", "10", overrides=["trainer.checkpoint_period=40"])
    job.until_step(60)
    cluster.run("scontrol", "requeue", job.job_id)
    job.until_session(2)
    job.until_step(140)
    cluster.run("scancel", "--signal=TERM", job.job_id)
    job.until_session(3)
    job.until_step(240)
    cluster.stop_node("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.start_node("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    job.until_finished()
    begun = job.steps_of_sessions()
    assert len(begun) == 4
    assert begun[0] == 0
    assert begun[1] >= 60
    assert begun[2] >= 140
    assert begun[3] >= 200
    assert_as_undisturbed(job, undisturbed)


def test_a_preemption_without_and_one_with_a_warning(cluster, config_file, tmp_path, undisturbed):
    """The job of another partition takes both nodes; the run loses no step, and has them back after it."""
    for partition in ("spare", "grace"):
        job = Job(cluster, config_file, tmp_path / partition, "--time", "10", "--partition", partition)
        job.until_step(60)
        cluster.claim()
        job.until_finished()
        begun = job.steps_of_sessions()
        assert len(begun) == 2
        assert begun[1] >= 60
        assert_as_undisturbed(job, undisturbed)


def test_a_cancelled_job_saves_and_stays_down(cluster, config_file, tmp_path, undisturbed):
    job = Job(cluster, config_file, tmp_path / "run", "--time", "10")
    job.until_step(60)
    cluster.run("scancel", job.job_id)
    cluster.wait_for_state(job.job_id, "CANCELLED", seconds=60)
    time.sleep(8)  # long enough for a requeue that nobody wants
    assert cluster.job(job.job_id)["JobState"] == "CANCELLED"
    assert read_record(job.folder).status == "interrupted"
    assert list(job.folder.glob("checkpoint_*.pt"))
    config = load_config(config_file, [f"output_dir={job.folder}", "trainer.num_processes=2", *LENGTH])
    train(config, resume=True)  # here, without Slurm: the same run
    assert_as_undisturbed(job, undisturbed)


def test_an_array_of_four_each_disturbed(cluster, config_file, tmp_path):
    """Four seeds in one array job, one rank each; every element meets another end of its first start."""
    folders = [tmp_path / "run", *(tmp_path / f"run_seed{seed}" for seed in (1, 2, 3))]
    command = [
        sys.executable, "-m", "leakfree.cli", "launch", "--config-file", str(config_file), "--launcher", "slurm",
        "--partition", "main", "--num-processes", "1", "--cpus-per-task", "1", "--time", "10", "--seeds", "4",
        "--log-dir", str(tmp_path / "jobs"), f"output_dir={folders[0]}", *LENGTH, SHORT,
    ]  # fmt: skip
    subprocess.run(command, env=dict(cluster.environment), capture_output=True, text=True, timeout=120, check=True)
    jobs = [Job.__new__(Job) for _ in folders]
    for job, folder in zip(jobs, folders, strict=True):
        job.cluster, job.folder = cluster, folder
    assert len({job.job_id.partition("_")[0] for job in jobs}) == 1
    for job in jobs:
        job.until_step(40)
    cluster.run("scontrol", "requeue", jobs[0].job_id)
    cluster.run("scancel", "--signal=TERM", jobs[1].job_id)
    cluster.run("scancel", "--signal=USR2", jobs[2].job_id)
    for job in jobs:
        job.until_finished()
    assert [len(job.steps_of_sessions()) for job in jobs] == [2, 2, 2, 1]
    for seed, job in enumerate(jobs):
        whole = tmp_path / f"whole{seed}"
        train(load_config(config_file, [f"output_dir={whole}", f"seed={seed}", *LENGTH, SHORT]))
        assert_as_undisturbed(job, whole)
