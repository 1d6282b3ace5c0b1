"""The launchers that need no cluster: this process, and a process in the background of this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from leakfree.cli import main
from leakfree.launch import submit
from leakfree.records import read_record
from tests.launch import stand_in
from tests.launch.jobs import CONFIG
from tests.runs import same, weights_of


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def test_both_train_as_the_command_does(capfd, config_file):
    root = config_file.parent
    line = ["launch", "--config-file", str(config_file), "--log-dir", str(root / "jobs"), "--num-processes", "2"]
    began = time.monotonic()
    words = [*line, "--launcher", "local", f"output_dir={root / 'local'}", "--partition", "gpu"]
    done = subprocess.run([sys.executable, "-m", "leakfree.cli", *words], capture_output=True, text=True, check=True)
    told = time.monotonic() - began
    assert "not used by --launcher local: --partition" in done.stdout
    facts = json.loads((root / "local" / "launch.json").read_text())
    assert facts["launcher"] == "local"
    os.kill(int(facts["job_id"]), 0)  # it runs on; the command has ended, and nobody waits for a pipe of its
    assert f"kill {facts['job_id']}" in done.stdout

    assert main([*line, "--launcher", "debug", f"output_dir={root / 'debug'}"]) == 0
    assert "results: " in capfd.readouterr().out
    end = time.monotonic() + 120
    while not (root / "local" / "model_final.pt").exists():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert same(weights_of(root / "local"), weights_of(root / "debug"))
    log = root / "jobs" / os.path.basename(facts["folder"]) / f"{facts['job_id']}_0_log.out"
    assert "saved " in log.read_text()
    while json.loads((root / "local" / "record.json").read_text())["status"] != "finished":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert told < 60


def _until(log, text):
    end = time.monotonic() + 120
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_a_kill_of_the_background_process_saves_and_resume_goes_on(capfd, config_file):
    root = config_file.parent
    line = ["launch", "--config-file", str(config_file), "--log-dir", str(root / "jobs"), "--num-processes", "2"]
    line += ["schedule.max_steps=400", "trainer.checkpoint_period=1000", "trainer.log_period=1"]
    assert main([*line, "--launcher", "local"]) == 0
    facts = json.loads((root / "run" / "launch.json").read_text())
    log = root / "jobs" / os.path.basename(facts["folder"]) / f"{facts['job_id']}_0_log.out"
    _until(log, "step: 5/400")
    os.kill(int(facts["job_id"]), signal.SIGTERM)
    _until(log, "leakfree: stopped by SIGTERM: step ")
    assert "Traceback" not in log.read_text()
    assert len(list((root / "run").glob("checkpoint_*.pt"))) == 1
    capfd.readouterr()
    assert main([*line, "--launcher", "debug"]) == 2
    assert "add --resume" in capfd.readouterr().err


def test_several_runs_go_on_after_one_that_fails_and_the_exit_code_tells(capfd, config_file):
    root = config_file.parent
    other = config_file.with_name("other.yaml")
    other.write_text(f"_BASE_: tiny.yaml\noutput_dir: {root / 'other'}\nmodel: {{num_classes: 3}}\n")
    files = ["--config-file", str(other), str(config_file)]
    assert main(["launch", *files, "--launcher", "debug", "--log-dir", str(root / "jobs"), "schedule.max_steps=2"]) == 2
    captured = capfd.readouterr()
    assert captured.err.count("leakfree: error: ") == 1
    assert "model.num_classes" in captured.err
    assert (root / "run" / "model_final.pt").exists()
    assert not (root / "other" / "model_final.pt").exists()


def test_a_fault_that_nobody_expected_keeps_no_other_run_from_its_start(capfd, config_file, monkeypatch):
    monkeypatch.setattr(submit, "Training", stand_in.Unlucky)
    root = config_file.parent
    words = ["--launcher", "debug", "--seeds", "2", "--log-dir", str(root / "jobs"), "schedule.max_steps=2"]
    assert main(["launch", "--config-file", str(config_file), *words]) == 1
    assert "ZeroDivisionError: a library's fault" in capfd.readouterr().err
    assert (root / "run_seed1" / "model_final.pt").exists()


def test_what_ends_a_job_behind_setup_lines_reaches_it(config_file):
    """The job is then the child of a shell."""
    root = config_file.parent
    words = ["--launcher", "local", "--setup", "true", "--log-dir", str(root / "jobs"), "schedule.max_steps=100000"]
    line = [sys.executable, "-m", "leakfree.cli", "launch", "--config-file", str(config_file), *words]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    (end,) = [line for line in done.stdout.splitlines() if "# saves, then ends" in line]
    deadline = time.monotonic() + 60
    while not (root / "run" / "metrics.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(end, shell=True, check=True)
    while not (root / "run" / "record.json").exists() or read_record(root / "run").status != "interrupted":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read_record(root / "run").sessions[-1]["ended"] == "stopped by SIGTERM"


def test_dry_run_starts_nothing(capsys, config_file):
    before = sorted(config_file.parent.rglob("*"))
    for launcher in ("local", "debug"):
        line = ["launch", "--config-file", str(config_file), "--launcher", launcher, "--dry-run", "--seeds", "2"]
        assert main([*line, "--log-dir", str(config_file.parent / "jobs")]) == 0
    assert sorted(config_file.parent.rglob("*")) == before
    assert capsys.readouterr().out.count(f"seed=1 -> {config_file.parent}/run_seed1") == 2
