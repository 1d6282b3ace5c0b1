"""Who puts a job back into the queue, from what Slurm says of it. What it says was seen on a real controller."""

import time

import pytest

from leakfree.launch.requeue import judge, put_back, time_is_up

RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0"}
ENDING = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "0"}


@pytest.mark.parametrize(
    ("signal_name", "facts", "restarts", "requeue", "exit_code", "word"),
    [
        ("SIGUSR2", RUNNING, 0, True, 0, "time limit or a preemption"),
        ("SIGUSR2", {}, 0, True, 0, "time limit or a preemption"),
        ("SIGUSR2", {**ENDING, "Reason": "TimeLimit"}, 0, True, 0, "TimeLimit"),
        ("SIGUSR2", {**ENDING, "PreemptTime": "2026-11-22T17:26:26"}, 0, True, 0, "preempted"),
        ("SIGUSR2", ENDING, 0, False, 75, "cancelled by the user"),  # scancel after the warning
        ("SIGUSR2", {"JobState": "CANCELLED"}, 0, False, 75, "cancelled by the user"),
        ("a lost machine", RUNNING, 0, True, 0, "a lost machine while Slurm calls the job RUNNING"),
        ("a lost machine", {"JobState": "NODE_FAIL"}, 0, True, 0, "NODE_FAIL"),
        ("a lost machine", {"JobState": "COMPLETING", "Restarts": "1"}, 0, False, 0, "Slurm has put the job back"),
        ("SIGTERM", RUNNING, 0, True, 0, "RUNNING"),
        ("SIGTERM", {"JobState": "PREEMPTED"}, 0, True, 0, "PREEMPTED"),
        ("SIGTERM", {"JobState": "NODE_FAIL"}, 0, True, 0, "NODE_FAIL"),
        ("SIGTERM", {}, 0, True, 0, "does not say why"),
        ("SIGTERM", {**ENDING, "Reason": "TimeLimit"}, 0, True, 0, "TimeLimit"),
        ("SIGTERM", {**ENDING, "PreemptTime": "2026-11-22T17:26:26"}, 0, True, 0, "preempted"),
        ("SIGTERM", {**ENDING, "PreemptTime": "None"}, 0, False, 75, "cancelled by the user"),  # scancel
        ("SIGTERM", ENDING, 0, False, 75, "cancelled by the user"),
        ("SIGTERM", {"JobState": "CANCELLED"}, 0, False, 75, "cancelled by the user"),
        ("SIGTERM", {**ENDING, "Restarts": "1"}, 0, False, 0, "Slurm has put the job back"),  # scontrol requeue
        ("SIGTERM", {**ENDING, "Restarts": "1"}, 1, False, 75, "cancelled by the user"),  # scancel after a restart
        ("SIGUSR2", {**ENDING, "Restarts": "3"}, 2, False, 0, "Slurm has put the job back"),
        ("SIGTERM", {"JobState": "REQUEUE_HOLD"}, 0, False, 0, "Slurm has put the job back"),
        ("SIGTERM", {"JobState": "PENDING"}, 0, False, 0, "Slurm has put the job back"),
    ],
)
def test_the_verdict(signal_name, facts, restarts, requeue, exit_code, word):
    verdict = judge(signal_name, facts, restarts)
    assert (verdict.requeue, verdict.exit_code) == (requeue, exit_code)
    assert word in verdict.why


def test_only_the_time_limit_counts():
    now = time.mktime((2026, 11, 22, 17, 0, 0, 0, 0, -1))
    assert time_is_up({"EndTime": "2026-11-22T17:01:30"}, 90, now)
    assert time_is_up({"EndTime": "2026-11-22T17:02:30"}, 90, now)  # Slurm may be a minute early
    assert not time_is_up({"EndTime": "2026-11-22T17:30:00"}, 90, now)
    assert time_is_up({"EndTime": "2026-11-22T17:30:00"}, 1800, now)
    assert not time_is_up({"EndTime": "2026-11-22T17:00:30", "PreemptTime": "2026-11-22T17:00:00"}, 90, now)
    assert time_is_up({"EndTime": "2026-11-22T17:01:30", "PreemptTime": "None"}, 90, now)
    assert time_is_up({}, 90, now)
    assert time_is_up({"EndTime": "Unknown"}, 90, now)


def test_what_submitit_did_not_start_is_told_how_to_go_on():
    assert "scontrol requeue 12_3 " in put_back(None, "12_3", time_is_up=True)
