"""Mistakes that show before a job waits in a queue: one line, exit code 2, and nothing made anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leakfree.cli import main
from leakfree.launch import command, validate
from leakfree.launch.slurm import Partition, partitions
from tests.training.conftest import CONFIG as DETECTION

COCO = ["data.train.name=coco", "data.train.images=train", "data.train.annotations=train.json"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(DETECTION.format(root=tmp_path / "data") + f"output_dir: {tmp_path / 'run'}\n")
    return path


@pytest.fixture
def without_slurm(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def refused(capsys, config_file, *words, launcher="debug"):
    """The one line of a command that must be refused; it must have changed nothing."""
    root = config_file.parent
    before = sorted(root.rglob("*"))
    log_dir = [] if "--log-dir" in words else ["--log-dir", str(root / "jobs")]
    assert main(["launch", "--config-file", str(config_file), "--launcher", launcher, *log_dir, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if "warning:" not in line]
    assert len(lines) == 1
    assert sorted(root.rglob("*")) == before
    return lines[0].removeprefix("leakfree: error: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr"]),
        (["--num-machines", "3"], ["trainer.total_batch_size", "3 ranks"]),
        (["--num-machines", "2"], ["--num-machines: 2 machines", "--launcher debug has this one alone"]),
        (["data.train.name=coco"], ["data.train.images: is empty"]),
        ([*COCO, "data.root=/nowhere"], ["data.train.images: /nowhere/train: it does not exist"]),
        (["model.weights=no/such.pt"], ["model.weights: no/such.pt does not exist"]),
        (["model.weights=/tmp"], ["model.weights: /tmp is not a file"]),
        (["output_dir=/dev/null/run"], ["output_dir: /dev/null/run cannot be used: /dev/null is not a folder"]),
        (["--log-dir", "/dev/null/jobs"], ["--log-dir: /dev/null/jobs cannot be used"]),
    ],
)
def test_mistakes_of_a_run(capsys, config_file, words, told):
    message = refused(capsys, config_file, *words)
    assert all(word in message for word in told), message


def test_an_output_folder_of_somebody_else(capsys, config_file, monkeypatch):
    monkeypatch.setattr(validate.os, "access", lambda *_: False)  # root may write anywhere
    message = refused(capsys, config_file)
    assert message.endswith(f"cannot be used: {config_file.parent} cannot be written by this user")


def test_data_on_disk_is_looked_for_by_every_task(capsys, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("task: classification\n")
    root = f"data.root={tmp_path}"
    words = ["data.train.name=image_folder", "data.train.path=mine", root]
    assert f"data.train.path: {tmp_path}/mine: it does not exist" in refused(capsys, path, *words)
    words = ["data.val.name=cifar10", root]
    assert "cifar-10-batches-py: no such folder" in refused(capsys, path, *words)
    (tmp_path / "file").write_text("")
    words = ["data.train.name=image_folder", "data.train.path=file", root]
    assert "it is not a folder" in refused(capsys, path, *words)


def test_initial_weights_that_are_no_checkpoint(capsys, config_file):
    weights = config_file.parent / "weights.pt"
    weights.write_bytes(b"not a zip")
    assert "is damaged, or not a checkpoint" in refused(capsys, config_file, f"model.weights={weights}")


def finished_run(folder, config_file, **changes):
    """What a finished run of the config leaves, as far as the question goes whether another may start."""
    from leakfree.config import config_to_dict, load_config
    from leakfree.records import RunRecord, write_record

    folder.mkdir()
    config = config_to_dict(load_config(config_file, [f"output_dir={folder}"]))
    record = RunRecord(
        name=folder.name, task=config["task"], status="finished", seed=config["seed"], config={**config, **changes},
        timing={"steps": 6}, environment={"world_size": 1},
    )  # fmt: skip
    write_record(folder, record)
    return folder


def test_a_folder_with_another_run(capsys, config_file):
    folder = finished_run(config_file.parent / "run", config_file, seed=99)
    assert "holds a run of another config: seed was 99, now 3" in refused(capsys, config_file)
    assert "holds a run of another config" in refused(capsys, config_file, "--resume")
    assert [path.name for path in folder.iterdir()] == ["record.json"]


def test_a_finished_run_is_refused_without_resume_and_left_alone_with_it(capsys, config_file):
    folder = finished_run(config_file.parent / "run", config_file)
    (folder / ".record.json.abc.tmp").write_text("half")  # a running process may be writing it
    (folder / "metrics.json").write_text('{"step": 7}\n')
    assert "already holds this run (finished)" in refused(capsys, config_file)
    words = ["launch", "--config-file", str(config_file), "--launcher", "debug", "--resume"]
    assert main([*words, "--log-dir", str(config_file.parent / "jobs")]) == 0
    assert capsys.readouterr().out == f"{folder}: this run is finished\n"
    assert (folder / "metrics.json").read_text() == '{"step": 7}\n'
    assert (folder / ".record.json.abc.tmp").exists()
    assert not (config_file.parent / "jobs").exists()


HOLDS = """
import sys, time
from leakfree.training.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_a_living_process_writes_to(capsys, config_file):
    folder = config_file.parent / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert f"pid {holder.pid}" in refused(capsys, config_file)
    finally:
        holder.kill()
        holder.communicate()


