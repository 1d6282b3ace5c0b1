"""Where a malformed input lies, and what is promised of the command that reads it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Case", "Make", "Place", "SHORT", "case_of", "catalog"]

# A real run of the tiny configs in a quarter of a second.
SHORT = [
    "schedule.max_steps=1",
    "schedule.warmup_steps=0",
    "leakage.enabled=false",
    "evaluation.max_images=4",
]


@dataclass(frozen=True)
class Place:
    """The folders of one case; all but ``made`` lie in a sandbox of its own.

    Attributes:
        inputs: what is malformed goes here.
        output: the only folder that the command may write to; it does not exist yet.
        canary: appears when code in an input runs.
        secret: an image that no input may lead to.
        made: sound runs and data, the same for all cases: to copy, or to read.
    """

    inputs: Path
    output: Path
    canary: Path
    secret: Path
    made: Path

    @property
    def sandbox(self) -> Path:
        return self.inputs.parent


@dataclass(frozen=True)
class Case:
    """One command line and how it may end.

    Attributes:
        what: of the input.
        argv: after ``leakfree``.
        codes: 2 = refused; 0 where the input may be sound, or its faults are left out.
        writes: folders that it may write to besides the output folder, since the user named them.
        words: one of them is in the error's line, if any are given.
    """

    what: str
    argv: list[str]
    codes: tuple[int, ...] = (2,)
    writes: tuple[str, ...] = ()
    words: tuple[str, ...] = field(default=())


Make = Callable[[random.Random, Place], Case]

# Of ten cases in turn: what kind each is of.
_TURNS = ("config", "checkpoint", "data", "config", "checkpoint", "config", "data", "checkpoint", "config", "data")


def catalog() -> dict[str, list[Make]]:
    """The makers of each kind of input."""
    from tests.fuzz import checkpoints, configs, datasets

    return {"config": configs.MAKERS, "checkpoint": checkpoints.MAKERS, "data": datasets.MAKERS}


def case_of(number: int, seed: int, place: Place) -> tuple[str, Case]:
    """Make the input of case ``number`` and return its kind and the case: a function of (seed, number) alone.

    The makers of a kind take turns, so that each is used before one is used again.
    """
    kind = _TURNS[number % len(_TURNS)]
    turn = number // len(_TURNS) * _TURNS.count(kind) + _TURNS[: number % len(_TURNS)].count(kind)
    makers = catalog()[kind]
    rng = random.Random(f"{seed}-{number}")
    return kind, makers[turn % len(makers)](rng, place)
