"""Several configs and seeds side by side: real trainings, reused and stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "contrastive" / "digits"
SHORT = [
    "schedule.max_steps=4", "schedule.warmup_steps=1", "trainer.log_period=1", "trainer.eval_period=0",
    "evaluation.statistics=[population]", "evaluation.max_images=120", "leakage.max_images=128",
    "leakage.influence_batches=1", "leakage.influence_probes=2",
]  # fmt: skip


def _sweep(output: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), *words, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_configs_times_seeds_are_trained_compared_and_reused(tmp_path):
    words = [str(DIGITS / "moco_bn.yaml"), str(DIGITS / "moco_shuffle_bn.yaml"), "--seeds", "2", *SHORT]
    first = _sweep(tmp_path, *words)
    out, errors = first.communicate(timeout=240)
    assert first.returncode == 0, errors
    records = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")}
    assert {name: record["seed"] for name, record in records.items()} == {
        "moco_bn": 0, "moco_bn_seed1": 1, "moco_shuffle_bn": 0, "moco_shuffle_bn_seed1": 1,
    }  # fmt: skip
    assert all(record["status"] == "finished" for record in records.values())
    assert (tmp_path / "report.html").is_file()
    again = _sweep(tmp_path, *words)
    out, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert out.count(": reused") == 4


def test_ctrl_c_stops_the_runs_and_a_mistake_starts_none(tmp_path):
    long = [*SHORT[1:], "schedule.max_steps=100000", "trainer.checkpoint_period=1"]
    sweep = _sweep(tmp_path / "a", str(DIGITS / "moco_bn.yaml"), *long)
    metrics = tmp_path / "a" / "moco_bn" / "metrics.json"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert time.monotonic() < end
        assert sweep.poll() is None
        time.sleep(0.2)
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "continues" in out
    assert json.loads((tmp_path / "a" / "moco_bn" / "record.json").read_text())["status"] == "interrupted"
    wrong = _sweep(tmp_path / "b", str(DIGITS / "moco_bn.yaml"), "model.kye=bn")
    _, errors = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert "model.kye" in errors
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["output_dir=elsewhere"], "--output"),
        (["seed=3"], "--seeds"),
        (["--seeds", "0"], "--seeds"),
        ([str(DIGITS / ".." / "digits" / "moco_bn.yaml")], "one name"),
    ],
)
def test_runs_that_would_meet_in_one_folder_are_refused(tmp_path, words, named):
    sweep = _sweep(tmp_path / "c", str(DIGITS / "moco_bn.yaml"), *words)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 2
    assert named in errors.splitlines()[-1]
    assert not (tmp_path / "c").exists()
