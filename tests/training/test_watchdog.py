"""A dead or stuck rank ends the whole run in bounded time, and the right one is named: real processes, real signals.

The same faults in ranks that a process of ours supervises, and in ranks that a launcher has made.
"""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from leakfree.config.schema import TrainerConfig
from leakfree.errors import DataError
from leakfree.records import read_record
from leakfree.training import Stopped, train
from leakfree.training.board import LOST, Board, BoardError
from leakfree.training.endings import GONE, STUCK, TRACEBACK, Ending, MachineLost, RankError, first_cause
from leakfree.training.ranks import RankPlan, plan_ranks, run_ranks
from leakfree.training.stacks import place_of
from leakfree.training.watchdog import at_end, progress

pytestmark = pytest.mark.alone

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
    time.sleep(1)  # the others have heard of it
    progress("step 4")
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


def stops(folder):
    from leakfree.training import Stopped
    raise Stopped("SIGUSR2", "step 4 of 9 is saved")


def waits_for_a_signal(folder):
    time.sleep(600)


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


def holds_the_interpreter(folder):
    import ctypes
    ctypes.PyDLL(None).sleep(600)  # no other thread of Python can run


if __name__ == "__main__":
    from leakfree.cli import main
    import leakfree.cli
    from leakfree.training import board
    board._GONE_AFTER = int(os.environ.get("GONE_AFTER", board._GONE_AFTER))
    from leakfree.training.ranks import RankPlan, run_ranks

    joined, folder, fault, culprit, size, patience, join_within = sys.argv[1:]
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    plan = RankPlan(int(size), local_size, False, joined == "joined", float(patience), float(join_within))
    leakfree.cli._run = lambda argv, own: run_ranks(plan, work, folder, fault, int(culprit)) or 0
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
            assert all(process.poll() is None for process in self.processes), self.texts()
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


@pytest.fixture
def two_machines():
    """The names of two network name spaces and their addresses, joined by a cable."""
    names = [f"leakfree{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making a network needs root and iproute2")
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
                pytest.skip("this machine lets nobody make a network")
        cable = ["type", "veth", "peer", "name", "leakfree0", "netns", names[1]]
        _ip("-n", names[0], "link", "add", "leakfree0", *cable)
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "leakfree0")
            for device in ("lo", "leakfree0"):
                _ip("-n", name, "link", "set", device, "up")
        yield names, addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words):
    subprocess.run(["ip", *words], check=True)


HOW = pytest.mark.parametrize("how", ["supervised", "joined"])
SLOW = pytest.mark.slow


def test_a_machine_that_does_not_answer_is_told_from_a_rank_that_was_killed(tmp_path, two_machines):
    """Not only to the user: a job whose machine is lost goes back into the queue."""
    (tmp_path / "faults.py").write_text(FAULTS)
    names, addresses = two_machines
    shared = {"MASTER_ADDR": addresses[0], "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    arguments = ["joined", str(tmp_path), "waits_for_a_signal", "1", "2", "300", "120"]
    processes = []
    for rank, name in enumerate(names):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank), "GONE_AFTER": "2000"}
        paths = [str(Path(__file__).parents[2]), str(tmp_path)]
        environment = {**os.environ, **shared, **own, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = ["ip", "netns", "exec", name, sys.executable, str(tmp_path / "faults.py"), *arguments]
        with (tmp_path / f"{rank}.err").open("w") as errors:
            processes.append(subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True))
    try:
        deadline = time.monotonic() + BOUND
        while not (tmp_path / "1.pid").exists():
            assert time.monotonic() < deadline, (tmp_path / "1.err").read_text()
            time.sleep(0.05)
        _ip("-n", names[1], "link", "set", "leakfree0", "down")
        assert [process.wait(BOUND) for process in processes] == [1, 1]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for rank in (0, 1):
        told = (tmp_path / f"{rank}.err").read_text()
        assert re.search(rf"rank {1 - rank}( on \S+)? does not answer any more \(its machine is down, or the net", told)


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


def test_a_mistake_of_the_user_stays_one_line_and_exit_code_2_on_every_rank(job):
    codes, texts = job("joined", "mistake", 1).ended()
    assert set(codes) == {2}
    assert {text for name, text in texts.items()} == {"leakfree: error: image 7 is broken\n"}


