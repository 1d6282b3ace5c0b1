"""A dead or stuck rank ends the whole run in bounded time, and the right one is named: real processes, real signals.

The same faults in ranks that a process of ours supervises, and in ranks that a launcher has made.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leakfree.errors import DataError
from leakfree.training import Stopped
from leakfree.training.board import LOST, Board, BoardError
from leakfree.training.ranks import RankPlan, run_ranks
from leakfree.training.watchdog import Ending, RankError, Watchdog, first_cause, longest_patience, progress

PATIENCE = 3.0  # seconds, of every run here
BOUND = 60  # seconds in which a run must have ended; nearly all of it is the start on a busy machine

# Ranks that meet three times, with a fault in one of them; they say when they are at it.
FAULTS = """
import os, signal, sys, time
from pathlib import Path


def work(folder, fault, culprit):
    import torch
    import torch.distributed as dist
    from leakfree.errors import DataError
    from leakfree.training.watchdog import progress

    rank = dist.get_rank()
    for step in range(1, 4):
        progress(f"step {step}")
        dist.all_reduce(torch.ones(1))
    Path(folder, f"{rank}.tmp").write_text(str(os.getpid()))
    os.rename(Path(folder, f"{rank}.tmp"), Path(folder, f"{rank}.pid"))
    if rank == culprit:
        globals()[fault](folder)
    else:
        dist.all_reduce(torch.ones(1))
        dist.barrier()
        dist.all_reduce(torch.ones(2))


def bug(folder):
    raise KeyError("a bug of ours")


def mistake(folder):
    from leakfree.errors import DataError
    raise DataError("image 7 is broken")


def waits_for_a_signal(folder):
    import torch
    import torch.distributed as dist
    time.sleep(60)


def endless_loop(folder):
    count = 0
    while True:
        count += 1


class Hangs:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(600)


def hanging_data(folder):
    import torch
    for batch in torch.utils.data.DataLoader(Hangs()):
        pass


def hanging_worker(folder):
    import torch
    loader = torch.utils.data.DataLoader(Hangs(), num_workers=1, multiprocessing_context="fork")
    batches = iter(loader)
    Path(folder, "worker.pid").write_text(str(batches._workers[0].pid))
    next(batches)


def dies_with_a_hanging_worker(folder):
    import torch
    batches = iter(torch.utils.data.DataLoader(Hangs(), num_workers=1, multiprocessing_context="fork"))
    Path(folder, "worker.pid").write_text(str(batches._workers[0].pid))
    os.kill(os.getpid(), signal.SIGKILL)


def skips_a_collective(folder):
    import torch.distributed as dist
    dist.barrier()


def leaves_early(folder):
    pass


def holds_the_interpreter(folder):
    import ctypes
    ctypes.PyDLL(None).sleep(600)  # no other thread of Python can run


if __name__ == "__main__":
    from leakfree.cli import main
    import leakfree.cli
    from leakfree.training.ranks import RankPlan, run_ranks

    joined, folder, fault, culprit, size, patience, join_within = sys.argv[1:]
    plan = RankPlan(int(size), int(size), False, joined == "joined", float(patience), float(join_within))
    leakfree.cli._run = lambda argv: run_ranks(plan, work, folder, fault, int(culprit)) or 0
    sys.exit(main([]))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """The processes of one run, supervised or joined, each in a session of its own and with its own files."""

    def __init__(self, folder, command, how, size, *, only=None):
        self.folder = folder
        paths = [str(Path(__file__).parents[2]), str(folder), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        self.processes = []
        for rank in (only or range(size)) if how == "joined" else [0]:
            more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
            with (folder / f"{rank}.err").open("w") as errors, (folder / f"{rank}.out").open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=environment | (ranks | more if how == "joined" else {}),
                        stderr=errors,
                        stdout=output,
                        start_new_session=True,
                    )
                )

    def pid(self, name, within=BOUND):
        """The process that wrote ``name.pid``, once it has."""
        deadline = time.monotonic() + within
        file = self.folder / f"{name}.pid"
        while not file.exists():
            assert time.monotonic() < deadline, self.texts()
            time.sleep(0.02)
        return int(file.read_text())

    def texts(self):
        return {file.stem: file.read_text() for file in sorted(self.folder.glob("*.err"))}

    def ended(self, within=BOUND):
        """Exit codes and what each process wrote to stderr, once all have ended."""
        deadline = time.monotonic() + within
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return codes, self.texts()


@pytest.fixture
def job(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)

    def start(how, fault, culprit, size=2, *, join_within=120.0, only=None):
        arguments = [how, str(tmp_path), fault, str(culprit), str(size), str(PATIENCE), str(join_within)]
        return Job(tmp_path, [str(tmp_path / "faults.py"), *arguments], how, size, only=only)

    return start


def is_gone(pid):
    """Ended, or a zombie that whoever adopted it has not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pids, within=15):
    deadline = time.monotonic() + within
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if not is_gone(pid)]
        time.sleep(0.05)


HOW = pytest.mark.parametrize("how", ["supervised", "joined"])


@HOW
def test_an_exception_ends_all_with_its_traceback_and_no_noise_of_the_others(job, how):
    codes, texts = job(how, "bug", 1, size=3).ended()
    assert set(codes) == {1}
    assert "KeyError: 'a bug of ours'" in texts["0"]
    assert "rank 1 failed; the other ranks have been ended. Its traceback:" in texts["0"]
    assert not any("losed by peer" in text for text in texts.values())
    if how == "joined":
        assert "KeyError: 'a bug of ours'" in texts["1"]
        assert texts["2"] == "leakfree: failed: rank 1 failed; the other ranks have been ended.\n"
