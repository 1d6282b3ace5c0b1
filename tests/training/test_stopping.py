"""Runs that are sent signals at any moment, by the command that goes on with them until they are whole."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from leakfree.data import Loader
from leakfree.records import read_record
from leakfree.training import Stopped
from leakfree.training.agreement import Agreement
from leakfree.training.stopping import StopAsked, listening, received
from tests.ranks import run_ranks
from tests.runs import same, weights_of

pytestmark = pytest.mark.alone

STOPPABLE = Path(__file__).with_name("stoppable.py")
SETTINGS = [
    "schedule.max_steps=10",
    "trainer.checkpoint_period=5",
    "trainer.log_period=4",
    "trainer.eval_period=4",
    "trainer.keep_checkpoints=20",
    "evaluation.images_per_batch=1",
    "evaluation.max_images=4",
]


def _environment(**more):
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **more}


def _command(config_file, folder, *overrides):
    words = ["train", "--config-file", str(config_file), "--resume", f"output_dir={folder}"]
    return [sys.executable, str(STOPPABLE), *words, *SETTINGS, *overrides]


def run(config_file, folder, *overrides, strike=""):
    """The exit code and what stood on stderr."""
    done = subprocess.run(
        _command(config_file, folder, *overrides),
        env=_environment(STRIKE=strike),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stderr


def stopped(config_file, folder, *overrides, strike, saved):
    code, errors = run(config_file, folder, *overrides, strike=strike)
    assert code == 75, errors
    where = f"step {saved} of 10 is saved in {folder}" if saved else "no step was done, nothing is saved"
    lines = [f"stopped by {name}: {where}; the same command with --resume goes on from there" for name in NAMES]
    assert errors in [f"leakfree: {line}\n" for line in lines]
    assert (folder / "log.txt").read_text().endswith(tuple(f"{line}\n" for line in lines))
    if (folder / "record.json").exists():
        assert read_record(folder).status == "interrupted"
    names = [path.name for path in folder.glob("checkpoint_*.pt")]
    if saved and saved < 10:
        assert max(names) == f"checkpoint_{saved:07d}.pt"


NAMES = ("SIGUSR2", "SIGTERM")


def assert_whole(folder, whole, read_rows):
    """Bitwise the run that no signal reached, but for times."""
    assert same(weights_of(folder), weights_of(whole))
    assert [_untimed(row) for row in read_rows(folder)] == [_untimed(row) for row in read_rows(whole)]
    assert read_record(folder).status == "finished"
    assert read_record(folder).results == read_record(whole).results


def _untimed(row):
    return {name: value for name, value in row.items() if not name.endswith("_per_step") and name != "peak_memory_mib"}


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(config_file, folder / "1") == (0, "")
    return folder / "1"


@pytest.fixture(scope="module")
def whole_of_two(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(config_file, folder / "2", "trainer.num_processes=2") == (0, "")
    return folder / "2"


@pytest.mark.slow
def test_one_process_stopped_at_every_moment_is_the_undisturbed_run(config_file, tmp_path, whole, read_rows):
    folder = tmp_path / "run"
    stopped(config_file, folder, strike="loading|parent|SIGTERM", saved=0)
    stopped(config_file, folder, strike="update 2|parent|SIGUSR2", saved=2)
    stopped(config_file, folder, strike="validation|parent|SIGTERM SIGUSR2", saved=4)
    stopped(config_file, folder, strike="save 5|parent|SIGTERM SIGTERM SIGUSR2", saved=6)
    stopped(config_file, folder, strike="save 10|parent|SIGUSR2", saved=10)
    stopped(config_file, folder, strike="evaluation|parent|SIGTERM", saved=10)
    assert run(config_file, folder, strike="leaving|parent|SIGTERM SIGUSR2") == (0, "")
    assert_whole(folder, whole, read_rows)


@pytest.mark.slow
def test_two_ranks_stopped_at_every_moment_are_the_undisturbed_run(config_file, tmp_path, whole_of_two, read_rows):
    folder, two = tmp_path / "run", "trainer.num_processes=2"
    stopped(config_file, folder, two, strike="loading|rank 1|SIGTERM", saved=0)
    stopped(config_file, folder, two, strike="forward 2|rank 1|SIGUSR2", saved=2)  # to be told in time for step 2
    stopped(config_file, folder, two, strike="update 3|rank 0|SIGTERM", saved=4)
    stopped(config_file, folder, two, strike="validation|rank 1|SIGTERM", saved=4)
    stopped(config_file, folder, two, strike="evaluation|rank 1|SIGUSR2", saved=10)
    assert run(config_file, folder, two) == (0, "")
    assert_whole(folder, whole_of_two, read_rows)


@pytest.mark.slow
def test_signals_to_every_process_of_a_run_with_loaders(config_file, tmp_path, whole_of_two, read_rows):
    folder, settings = tmp_path / "run", ["trainer.num_processes=2", "data.num_workers=1"]
    stopped(config_file, folder, *settings, strike="save 5|all|SIGTERM SIGUSR2 SIGTERM", saved=6)
    stopped(config_file, folder, *settings, strike="validation|all|SIGUSR2 SIGTERM", saved=8)
    assert run(config_file, folder, *settings, strike="leaving|all|SIGTERM SIGUSR2") == (0, "")
    assert_whole(folder, whole_of_two, read_rows)


def test_the_process_that_watches_hands_a_signal_on_to_the_ranks(config_file, tmp_path):
    """From the first moment on: while it reads the config, while ranks start, while they train."""
    folder = tmp_path / "run"
    endless = ["trainer.num_processes=2", "schedule.max_steps=100000", "trainer.checkpoint_period=100000"]
    process = subprocess.Popen(
        _command(config_file, folder, *endless), env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (newest,) = folder.glob("*.pt")
    assert f"stopped by SIGTERM: step {int(newest.stem[-7:])} of 100000 is saved" in errors.decode()


@pytest.mark.slow
def test_ranks_of_a_launcher_all_raise_stopped(config_file, tmp_path, whole_of_two, read_rows):
    folder = tmp_path / "run"
    moments = ["forward 3|rank 1|SIGTERM", "evaluation|rank 1|SIGUSR2", ""]
    for moment, where in zip(moments, ["step 3 of 10", "step 10 of 10", ""], strict=True):
        port = _free_port()
        ranks = [
            subprocess.Popen(
                _command(config_file, folder, "trainer.num_processes=2"),
                env=_environment(
                    STRIKE=moment,
                    JOINED="1",
                    RANK=str(rank),
                    WORLD_SIZE="2",
                    LOCAL_WORLD_SIZE="2",
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                ),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == ([75, 75] if where else [0, 0]), errors
        assert all(where in text for text in errors)
    assert_whole(folder, whole_of_two, read_rows)


def _free_port():
    """A port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ------------------------------------------------------------------------------------------ the parts