@SLOW
@HOW
def test_a_rank_that_stops_as_asked_is_no_failure(job, how):
    codes, texts = job(how, "stops", 1).ended()
    assert set(codes) == {75}
    words = "leakfree: stopped by SIGUSR2: step 4 of 9 is saved; the same command with --resume goes on from there\n"
    assert set(texts.values()) == {words}


@pytest.mark.parametrize(("how", "culprit"), [("supervised", 0), ("joined", 0), ("joined", 1)])
def test_a_killed_rank_is_named(job, how, culprit):
    run = job(how, "waits_for_a_signal", culprit, size=3)
    pids = [run.pid(rank) for rank in range(3)]
    began = time.monotonic()
    os.kill(pids[culprit], signal.SIGKILL)
    codes, texts = run.ended()
    assert time.monotonic() - began < 15
    wait_gone(pids)
    told = texts["0" if how == "supervised" or culprit else "1"]
    assert "Traceback" not in "".join(texts.values())
    if how == "supervised":
        assert codes == [1]
        assert f"rank {culprit} was killed by SIGKILL" in told
    else:
        assert [code for rank, code in enumerate(codes) if rank != culprit] == [1, 1]
        assert told == f"leakfree: failed: rank {culprit} is gone (killed, or its machine is); " + (
            "the other ranks have been ended\n"
        )


@pytest.mark.parametrize(("how", "culprit"), [("supervised", 1), ("joined", 0), pytest.param("joined", 1, marks=SLOW)])
def test_a_stopped_rank_gives_no_sign_and_is_ended_too(job, how, culprit):
    run = job(how, "waits_for_a_signal", culprit)
    pids = [run.pid(rank) for rank in range(2)]
    began = time.monotonic()
    os.kill(pids[culprit], signal.SIGSTOP)
    codes, texts = run.ended()
    assert time.monotonic() - began < 30
    wait_gone(pids)
    assert set(codes) <= {1, -signal.SIGKILL}
    assert 1 in codes
    told = texts["1" if how == "joined" and culprit == 0 else "0"]
    assert re.search(rf"rank {culprit} gives no sign since \d+ s", told), told
    assert "in all_reduce (" in told


@pytest.mark.parametrize(
    ("how", "fault", "doing"),
    [
        ("supervised", "hanging_worker", "data loading"),
        ("joined", "hanging_worker", "data loading"),
        ("joined", "endless_loop", "endless_loop"),
        pytest.param("joined", "waits_for_a_signal", "waits_for_a_signal", marks=SLOW),
        pytest.param("supervised", "hanging_data", "data loading", marks=SLOW),
    ],
)
def test_a_stuck_rank_is_named_with_the_collective_that_waits_for_it(job, how, fault, doing):
    run = job(how, fault, 1, size=3)
    pids = [run.pid(rank) for rank in range(3)] + ([run.pid("worker")] if "worker" in fault else [])
    began = time.monotonic()
    codes, texts = run.ended()
    assert time.monotonic() - began < 30
    wait_gone(pids)
    assert set(codes) == {1}
    first = texts["0"].partition("\n")[0]
    assert re.fullmatch(
        r"leakfree: failed: stuck for \d+ s at step 4: ranks 0, 2 wait in all_reduce \(\S*faults.py:\d+\); "
        rf"rank 1 did not arrive: it is in {doing} \(\S*faults.py:\d+\); all ranks have been ended",
        first,
    ), first
    assert texts["0"].count("Python stack of rank 1:") == 1
    assert f"in {fault}" in texts["0"]
    assert "losed by peer" not in "".join(texts.values())
    if how == "joined":
        assert texts["2"] == f"{first}\n"  # the whole is told once


def test_ranks_in_different_collectives(job):
    codes, texts = job("joined", "skips_a_collective", 1).ended()
    assert set(codes) == {1}
    assert re.search(r"the ranks wait in different collectives: rank 0 waits in all_reduce", texts["0"]), texts["0"]
    assert re.search(r"; rank 1 waits in barrier \(\S*faults.py:\d+\)", texts["0"])


@HOW
def test_a_killed_rank_is_noticed_though_its_loader_processes_live(job, how):
    run = job(how, "dies_with_a_hanging_worker", 1)
    worker = run.pid("worker")
    began = time.monotonic()
    _, texts = run.ended()
    assert time.monotonic() - began < 15
    assert "rank 1 was killed by SIGKILL" in texts["0"] or "rank 1 is gone" in texts["0"]
    if how == "joined":
        os.kill(worker, signal.SIGKILL)  # the launcher's business
    wait_gone([worker])