def test_runs_are_named_where_there_are_several(capsys, config_file):
    message = refused(capsys, config_file, "--seeds", "2", "model.weights=no/such.pt")
    assert message.startswith("tiny: model.weights")


def test_runs_of_one_array_have_one_size(capsys, config_file):
    other = config_file.with_name("other.yaml")
    other.write_text(f"_BASE_: tiny.yaml\noutput_dir: {config_file.parent / 'other'}\ntrainer: {{num_processes: 2}}\n")
    words = [str(other), "--time", "10"]
    message = refused(capsys, config_file, "--config-file", str(config_file), *words, launcher="slurm")
    assert "tiny has 1 x 1 (CPU), other has 1 x 2 (CPU)" in message


# ------------------------------------------------------------------------------------- the cluster


def test_where_slurm_is_missing(capsys, config_file, without_slurm):
    message = refused(capsys, config_file, "--time", "10", launcher="slurm")
    assert message.startswith("no Slurm here (sbatch and srun not found)")
    assert "--launcher local" in message


def test_a_time_limit_is_required(capsys, config_file, without_slurm):
    assert "--time is required" in refused(capsys, config_file, "--dry-run", launcher="slurm")


@pytest.fixture
def cluster_of(monkeypatch):
    def pretend(*found):
        monkeypatch.setattr(validate, "partitions", lambda: {item.name: item for item in found})
        monkeypatch.setattr(validate.shutil, "which", lambda name: f"/usr/bin/{name}")

    return pretend


GPU = Partition("gpu", True, True, 120, 2, 8, frozenset({"a100", "ib"}))
LONG = Partition("long", False, True, None, 64, None, frozenset())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--partition", "gpus"], "--partition: no partition 'gpus'; there are: gpu, down, long"),
        (["--time", "2:00:01"], "--time: 02:01:00 is more than the 02:00:00 of partition gpu"),
        (["--constraint", "a100&v100"], "--constraint: no machine of partition gpu has the feature 'v100'"),
        (["--num-processes", "2", "--cpus-per-task", "5"], "need 10 on each machine, those of partition gpu have 8"),
        (["--num-machines", "4", "trainer.total_batch_size=4"], "--num-machines: 4, but partition gpu has 2"),
        (["--sbatch", "gres=gpu:a100:4"], "4 GPUs on each machine, but trainer.num_gpus is 0"),
        (["--partition", "down"], "--partition: down is down"),
    ],
)
def test_what_a_partition_cannot_give(capsys, config_file, cluster_of, words, told):
    cluster_of(GPU, LONG, Partition("down", False, False, None, 1, 8, frozenset()))
    time = [] if "--time" in words else ["--time", "10"]
    assert told in refused(capsys, config_file, *time, *words, launcher="slurm")


def test_what_a_partition_can_give(capsys, config_file, cluster_of):
    cluster_of(GPU, LONG)
    line = ["launch", "--config-file", str(config_file), "--dry-run", "--time"]
    assert main([*line, "120", "--constraint", "[a100*2&ib]"]) == 0
    assert main([*line, "20-00:00:00", "--partition", "long"]) == 0
    cluster_of()  # sinfo does not answer: sbatch will tell
    assert main([*line, "9999", "--partition", "whatever"]) == 0
    assert capsys.readouterr().out.count("#SBATCH --time") == 3


