"""What Slurm says of a job, in whatever way this cluster lets us ask: scontrol, else squeue, else sacct."""

from __future__ import annotations

import re
import shutil
import subprocess

__all__ = ["job_facts"]

_PAIR = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)")


def job_facts(job_id: str, timeout: float = 20.0) -> dict[str, str]:
    """Facts of a job: ``JobState`` (``PENDING``, ``RUNNING``, ...), ``Reason``, ``Restarts``, ``NodeList``, ...

    Only ``JobState`` is in every answer. ``scontrol`` knows a job for some minutes after its end; ``sacct`` for
    ever, where accounting is on.

    Args:
        job_id: as Slurm prints it: ``123``, ``123_4`` for element 4 of an array.
        timeout: seconds for each question.

    Returns:
        The facts, or {} where nobody knows the job (or no Slurm is here).
    """
    text = _answer(["scontrol", "show", "job", "-o", job_id], timeout)
    facts = dict(_PAIR.findall(text.strip().splitlines()[0])) if text.strip() else {}
    if facts.get("JobState"):
        return facts
    text = _answer(["squeue", "--noheader", "--jobs", job_id, "--format", "%T|%r|%N"], timeout)
    if text.strip():
        return dict(zip(("JobState", "Reason", "NodeList"), text.strip().splitlines()[0].split("|"), strict=False))
    text = _answer(["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, "--format=State"], timeout)
    words = text.split()
    return {"JobState": words[0]} if words else {}


def _answer(command: list[str], timeout: float) -> str:
    """What a Slurm command printed; "" where it is missing, refuses, or does not answer in time."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