def _uneven(rank, world_size, signalled, batches):
    """How each rank leaves two loops over batches, when rank ``signalled`` hears a signal in the first."""
    with listening():
        agreement = Agreement()
        seen = []
        try:
            for loop in range(2):
                for index in agreement.track(range(batches[rank]), "a loop"):
                    seen.append((loop, index))
                    if rank == signalled and loop == 0 and index == batches[rank] - 1:
                        os.kill(os.getpid(), signal.SIGUSR2)
                    time.sleep(0.02)
        except StopAsked as stop:
            return stop.signal_name, seen
        return "", seen


@pytest.mark.parametrize(("signalled", "batches"), [(0, (1, 500)), (1, (500, 2)), (0, (3, 3))])
def test_ranks_with_unlike_numbers_of_batches_stop_together(signalled, batches):
    began = time.monotonic()
    found = run_ranks(_uneven, 2, signalled, batches)
    assert [name for name, _ in found] == ["SIGUSR2", "SIGUSR2"]
    assert all(loop == 0 for _, seen in found for loop, _ in seen)  # none has gone on to the next
    assert all(len(seen) < 400 for _, seen in found)
    assert time.monotonic() - began < 30


def _leaves_early(rank, world_size):
    agreement = Agreement()
    for index in agreement.track(range(10), "a loop"):
        if rank == 1 and index == 2:
            break
    return True


