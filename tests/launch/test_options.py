"""What is asked of a cluster: read from the line, and refused where it cannot be meant."""

import argparse

import pytest

from leakfree.cli import main
from leakfree.launch.options import JobOptions, LaunchError, add_flags, given_flags, options_from


def read(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, default_launcher="slurm")
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30:00", 90), ("0:01:01", 2), ("00:10:30", 11), ("2-00:00:00", 2880), ("1-12:00", 2160)],
)
def test_a_time_limit_in_every_way_people_write_it(text, minutes):
    assert options_from(read("--time", text)).minutes == minutes


@pytest.mark.parametrize("text", ["1:30", "soon", "1h", "-5", "1:2:3", ""])
def test_a_time_limit_that_could_mean_two_things_is_refused(capsys, text):
    assert main(["launch", "--config-file", "x", f"--time={text}"]) == 2
    assert "HH:MM:SS" in capsys.readouterr().err


def test_all_flags_reach_the_options():
    words = (
        "--launcher local --partition gpu --constraint a100 --time 60 --cpus-per-task 4 --mem 1.5 --account lab "
        "--qos low --array-parallelism 3 --name probe --log-dir logs --max-requeues 5 --signal-delay 30 "
        "--preflight-seconds 20 --sbatch exclude=n1 --sbatch=--mail_type=END --sbatch exclusive "
        "--env A=b=c --env B= --setup"
    )
    assert options_from(read(*words.split(), "module load cuda")) == JobOptions(
        launcher="local", partition="gpu", constraint="a100", minutes=60, cpus_per_task=4, mem_gb=1.5, account="lab",
        qos="low", array_parallelism=3, name="probe", log_dir="logs", max_requeues=5, signal_delay=30,
        preflight_seconds=20, sbatch={"exclude": "n1", "mail-type": "END", "exclusive": True},
        env={"A": "b=c", "B": ""}, setup=("module load cuda",),
    )  # fmt: skip


def test_nothing_given_is_the_default():
    assert options_from(read()) == JobOptions()
    assert given_flags(read()) == []
    assert given_flags(read("--dry-run", "--mem", "2")) == ["--dry-run", "--mem"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cpus-per-task", "0"], "--cpus-per-task: must be at least 1, got 0"),
        (["--mem", "0"], "--mem: must be a positive number of GB"),
        (["--mem", "nan"], "--mem: must be a positive number of GB"),
        (["--time", "0"], "--time: must be at least 1"),
        (["--time", "1", "--signal-delay", "60"], "--signal-delay: 60 seconds before the end is before the start"),
        (["--max-requeues", "-1"], "--max-requeues: must be at least 0"),
        (["--name", "a b"], "--name: got 'a b'"),
        (["--env", "PATH"], "--env: got 'PATH', expects NAME=VALUE"),
        (["--env", "A-B=1"], "'A-B' cannot be the name of a variable"),
        (["--env", "A=1", "--env", "A=2"], "--env: A is given twice"),
        (["--env", "RANK=1"], "--env: RANK is set for each rank"),
        (["--env", "A=1\nrm -rf x"], "--env A: must be one line"),
        (["--sbatch", "nodes=2"], "--sbatch nodes: is given by --num-machines"),
        (["--sbatch=--ntasks_per_node=2"], "--sbatch ntasks-per-node: is given by --num-gpus or --num-processes"),
        (["--sbatch", "output=x"], "--sbatch output: is given by --log-dir"),
        (["--sbatch", "x=1\n#SBATCH --uid=0"], "--sbatch x: must be one line"),
        (["--sbatch", "a b=1"], "'a b' is no option of sbatch"),
        (["--partition", "a\nb"], "--partition: must be one line"),
        (["--setup", "a\nb"], "--setup: must be one line"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_flag(words, told):
    with pytest.raises(LaunchError) as error:
        options_from(read(*words))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--config-file", "x", "--partition", "gpu"], "--partition is for jobs: add --launcher slurm"),
        (["train", "--config-file", "x", "--dry-run"], "--dry-run is for jobs"),
        (["train", "--config-file", "x", "--launcher", "debug", "--eval-only"], "--launcher exclude each other"),
        (["launch"], "--config-file FILE is required"),
        (["launch", "--config-file", "x", "--launcher", "pbs"], "invalid choice: 'pbs'"),
        (["launch", "--config-file", "x", "--nodes", "2"], "unknown argument '--nodes'"),
    ],
)
def test_the_command_says_which_flag_is_wrong(capsys, words, told):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert told in err
