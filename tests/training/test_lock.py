"""One writer per output folder: real processes, killed ones, and those of other machines by the file they leave."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leakfree.errors import RunError
from leakfree.training import lock
from leakfree.training.lock import lock_owner, locked, slurm_job

HOLD = """
import sys, time
from leakfree.training import lock
lock.BEAT = 0.1
with lock.locked(sys.argv[1]):
    print("in", flush=True)
    {inside}
"""


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)


@pytest.fixture
def hold(tmp_path):
    """``hold()``: a process that holds ``tmp_path / "run"`` until its stdin is closed."""
    started = []

    def start(inside="sys.stdin.read()"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD.format(inside=inside), str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        started.append(process)
        assert process.stdout.readline() == "in\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def left(run, age=0.0, **changes):
    """Leave the file of an owner that is not there any more, ``age`` seconds after its last sign."""
    (run / ".lock").unlink(missing_ok=True)
    with locked(run):
        content = json.loads((run / ".lock").read_text())
    path = run / ".lock"
    path.write_text(json.dumps({**content, "token": "theirs", **changes}))
    os.utime(path, (time.time() - age,) * 2)
    return path


ELSEWHERE = {"host": "node7", "machine": "another boot", "pid": 123}


def test_a_second_process_is_refused_until_the_first_is_gone(hold, run):
    process = hold()
    with pytest.raises(RunError) as caught, locked(run):
        pass
    message = str(caught.value)
    assert f"output_dir: {run} is being written by pid {process.pid} on {os.uname().nodename} since " in message
    assert message.endswith("s ago; wait for it, stop it, or choose another output_dir")
    owner = lock_owner(run)
    assert (owner.pid, owner.alive, owner.job) == (process.pid, True, "")
    assert abs(time.time() - owner.started) < 60
    process.stdin.close()
    assert process.wait(20) == 0
    assert lock_owner(run) is None
    assert not list(run.iterdir())
    with locked(run) as folder:
        assert folder == run
        assert lock_owner(run).pid == os.getpid()
        with pytest.raises(RunError, match=f"being written by pid {os.getpid()} "), locked(run):
            pass
    assert lock_owner(run) is None


def test_a_killed_process_holds_nothing_though_its_children_live(hold, run, capfd):
    process = hold(
        """import os, subprocess
    if os.fork() == 0:
        time.sleep(60)
    subprocess.Popen(["sleep", "60"])
    print("more", flush=True)
    sys.stdin.read()"""
    )
    assert process.stdout.readline() == "more\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    try:
        assert len(children) == 2
        process.kill()
        process.wait()
        owner = lock_owner(run)
        assert (owner.pid, owner.alive) == (process.pid, False)
        with locked(run):
            assert lock_owner(run).pid == os.getpid()
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    assert f"pid {process.pid} on {os.uname().nodename} since" in (said := capfd.readouterr().err)
    assert "which is gone: taking over" in said


def test_a_zombie_is_gone(hold, run):
    process = hold()
    process.kill()  # and not waited for
    while lock_owner(run).alive:
        time.sleep(0.01)
    with locked(run):
        pass


def test_another_process_with_the_same_number_is_not_the_owner(run):
    left(run)  # of this very process, as if it held it
    assert lock_owner(run).alive
    with pytest.raises(RunError, match="is being written by"), locked(run):
        pass
    left(run, process_started="1")
    assert not lock_owner(run).alive
    with locked(run):
        pass


def test_many_starts_at_once_and_one_gets_the_folder(run):
    """The folder of a dead process, and eight that see so: exactly one takes over."""
    left(run, pid=2**22 - 1)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        gate, won, done = manager.Barrier(8), manager.list(), manager.Barrier(8)
        processes = [context.Process(target=_compete, args=(str(run), gate, won, done)) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert len(won) == 1
    assert not list(run.iterdir())


def _compete(folder, gate, won, done):
    gate.wait()
    try:
        with locked(folder):
            won.append(os.getpid())
            done.wait()
    except RunError:
        done.wait()


# ------------------------------------------------------------------------------- other machines


def test_the_owner_on_another_machine_is_gone_when_it_was_silent_for_long(run, capfd):
    left(run, age=500, **ELSEWHERE, job="77")
    assert not lock_owner(run).alive
    with locked(run):
        pass
    watched, taken = capfd.readouterr().err.splitlines()
    assert "was being written by pid 123 on node7 (job 77) since" in taken
    assert taken.endswith("which is gone: taking over")
    assert watched.endswith(" s ago: waiting for 0 s without a sign")


def _writes_without_a_voice(run):
    sys.stderr = open("/dev/full", "w")  # noqa: SIM115
    lock._Heart(run, lock._Owner.of_this_process()).start()
    time.sleep(5)  # the work
    os._exit(7)


def test_who_has_lost_the_folder_ends_also_where_nobody_can_be_told(run):
    left(run, **ELSEWHERE)
    process = multiprocessing.get_context("fork").Process(target=_writes_without_a_voice, args=(run,))
    process.start()
    process.join(20)
    assert process.exitcode == 1
    assert json.loads((run / ".lock").read_text())["token"] == "theirs"


def test_who_takes_over_waits_until_the_other_has_noticed(run, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    left(run, **ELSEWHERE)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with locked(run):
        assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("age", [5, 500])  # the old one: its file system was away
def test_a_sign_of_life_from_another_machine_is_a_refusal(run, monkeypatch, age):
    monkeypatch.setattr(lock, "BEAT", 2.0)
    monkeypatch.setattr(lock, "_POLL", 0.05)
    path = left(run, age=age, **ELSEWHERE)
    beat = multiprocessing.get_context("fork").Process(target=_beat_once, args=(path,))
    beat.start()
    with pytest.raises(RunError, match=r"being written by pid 123 on node7 since .*, last sign 0 s ago"), locked(run):
        pass
    beat.join()
    assert path.exists()


def _beat_once(path):
    time.sleep(0.3)
    os.utime(path)


def test_one_that_gave_a_sign_lately_is_waited_for(run, monkeypatch, capfd):
    monkeypatch.setattr(lock, "_POLL", 0.05)
    monkeypatch.setattr(lock, "SILENT", 2.0)
    left(run, age=1, **ELSEWHERE)
    began = time.monotonic()
    with locked(run):
        assert 0.5 < time.monotonic() - began < 10
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("last sign 1 s ago: waiting for its end, or for 2 s without a sign")
    assert lines[1].endswith("which is gone: taking over")


@pytest.mark.parametrize(
    ("names", "job"),
    [
        ({"SLURM_JOB_ID": "80"}, "80"),
        ({"SLURM_JOB_ID": "81", "SLURM_ARRAY_JOB_ID": "80", "SLURM_ARRAY_TASK_ID": "3"}, "80_3"),
    ],
)
def test_an_earlier_start_of_the_same_job_is_gone(run, monkeypatch, names, job):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert slurm_job() == job
    left(run, **ELSEWHERE)
    assert lock_owner(run).job == job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(run):
        pass


def test_steps_of_one_job_side_by_side_are_two_writers(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    monkeypatch.setattr(lock, "_POLL", 0.05)
    path = left(run, **ELSEWHERE)
    beat = multiprocessing.get_context("fork").Process(target=_beat_once, args=(path,))
    beat.start()
    with pytest.raises(RunError, match=r"pid 123 on node7 \(job 80\)"), locked(run):
        pass
    beat.join()


def test_a_file_system_with_another_clock(run, monkeypatch):
    """Its clock is an hour behind: what was touched now is not old, and not of the future either."""
    monkeypatch.setattr(lock, "_POLL", 0.05)
    monkeypatch.setattr(lock, "SILENT", 1.0)
    left(run, age=3600.2, **ELSEWHERE)
    offset = lock._clock(run) - 3600
    monkeypatch.setattr(lock, "_clock", lambda folder: offset)
    began = time.monotonic()
    with locked(run):
        assert time.monotonic() - began > 0.5


@pytest.mark.parametrize(
    "content", ["", "4711\n", "[]", "{", '{"pid": "x", "host": 3, "started": null}', '{"pid": -1}']
)
def test_a_file_that_tells_nothing_counts_by_its_age(run, monkeypatch, content):
    monkeypatch.setattr(lock, "SILENT", 0.5)
    monkeypatch.setattr(lock, "_POLL", 0.05)
    (run / ".lock").write_text(content)
    assert lock_owner(run).alive
    with locked(run):
        assert lock_owner(run).pid == os.getpid()


# -------------------------------------------------------------------------------------- holding


def test_the_heart_beats_while_the_work_goes_on(hold, run):
    hold()
    os.utime(run / ".lock", (1, 1))
    deadline = time.monotonic() + 20
    while lock_owner(run).last_sign > 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_file_removed_by_hand_comes_back(hold, run):
    process = hold()
    (run / ".lock").unlink()
    deadline = time.monotonic() + 20
    while lock_owner(run) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lock_owner(run).pid == process.pid


def test_a_process_whose_folder_was_taken_over_ends(hold, run):
    process = hold("time.sleep(60)")
    process.send_signal(signal.SIGSTOP)
    path = left_by_force(run)
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 1
    assert "has been taken over by pid 123 on node7" in process.stderr.read()
    assert "this process ends" not in path.read_text()
    assert lock_owner(run).pid == 123


def left_by_force(run):
    path = run / ".lock"
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**content, "token": "theirs", **ELSEWHERE}))
    return path


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(run, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with locked(run):
        assert lock_owner(run).pid == os.getpid()
        assert not lock._create(run, lock._Owner.of_this_process())
    assert not list(run.iterdir())


def test_a_link_whose_answer_got_lost_is_made(run, monkeypatch):
    link = os.link

    def answer_lost(*args):
        link(*args)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answer_lost)
    with locked(run):
        assert lock_owner(run).pid == os.getpid()


def test_the_file_of_a_faster_process_is_put_back(run):
    left(run, **ELSEWHERE)
    assert not lock._drop(run, lock._Owner(token="the one that was judged gone"))
    assert lock_owner(run).pid == 123
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used as an output folder"), locked(tmp_path / "file" / "run"):
        pass


def test_looking_leaves_no_trace(tmp_path):
    assert lock_owner(tmp_path) is None
    assert lock_owner(tmp_path / "nowhere") is None
    assert not list(tmp_path.iterdir())