def test_nobody_waits_for_a_rank_that_leaves_a_loop_early():
    began = time.monotonic()
    assert run_ranks(_leaves_early, 2) == [True, True]
    assert time.monotonic() - began < 25


def _orders_exchanges(rank, world_size):
    """As on GPUs: the exchange of a step is only ordered, and waited for in the next one."""
    with listening():
        agreement, ordered = Agreement(ahead=1), None
        agreement.meet()
        for step in range(1, 20):
            if ordered is not None:
                ordered.wait()
            if rank == 1 and step == 3:
                time.sleep(0.5)  # the other one is at the end of this step
                os.kill(os.getpid(), signal.SIGUSR2)
            agreement.before_exchange(step)
            ordered = dist.all_reduce(torch.ones(1), async_op=True)
            if agreement.after_step(step):
                ordered.wait()
                return step
    return 0


def test_ranks_that_run_ahead_of_their_exchanges_stop_after_the_same_step():
    assert run_ranks(_orders_exchanges, 2, timeout=20) == [4, 4]


def test_signals_only_set_a_flag_and_handlers_are_put_back():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with listening():
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
            with listening():  # inside another it changes nothing
                assert received() == "SIGUSR2"
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == "SIGUSR2"
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
        assert received() == ""
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_stopped_travels_between_processes():
    stop = pickle.loads(pickle.dumps(Stopped("SIGTERM", "step 5 of 10 is saved in output")))
    assert str(stop) == (
        "stopped by SIGTERM: step 5 of 10 is saved in output; the same command with --resume goes on from there"
    )
    assert (stop.signal_name, stop.where) == ("SIGTERM", "step 5 of 10 is saved in output")


class _Pids(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return os.getpid()


LOADING = """
import sys, time
from tests.training.test_stopping import _Pids
from leakfree.data import Loader

if __name__ == "__main__":
    batches = iter(Loader(_Pids(), num_workers=2))
    print(next(batches).item(), next(batches).item(), flush=True)
    sys.stdin.readline()
    print(sum(1 for _ in batches), flush=True)
    sys.stdin.readline()
"""


def test_loader_processes_outlast_signals_and_end_with_their_parent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING], env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(set(pids)) == 2
    for name in ("SIGTERM", "SIGUSR2", "SIGTERM"):
        for pid in pids:
            os.kill(pid, signal.Signals[name])
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "998\n"  # not one batch is missing
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


STARTING = """
import os, sys, time
from tests.training.test_stopping import _Pids
from leakfree.data import Loader

if __name__ == "__main__":
    os.register_at_fork(after_in_child=lambda: (print(os.getpid(), flush=True), time.sleep(1)))
    loader = iter(Loader(_Pids(), num_workers=2))
    sys.stdin.readline()
"""


def test_loader_processes_whose_parent_is_killed_while_they_start_end_too():
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING], env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 15
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if _runs(pid)]
        time.sleep(0.05)


def test_a_loader_process_that_hangs_is_ended_by_its_parent():
    loader = iter(Loader(_Pids(), num_workers=1, persistent_workers=True))
    next(loader)
    (worker,) = loader._workers
    subprocess.run(["kill", "-s", "TERM", str(worker.pid)], check=True)
    worker.join(timeout=0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rows_go_on_where_a_checkpoint_was_saved(whole, read_rows):
    """What the comparisons above stand on: rows of journal and of evaluations, in order."""
    rows = read_rows(whole)
    assert [row["step"] for row in rows] == [4, 4, 8, 8, 10]
    assert ["bbox/AP" in row for row in rows] == [False, True, False, True, False]
    assert json.loads((whole / "record.json").read_text())["status"] == "finished"
