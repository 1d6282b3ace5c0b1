"""Real processes: what ends them, and what is told then."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from leakfree.config.schema import TrainerConfig
from leakfree.errors import ConfigError, DataError
from leakfree.training import ranks
from leakfree.training.ranks import RankError, RankPlan, plan_ranks, run_ranks, threads_per_rank, usable_cores

TWO = RankPlan(world_size=2, local_size=2, gpus=False, joined=False)


def _sum_ranks(folder):
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    text = f"{total.item()} {' '.join(os.environ[name] for name in names)}"
    (Path(folder) / str(dist.get_rank())).write_text(text)


def _fail_on_one(how):
    """Rank 1 fails while rank 0 waits for it."""
    if dist.get_rank() == 1:
        if how == "mistake":
            raise DataError("image 7 is broken")
        if how == "bug":
            raise KeyError("a bug of ours")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_ranks_meet_in_one_process_group(tmp_path):
    run_ranks(TWO, _sum_ranks, str(tmp_path))
    assert (tmp_path / "0").read_text() == "3.0 0 0 2 2 0"
    assert (tmp_path / "1").read_text() == "3.0 1 1 2 2 0"
    assert "RANK" not in os.environ


def test_a_signal_for_a_rank_that_has_just_ended_hides_nothing_of_it():
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
    process.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    ranks._hand_on("SIGTERM", [process])
    assert ranks._has_ended(process)
    process.join()
    assert process.exitcode == 3


def _tell_start_method(folder):
    (Path(folder) / str(dist.get_rank())).write_text(multiprocessing.get_start_method())


def test_loaders_of_a_rank_start_their_processes_as_those_of_one_process_do(tmp_path):
    """A rank is spawned; its loaders' processes would be too, seconds for each of them."""
    run_ranks(TWO, _tell_start_method, str(tmp_path))
    assert {(tmp_path / rank).read_text() for rank in "01"} == {multiprocessing.get_start_method()}


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("mistake", DataError, r"^image 7 is broken$"),
        ("bug", RankError, r"rank 1 failed; the other ranks have been ended(.|\n)*KeyError: 'a bug of ours'"),
        ("kill", RankError, r"^rank 1 was killed by SIGKILL .*; the other ranks have been ended$"),
    ],
)
def test_the_first_failure_ends_all_ranks_and_is_the_one_told(how, error, words):
    began = time.monotonic()
    with pytest.raises(error, match=words):
        run_ranks(TWO, _fail_on_one, how)
    assert time.monotonic() - began < 60


WAITING = """
import os, sys, time
from pathlib import Path
from leakfree.training.ranks import RankPlan, run_ranks

def wait(folder):
    import torch.distributed as dist
    Path(folder, f"{dist.get_rank()}.tmp").write_text(str(os.getpid()))
    os.rename(Path(folder, f"{dist.get_rank()}.tmp"), Path(folder, f"{dist.get_rank()}.pid"))
    time.sleep(300)

if __name__ == "__main__":
    run_ranks(RankPlan(2, 2, False, False), wait, sys.argv[1])
"""


def _is_gone(pid):
    """Ended, or a zombie that whoever adopted it has not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how", ["ctrl-c", "kill -9"])
def test_no_rank_outlives_the_process_that_started_it(tmp_path, how):
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True)
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in files]
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # the whole foreground group, as a terminal does
    else:
        process.kill()
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    if how == "ctrl-c":
        assert errors.count("Traceback") == 1  # of this script, which does not catch it; none of a rank
        assert "KeyboardInterrupt" in errors
    while not all(_is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)


def test_a_plan_counts_processes_or_joins_those_of_a_launcher(monkeypatch):
    assert plan_ranks(TrainerConfig(num_processes=2)) == RankPlan(2, 2, False, False)
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    plan = plan_ranks(TrainerConfig())
    assert plan == RankPlan(8, 4, False, True)
    assert plan.num_nodes == 2


def test_a_plan_that_cannot_be(monkeypatch):
    with pytest.raises(ConfigError, match=r"num_gpus: 99 GPUs asked for, this machine has \d+"):
        plan_ranks(TrainerConfig(num_gpus=99))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="16 images cannot be shared evenly by 3 ranks"):
        plan_ranks(TrainerConfig())


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("WORLD_SIZE", "two", 1),
        ("WORLD_SIZE", "0", 1),
        ("WORLD_SIZE", "", 1),
        ("RANK", "0.5", 0),
        ("LOCAL_RANK", "-1", 0),
        ("LOCAL_WORLD_SIZE", "all", 1),
    ],
)
def test_what_a_launcher_got_wrong_is_one_line(monkeypatch, name, value, least):
    for key, right in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(right))
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"variable {name}: got {value!r}, must be .* at least {least}; ") as caught:
        plan_ranks(TrainerConfig())
    assert "\n" not in str(caught.value)


def test_threads_are_shared_by_the_ranks_of_a_machine():
    cores = len(os.sched_getaffinity(0))
    assert 0 < usable_cores() <= cores
    assert threads_per_rank(TWO, 3) == 3
    assert 1 <= threads_per_rank(TWO, 0) <= max(1, cores // 2)
    assert threads_per_rank(RankPlan(999, 999, False, False), 0) == 1
