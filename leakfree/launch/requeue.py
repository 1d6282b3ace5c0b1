"""After a run has stopped and is saved: whether its job goes back into the queue, and who puts it there.

Everything here happens after the last step, outside of any signal handler, on rank 0 alone.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leakfree.training.stopping import EXIT_STOPPED

__all__ = ["Verdict", "judge", "put_back", "time_is_up"]

# Slurm has put the job back by itself, or will.
_BACK = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING"}
_GONE_ON = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
_EARLY = 90.0  # seconds
_REASONS = {"TimeLimit", "NodeDown", "Preempted"}


@dataclass(frozen=True)
class Verdict:
    """``requeue``: we ask Slurm to put the job back. ``exit_code`` of the job where we do not."""

    requeue: bool
    why: str
    exit_code: int = 0


def judge(cause: str, facts: Mapping[str, str], restarts: int) -> Verdict:
    """What is to be done about a job that has ended early.

    Args:
        cause: the signal that stopped it, or words for what else did. SIGUSR2 is Slurm's warning that the time limit,
            or a preemption, is near.
        facts: of :func:`leakfree.launch.slurm.job_facts`.
        restarts: how often this job had been restarted when it started here (SLURM_RESTART_COUNT).

    What came first counts until the job is being ended: who cancels it after a warning means it. A job that is being
    ended is COMPLETING whatever the reason. Slurm counts a restart the moment it decides to
    requeue, and notes a time limit as the reason; what is left was cancelled.
    """
    state, reason = facts.get("JobState", ""), facts.get("Reason", "")
    known = facts.get("Restarts", "")
    if state in _BACK or (known.isdigit() and int(known) > restarts):
        return Verdict(False, "Slurm has put the job back into the queue")
    if cause == "SIGUSR2" and (not state or state in _GONE_ON):
        return Verdict(True, f"{cause}: the time limit or a preemption is near")
    if state.startswith("CANCELLED"):
        return Verdict(False, "cancelled by the user: the job is not requeued", exit_code=EXIT_STOPPED)
    if state in _GONE_ON:
        return Verdict(True, f"{cause} while Slurm calls the job {state}")
    if not state:
        return Verdict(True, f"{cause}, and Slurm does not say why")
    if reason in _REASONS or _preempted(facts):
        return Verdict(True, f"{cause}: {reason if reason in _REASONS else 'preempted'}")
    return Verdict(False, "cancelled by the user: the job is not requeued", exit_code=EXIT_STOPPED)


def _preempted(facts: Mapping[str, str]) -> bool:
    return facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown", "(null)")


def put_back(handler: Any, job_id: str, *, time_is_up: bool) -> str:
    """Requeue this job through submitit: its file for the next start, its countdown of time limits, scontrol.

    Args:
        handler: submitit's SignalHandler of this process; None outside of submitit.
        job_id: ``123``, or ``123_4`` for an element of an array: then no other element is touched.
        time_is_up: whether this one counts; see :func:`time_is_up`.

    Returns:
        "" when the job is back in the queue; else why not, with what to do by hand.
    """
    by_hand = f"give it by hand: scontrol requeue {job_id} (or launch the same command again with --resume)"
    if handler is None:
        return f"not requeued: submitit did not start this job; {by_hand}"
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import UncompletedJobError

    class Decided(SignalHandler):
        """submitit's own way to tell takes every end within ten minutes of the limit for a time-out."""

        def has_timed_out(self) -> bool:
            return time_is_up

    sys.stdout.flush()
    try:
        Decided(handler.env, handler._job_paths, handler._delayed).checkpoint_and_try_requeue(signal.SIGUSR2)
    except SystemExit:  # how submitit ends a process whose job is requeued
        return ""
    except UncompletedJobError:
        return (
            "not requeued: the job has met its time limit as often as --max-requeues allows; launch the same command "
            "again with --resume"
        )
    except FileNotFoundError:
        return f"not requeued: there is no scontrol on this machine; {by_hand}"
    except subprocess.CalledProcessError:  # scontrol has said why, above
        return f"not requeued: scontrol refuses (see its line above; requeueing may be disabled here); {by_hand}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"not requeued: {error}; {by_hand}"
    return f"not requeued: submitit did not ask for it; {by_hand}"


def time_is_up(facts: Mapping[str, str], signal_delay: float, now: float | None = None) -> bool:
    """Whether a job was stopped for its time limit, not for a preemption: by its end, as Slurm plans it.

    Args:
        facts: of :func:`leakfree.launch.slurm.job_facts`; where they do not tell the end, it counts as a time limit.
        signal_delay: seconds before the limit at which the warning was asked for; Slurm may send it a minute early.
    """
    if _preempted(facts):  # its end is then that of the grace time
        return False
    try:
        end = time.mktime(time.strptime(facts.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return True
    return end - (time.time() if now is None else now) <= signal_delay + _EARLY
