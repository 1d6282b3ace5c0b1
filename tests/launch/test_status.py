"""`leakfree status` of real runs: running, killed, interrupted, finished; and of what Slurm holds."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from leakfree import cli
from leakfree.config import config_to_dict, load_config
from leakfree.errors import RunError
from leakfree.launch import status as room
from leakfree.launch.status import RunStatus, run_status, show_status
from leakfree.records import RunRecord, read_record, write_record
from leakfree.sealed import write_checkpoint
from leakfree.training import train
from leakfree.training.checkpoints import checkpoint_name
from leakfree.training.lock import locked
from tests.classification.conftest import CONFIG
from tests.runs import RESUMES

QUIET = ["evaluation.statistics=[population]", "leakage.enabled=false"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def begin(config_file, tmp_path):
    """``begin("run", "seed=1")``: a process that goes on with a run of 100,000 steps in ``tmp_path / "run"``."""
    (tmp_path / "program.py").write_text(RESUMES)
    started = []

    def start(name, *overrides):
        overrides = [f"output_dir={tmp_path / name}", "schedule.max_steps=100000", *QUIET, *overrides]
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(config_file), *overrides],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def one(path) -> RunStatus:
    (found,) = run_status([path])
    return found


def leave(folder, config, *steps, status="running", sessions=(), rows=(), notes=()):
    """Write what a run has left behind, and return its folder."""
    folder.mkdir()
    write_record(
        folder,
        RunRecord(
            folder.name,
            "classification",
            status,
            3,
            config_to_dict(config),
            timing={"steps": max(steps, default=0)},
            notes=list(notes),
            sessions=list(sessions),
        ),
    )
    for step in steps:
        write_checkpoint({"leakfree": {}, "x": list(range(100))}, folder / checkpoint_name(step))
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def session(ended="", from_step=0, job=""):
    return {
        "started": time.time() - 60,
        "from_step": from_step,
        "host": "node7",
        "job": job,
        "world_size": 1,
        "ended": ended,
    }


@pytest.fixture
def config(config_file):
    return load_config(config_file, ["schedule.max_steps=100"])


# --------------------------------------------------------------------------------------- real runs


def test_a_run_from_its_start_over_a_kill_to_ctrl_c(begin, tmp_path):
    process = begin("run")
    until(lambda: (tmp_path / "run/.lock").exists())
    assert one(tmp_path / "run").state in ("starting", "running")
    found = until(lambda: (status := one(tmp_path / "run")).eta_seconds is not None and status)
    assert (found.state, found.max_steps, found.restarts, found.alarms) == ("running", 100000, 0, [])
    assert found.detail == f"on {os.uname().nodename}"
    assert 0 < found.step < 100000
    assert found.eta_seconds == pytest.approx(found.seconds_per_step * (100000 - found.step))
    assert found.last_sign < 60
    until(lambda: one(tmp_path / "run").checkpoint_step)
    process.kill()
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    found = one(tmp_path / "run")
    assert (found.state, found.eta_seconds) == ("died", None)
    assert found.alarms == [
        f"died without a word; resume it with: leakfree train --config-file {tmp_path / 'run'}/config.yaml --resume"
    ]
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}  # only looked at
    process = begin("run")
    found = until(lambda: (status := one(tmp_path / "run")).state == "running" and status)
    assert found.restarts == 1
    text = (tmp_path / "run/log.txt").read_text()
    assert f"on {os.uname().nodename}) ended without a word: killed, or its machine died" in text
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    found = one(tmp_path / "run")
    assert (found.state, found.detail, found.alarms) == ("interrupted", "can resume", [])
    first, second = read_record(tmp_path / "run").sessions
    assert (first["ended"], second["ended"]) == ("", "interrupted")
    assert second["from_step"] == second["from_step"] // 2 * 2 > 0


def test_a_finished_run_and_one_that_failed(config_file, tmp_path):
    record = train(load_config(config_file, [f"output_dir={tmp_path / 'runs/done'}", *QUIET]))
    assert [item["ended"] for item in record.sessions] == ["finished"]
    with pytest.raises(RunError, match="diverged"):
        train(load_config(config_file, [f"output_dir={tmp_path / 'runs/wild'}", "optimizer.lr=1e30", *QUIET]))
    done, wild = run_status([tmp_path / "runs"])
    assert (done.run, done.state, done.step, done.percent, done.alarms) == (
        str(tmp_path / "runs/done"), "finished", 6, 100.0, [],
    )  # fmt: skip
    assert done.checkpoint_step == 6
    assert wild.state == "failed"
    assert wild.detail.startswith("training diverged at step")
    assert wild.alarms == [f"failed: {wild.detail}"]
    assert read_record(tmp_path / "runs/wild").sessions[0]["ended"] == f"failed: {wild.detail}"


# ------------------------------------------------------------------------------------- what is told


def test_a_writer_that_evaluates_or_only_starts(config, tmp_path):
    folder = leave(tmp_path / "run", config, 100, sessions=[session()])
    with locked(folder):
        assert one(folder).state == "starting"  # the record is of a session before
        record = read_record(folder)
        record.sessions.append({**session(), "started": time.time()})
        write_record(folder, record)
        assert one(folder).state == "evaluating"
        record.status = "finished"
        write_record(folder, record)
        assert one(folder).state == "evaluating"
    assert one(folder).state == "finished"


def test_a_stopped_run_can_resume(config, tmp_path):
    folder = leave(tmp_path / "run", config, 40, status="interrupted", sessions=[session("stopped by SIGTERM")])
    found = one(folder)
    assert (found.state, found.detail, found.step, found.percent) == ("stopped", "by SIGTERM, can resume", 40, 40.0)
    assert found.alarms == []


def rows(*losses, seconds=0.5):
    return [{"step": 10 * i, "loss": loss, "seconds_per_step": seconds} for i, loss in enumerate(losses, 1)]


ALARMS = {
    "a loss": ({"rows": rows(1.0, math.nan)}, "step 20: loss is nan"),
    "restarts": ({"sessions": [session("interrupted", 40)] * 4}, "4 starts in a row from step 40, with no checkpoint"),
    "a leak": ({"notes": ["leak: model.norm: because", "other"]}, "leak: model.norm: because"),
}


@pytest.mark.parametrize("name", ALARMS)
def test_alarms_of_the_record_and_the_rows(config, tmp_path, name):
    settings, words = ALARMS[name]
    folder = leave(tmp_path / "run", config, 40, status="interrupted", **settings)
    (alarm,) = one(folder).alarms
    assert alarm.startswith(words)
    settings = {"sessions": [session("interrupted", 0), *[session("interrupted", 40)] * 3], "rows": rows(1.0, 2.0)}
    assert one(leave(tmp_path / "fine", config, 40, status="interrupted", **settings)).alarms == []


def test_alarms_of_the_files(config, tmp_path, monkeypatch):
    folder = leave(tmp_path / "run", config, 20, 40, status="interrupted")
    path = folder / checkpoint_name(40)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (alarm,) = one(folder).alarms
    assert alarm.startswith("checkpoint_0000040.pt is damaged (")
    monkeypatch.setattr(room, "_SMALL", 0)  # as if it were too long to be read
    (alarm,) = one(folder).alarms
    assert alarm.startswith("checkpoint_0000040.pt is damaged (its end is missing)")
    path.write_bytes(whole)
    assert one(folder).alarms == []
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: _Usage(len(whole)))
    (alarm,) = one(folder).alarms
    assert alarm.startswith("the disk is nearly full: 0 MiB are free")


class _Usage:
    def __init__(self, free):
        self.free = free


def test_a_process_that_lives_and_writes_nothing(config, tmp_path):
    folder = leave(tmp_path / "run", config, 40, sessions=[session()], rows=rows(1.0, 2.0))
    with locked(folder):
        record = read_record(folder)
        record.sessions.append({**session(), "started": time.time()})
        write_record(folder, record)
        assert one(folder).alarms == []
        os.utime(folder / "metrics.json", (time.time() - 4000,) * 2)
        (alarm,) = one(folder).alarms
        assert alarm == "its process lives, but it has written nothing for 1:06:40"


def test_a_record_that_cannot_be_read_is_an_alarm_and_no_end(config, tmp_path):
    folder = leave(tmp_path / "run", config, 40)
    (folder / "record.json").write_text("{")
    (alarm, _) = one(folder).alarms
    assert "cannot be read as a run's record" in alarm
    leave(tmp_path / "other", config, 40)
    raw = json.loads((tmp_path / "other/record.json").read_text())
    (tmp_path / "other/record.json").write_text(json.dumps({**raw, "timing": []}))
    assert "timing: expected dict, got []" in one(tmp_path / "other").alarms[0]


def test_old_records_without_sessions(config, tmp_path):
    folder = leave(tmp_path / "run", config, 40)
    raw = json.loads((folder / "record.json").read_text())
    del raw["sessions"], raw["conversions"]
    (folder / "record.json").write_text(json.dumps(raw))
    assert read_record(folder).sessions == []
    assert (one(folder).state, one(folder).restarts) == ("died", 0)
    for broken in ([{"started": 1}], {}, [3]):
        (folder / "record.json").write_text(json.dumps({**raw, "sessions": broken}))
        with pytest.raises(RunError, match="sessions: expected a list of objects with started"):
            read_record(folder)


def test_a_long_file_of_rows_is_read_from_its_end(config, tmp_path):
    folder = leave(tmp_path / "run", config, rows=[{**row, "text": "x" * 400} for row in rows(*[1.0] * 3000)])
    with (folder / "metrics.json").open("a") as file:
        file.write('{"step": 31')
    began = time.monotonic()
    assert one(folder).step == 30000
    assert time.monotonic() - began < 1


def test_a_hundred_runs_are_quick_and_torch_stays_away(config, tmp_path):
    for number in range(100):
        leave(tmp_path / f"seed{number:03d}", config, 20, 40, rows=rows(*[1.0] * 50))
    code = (
        "import sys; from leakfree.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'submitit'} & set(sys.modules); sys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10
    lines = done.stdout.splitlines()
    assert len(lines) == 200  # each with its alarm
    assert lines[0].startswith(f"{tmp_path / 'seed000'}:  died  step=500/100")


# ------------------------------------------------------------------------------------------ Slurm


@pytest.fixture
def slurm_says(tmp_path, monkeypatch):
    """A ``scontrol`` that knows one job."""

    def say(facts):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin/scontrol"
        program.write_text(f'#!/bin/sh\n[ "$4" = 12 ] && echo "JobId=12 {facts}" || exit 1\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
        monkeypatch.setenv("SLURM_CONF", "/dev/null")

    return say


LAUNCHED = {"format": 1, "launcher": "slurm", "job_id": "12", "command": ["leakfree", "launch", "a b"]}


@pytest.mark.parametrize(
    ("facts", "state", "detail", "alarm"),
    [
        ("JobState=PENDING Reason=Priority", "queued", "job 12: Priority", ""),
        ("JobState=PENDING Reason=JobHeldUser", "queued", "job 12: JobHeldUser", "job 12 is held (JobHeldUser)"),
        ("JobState=RUNNING Reason=None NodeList=n1", "starting", "job 12 on n1", ""),
        (
            "JobState=FAILED Reason=NonZeroExitCode",
            "interrupted",
            "can resume",
            "job 12 is FAILED (NonZeroExitCode) and the run is unfinished; go on with: leakfree launch 'a b'",
        ),
        ("JobState=CANCELLED Reason=None", "interrupted", "can resume", "job 12 is CANCELLED and the run is"),
    ],
)
def test_what_slurm_says_of_an_unfinished_run(config, tmp_path, slurm_says, facts, state, detail, alarm):
    slurm_says(facts)
    folder = leave(tmp_path / "run", config, 40, status="interrupted", sessions=[session("interrupted")])
    (folder / "launch.json").write_text(json.dumps(LAUNCHED))
    found = one(folder)
    assert (found.state, found.detail, found.job) == (state, detail, "12")
    assert [text[: len(alarm)] for text in found.alarms] == ([alarm] if alarm else [])


def test_a_run_that_was_only_submitted(tmp_path, slurm_says, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/launch.json").write_text(json.dumps(LAUNCHED))
    slurm_says("JobState=PENDING Reason=Resources")
    assert (one(tmp_path / "run").state, one(tmp_path / "run").detail) == ("queued", "job 12: Resources")
    slurm_says("JobState=OUT_OF_MEMORY Reason=None")
    assert (one(tmp_path / "run").state, one(tmp_path / "run").detail) == (
        "failed", "job 12 is OUT_OF_MEMORY, and the run never began",
    )  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert (one(tmp_path / "run").state, one(tmp_path / "run").detail) == (
        "queued", "job 12, of which nothing is known here",
    )  # fmt: skip


def test_jobs_of_a_real_cluster(cluster, config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    job = cluster.run("sbatch", "--hold", "--parsable", "--output=/dev/null", "--wrap", "sleep 60").strip()
    folder = leave(tmp_path / "run", config, 40, status="interrupted", sessions=[session("stopped by SIGUSR2")])
    (folder / "launch.json").write_text(json.dumps({**LAUNCHED, "job_id": job}))
    found = one(folder)
    assert (found.state, found.detail) == ("queued", f"job {job}: JobHeldUser")
    assert found.alarms == [f"job {job} is held (JobHeldUser); release it with: scontrol release {job}"]
    cluster.run("scancel", job)
    found = until(lambda: (status := one(folder)).state == "stopped" and status)
    assert found.alarms[0].startswith(f"job {job} is CANCELLED")


# ------------------------------------------------------------------------------------ the command


def test_json_for_scripts(config, tmp_path, capsys):
    folder = leave(tmp_path / "run", config, 40, status="interrupted", rows=rows(1.0, 2.0, 3.0, seconds=0.25))
    assert cli.main(["status", str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["step"] == 40
    assert (found["percent"], found["seconds_per_step"], found["eta_seconds"]) == (40.0, 0.25, None)
    assert found["alarms"] == []


def test_strict_counts_alarms_in_the_exit_code(config, tmp_path, capsys):
    fine = leave(tmp_path / "fine", config, 40, status="interrupted")
    dead = leave(tmp_path / "dead", config, 40)
    assert cli.main(["status", str(fine), "--strict"]) == 0
    assert cli.main(["status", str(fine), str(dead)]) == 0
    assert cli.main(["status", "--strict", str(fine), str(dead)]) == 1
    assert "  alarm: died without a word; resume it with: leakfree train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no such folder"), ("file", "is a file"), ("empty", "not the output folder of a run, and none in it")],
)
def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys, name, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty/deep").mkdir(parents=True)
    assert cli.main(["status", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path / name}: {words}" in error
    assert cli.main(["status", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch 0: give seconds" in capsys.readouterr().err


def test_a_table_on_a_terminal_that_is_watched(config, tmp_path, monkeypatch, capsys):
    folder = leave(tmp_path / "run", config, 40, sessions=[session(), session()], rows=rows(1.0, 2.0, 3.0, 4.0))
    console = room.Console(highlight=False, markup=False, emoji=False, force_terminal=True, width=200)
    monkeypatch.setattr(room, "Console", lambda **options: console)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(room.time, "sleep", nap)
    assert show_status([folder], watch=5, strict=True) == 1
    text = capsys.readouterr().out
    assert naps == [5, 5]
    assert text.count("run ") >= 2
    for word in ("40/100", "40", "0.5", "died", "restarts", "checkpoint"):
        assert word in text
    assert f"{folder}: died without a word" in text