@SLOW
def test_a_rank_that_hangs_in_native_code_is_named_and_ended(job):
    run = job("joined", "holds_the_interpreter", 1)
    pids = [run.pid(rank) for rank in range(2)]
    codes, texts = run.ended()
    wait_gone(pids)
    assert codes == [1, -signal.SIGKILL]
    assert re.search(r"rank 1 gives no sign since \d+ s", texts["0"])


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_never_joins_is_named(job, absent):
    present = [rank for rank in range(3) if rank != absent]
    codes, texts = job("joined", "bug", 1, size=3, join_within=8, only=present).ended()
    assert set(codes) == {1}
    for rank in present:
        words = (
            "only 2 of 3 ranks arrived within 8 s: missing rank 2;" if absent else "rank 0 is missing: nothing answers"
        )
        assert words in texts[str(rank)]
        assert "Traceback" not in texts[str(rank)]


def test_a_suspended_run_goes_on(job):
    """All ranks stand still for longer than the patience, as on a laptop that sleeps."""
    run = job("joined", "waits_for_a_signal", 1)
    pids = [run.pid(rank) for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(PATIENCE + 2)
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    _, texts = run.ended()
    assert re.search(r"rank 1 did not arrive: it is in waits_for_a_signal", texts["0"]), texts  # not: gives no sign
    assert time.monotonic() - began > PATIENCE / 3  # the rest of the patience, once it goes on


# ------------------------------------------------------------------------------- whole trainings

# A training whose data stands still at its third batch, on rank CULPRIT.
HANGS = """
import os, sys, time
from leakfree.cli import main
from leakfree.training.detection import DetectionTask

given = DetectionTask.train_batches


def train_batches(self, start_step):
    for number, batch in enumerate(given(self, start_step)):
        if number == 2 and os.environ.get("RANK", "0") == os.environ["CULPRIT"]:
            time.sleep(600)
        yield batch


DetectionTask.train_batches = train_batches
if __name__ == "__main__":
    sys.exit(main(["train", "--config-file", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("how", "size"), [("supervised", 1), ("supervised", 2), ("joined", 2)])
def test_a_training_whose_data_stands_still(tmp_path, config_file, monkeypatch, how, size):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("CULPRIT", str(size - 1))
    output = tmp_path / "run"
    overrides = [f"output_dir={output}", f"trainer.num_processes={size}", f"trainer.stuck_after={PATIENCE}"]
    run = Job(tmp_path, [str(tmp_path / "hangs.py"), str(config_file), *overrides], how, size)
    codes, texts = run.ended(2 * BOUND)
    assert set(codes) == {1}, texts
    arrived = "did not arrive: " if size > 1 else ""
    words = rf"rank {size - 1} {arrived}it is in train_batches \(\S*hangs.py:\d+\)"
    waits = r"rank 0 waits in the gradient all-reduce of backward \(leakfree/\S+:\d+\); " if size > 1 else ""
    report = rf"failed: stuck for \d+ s at step 3: {waits}{words}; all ranks have been ended\nPython stack of rank"
    assert len(re.findall(report, texts["0"])) == 1, texts["0"]
    assert len(re.findall(report, (output / "log.txt").read_text())) == 1
    assert read_record(output).status == "interrupted"
    assert (output / "checkpoint_0000002.pt").exists()


def test_watching_leaves_nothing_behind(tmp_path, make_config):
    def held():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    train(make_config("first"))
    before = held()
    train(make_config("second"))
    assert held() == before
    with pytest.raises(KeyError, match="ours"):
        run_ranks(RankPlan(1, 1, False, False), _bug)
    assert held() == before


def _bug():
    raise KeyError("ours")


# ------------------------------------------------------------------------------------- the parts


def test_of_several_endings_the_cause_is_told():
    mistake = Ending.of(2, DataError("image 7 is broken"))
    stuck, gone = Ending(-1, STUCK, "stuck", when=3.0), Ending(1, GONE, "rank 1 is gone", when=2.0)
    first, second = Ending(0, TRACEBACK, "first", when=4.0), Ending(3, TRACEBACK, "second", when=5.0)
    stopped = Ending.of(1, Stopped("SIGTERM", "step 3 is saved"))
    rising = [stopped, second, first, gone, stuck, mistake]
    for number in range(1, len(rising) + 1):
        assert first_cause(rising[:number]) is rising[number - 1]
        assert first_cause(rising[:number][::-1]) is rising[number - 1]


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("image 7"), 2), (Stopped("SIGTERM", "here"), 75), (KeyboardInterrupt(), 130), (OSError("disk"), 1)],
)
def test_an_ending_becomes_an_error_again(error, code):
    ending = Ending.of(1, error)
    again = ending.error()
    assert ending.exit_code == code
    if code == 1:
        assert isinstance(again, RankError)
        assert "OSError: disk" in str(again)
        assert "\n" not in ending.brief().text
    else:
        assert type(again) is type(error)
        assert str(error) in str(again)


def test_a_lost_machine_becomes_an_error_that_names_its_rank_and_travels():
    lost = Ending.lost(3, " on n2", silent=True)
    error = pickle.loads(pickle.dumps(lost.brief().error()))
    assert (type(error), error.rank, lost.exit_code, lost.deliberate) == (MachineLost, 3, 1, False)
    assert str(error).startswith("rank 3 on n2 does not answer any more")
    assert Ending.lost(3, "", silent=False).kind == GONE


def test_the_patience_of_a_plan_is_that_of_the_config():
    assert plan_ranks(TrainerConfig(stuck_after=7.0)).stuck_after == 7.0
    assert plan_ranks(TrainerConfig()) == RankPlan(1, 1, False, False)


def _received(board, within=5.0):
    deadline = time.monotonic() + within
    while not (found := board.receive(0.1)):
        assert time.monotonic() < deadline
    return found


@pytest.fixture
def host():
    board = Board.host(["127.0.0.1"])
    done = threading.Event()
    found = []

    def serve():
        while not done.is_set():
            found.extend(board.receive(0.05))

    thread = threading.Thread(target=serve)
    thread.start()
    board.found = found
    yield board
    done.set()
    thread.join()
    board.close()


def _until(condition, within=5.0):
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_messages_arrive_whole_and_the_end_of_a_connection_after_them(host):
    guest = Board.join(host.address, 3)
    guest.send({"is": "a", "text": "x" * 100_000})
    guest.send({"is": "b"})
    _until(lambda: len(host.found) == 2)
    host.send({"is": "c"})
    assert _received(guest) == [(0, {"is": "c"})]
    guest.close()
    _until(lambda: len(host.found) == 3)
    assert [(rank, message["is"]) for rank, message in host.found] == [(3, "a"), (3, "b"), (3, LOST)]


def test_a_stranger_is_not_heard(host):
    known = json.loads(host.address)
    with pytest.raises(BoardError, match="another program answers"):
        Board.join(json.dumps({**known, "token": "guessed"}), 1)
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"x" * 10_000, b"\xff\n"):
        with socket.create_connection(("127.0.0.1", known["port"]), timeout=5) as stranger:
            stranger.sendall(rubbish)
            with suppress(ConnectionResetError):
                assert stranger.recv(10) == b""  # closed
    assert host.found == []
    guest = Board.join(host.address, 1)  # the board is still there
    guest.close()


def test_a_board_that_cannot_be_reached():
    address = json.dumps({"names": ["127.0.0.1"], "port": free_port(), "token": "x"})
    with pytest.raises(BoardError, match=r"port \d+ of rank 0 cannot be reached \(127.0.0.1: .*refused"):
        Board.join(address, 1)


def test_what_a_thread_does_is_told_from_its_stack():
    ready, go = threading.Event(), threading.Event()

    def waiting():
        ready.set()
        go.wait()

    thread = threading.Thread(target=waiting)
    thread.start()
    ready.wait()
    _until(lambda: "go.wait()" in place_of(thread.ident).stack)
    place = place_of(thread.ident)
    go.set()
    thread.join()
    assert (place.collective, place.doing) == ("", "waiting")
    assert re.fullmatch(r"\S*test_watchdog.py:\d+", place.where)
    assert place_of(thread.ident).doing == "nothing (its thread has ended)"


def test_progress_costs_next_to_nothing():
    began = time.perf_counter()
    for step in range(10_000):
        progress(f"step {step}")
    assert time.perf_counter() - began < 1.0  # 100 us each, a thousand times what it takes


def test_what_is_to_do_at_the_end_is_forgotten_with_its_block():
    from leakfree.training import watchdog

    with at_end(print):
        assert watchdog._tidying == [print]
    assert watchdog._tidying == []
