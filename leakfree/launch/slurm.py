"""What Slurm says of a job, in whatever way this cluster lets us ask: scontrol, else squeue, else sacct."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, replace

__all__ = ["Partition", "job_facts", "partitions"]

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


@dataclass(frozen=True)
class Partition:
    """What ``sinfo`` says of a partition.

    Attributes:
        minutes: longest time limit; None = no limit.
        cpus: of one machine; None = they differ.
    """

    name: str
    is_default: bool
    is_up: bool
    minutes: int | None
    nodes: int
    cpus: int | None
    features: frozenset[str]


def partitions(timeout: float = 20.0) -> dict[str, Partition]:
    """The partitions of this cluster by name; {} where sinfo does not answer."""
    found: dict[str, Partition] = {}
    for line in _answer(["sinfo", "--noheader", "--format", "%P|%a|%l|%D|%c|%f"], timeout).splitlines():
        fields = line.strip().split("|")
        if len(fields) != 6:
            continue
        name, state, limit, nodes, cpus, features = fields
        new = Partition(
            name.rstrip("*"),
            name.endswith("*"),
            state == "up",
            _limit_minutes(limit),
            int(nodes) if nodes.isdigit() else 0,
            int(cpus) if cpus.isdigit() else None,
            frozenset() if features == "(null)" else frozenset(features.split(",")),
        )
        if (known := found.get(new.name)) is not None:  # sinfo has a line for each kind of machine
            new = replace(
                new,
                nodes=known.nodes + new.nodes,
                cpus=known.cpus if known.cpus == new.cpus else None,
                features=known.features | new.features,
            )
        found[new.name] = new
    return found


def _limit_minutes(text: str) -> int | None:
    """Minutes of ``30:00``, ``1:00:00``, ``2-00:00:00``; None for ``infinite`` and what cannot be read."""
    match = re.match(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)\Z", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + (seconds > 0)