def test_what_sinfo_says(monkeypatch, tmp_path):
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(
        "#!/bin/sh\necho 'gpu*|up|2-12:00:00|3|64|a100,ib'\necho 'gpu*|up|2-12:00:00|1|32|v100'\n"
        "echo 'cpu|down|infinite|9|4+|(null)'\necho 'odd line'\necho 'short|up|30:00|1|4|x'\n"
    )
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert partitions() == {
        "gpu": Partition("gpu", True, True, 3600, 4, None, frozenset({"a100", "ib", "v100"})),
        "cpu": Partition("cpu", False, False, None, 9, None, frozenset()),
        "short": Partition("short", False, True, 30, 1, 4, frozenset({"x"})),
    }


def test_dry_run_shows_the_script_and_the_runs_and_writes_nothing(capsys, config_file, without_slurm):
    root = config_file.parent
    words = (
        f"--num-machines 2 --num-processes 1 --seeds 3 --output {root / 'sweep'} --time 1:00:00 "
        "--cpus-per-task 2 --mem 1.5 --partition main --account lab --array-parallelism 2 --sbatch exclude=n9 "
        f"--sbatch exclusive --signal-delay 60 --name probe --dry-run --log-dir {root / 'jobs'} --env"
    ).split()
    before = sorted(root.rglob("*"))
    line = ["launch", "--config-file", str(config_file), *words, "A=it's; rm x", "--setup", "module load cuda"]
    assert main(line) == 0
    assert sorted(root.rglob("*")) == before
    text = capsys.readouterr().out
    script, _, runs = text.partition("\n# not submitted (--dry-run)")
    folder = next(part for part in script.split() if part.startswith("--output=")).removeprefix("--output=")
    folder = str(Path(folder).parent)
    assert folder.startswith(f"{root}/jobs/")
    assert folder.endswith("_probe")
    assert script == (
        f"""#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-2%2
#SBATCH --cpus-per-task=2
#SBATCH --exclude=n9
#SBATCH --exclusive
#SBATCH --job-name=probe
#SBATCH --mem=1536MB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output={folder}/%A_%a_0_log.out
#SBATCH --partition=main
#SBATCH --requeue
#SBATCH --signal=USR2@60
#SBATCH --time=60

# setup
export PYTHONUNBUFFERED=1
export SLURM_KILL_BAD_EXIT=1  # a task that fails ends all
export SRUN_CPUS_PER_TASK=2
export A='it'"'"'s; rm x'
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {folder}/%A_%a_%t_log.out {sys.executable} -u -m submitit.core._submit {folder}
"""
    )
    assert [line.split(" -> ")[1] for line in runs.splitlines() if "->" in line] == [
        f"{root}/sweep/tiny", f"{root}/sweep/tiny_seed1", f"{root}/sweep/tiny_seed2",
    ]  # fmt: skip


def test_gpus_are_asked_for_once(capsys, config_file, without_slurm):
    line = ["launch", "--config-file", str(config_file), "--dry-run", "--time", "10", "--num-gpus", "2"]
    assert main(line) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=2\n" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script
    assert main([*line, "--sbatch", "gres=gpu:a100:2"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gres=gpu:a100:2\n" in script
    assert "gpus-per-node" not in script


def test_sbatch_that_fails_leaves_nothing_behind(capsys, config_file, monkeypatch):
    root = config_file.parent
    (root / "bin").mkdir()
    for name, text in (
        ("sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1"),
        ("srun", ""),
        ("sinfo", "exit 1"),
    ):
        (root / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (root / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    (root / "jobs").mkdir()
    for more in ([], ["--seeds", "2"]):
        message = refused(capsys, config_file, "--time", "10", *more, launcher="slurm")
        assert message == "sbatch refuses: invalid account; nothing was submitted"


def test_the_command_in_launch_json_is_the_line_that_was_given(monkeypatch, config_file):
    seen = {}
    monkeypatch.setattr(command, "run_here", lambda runs, options, words, **more: seen.update(words=words) or 0)
    line = ["train", "--config-file", str(config_file), "--launcher", "debug", "seed=4"]
    assert main(line) == 0
    assert seen["words"] == ["leakfree", *line]
