"""What is wrong with a data set, and what happens then: stop at the first fault, or leave out and count."""

from __future__ import annotations

from typing import NamedTuple

from leakfree.errors import DataError, choices

__all__ = ["Problem", "Problems"]

EXAMPLES = 5
ON_ERROR = ("raise", "skip")


class Problem(NamedTuple):
    """One fault. ``message`` is one line that names the file and the id."""

    kind: str
    message: str


class Problems:
    """The faults of one data set under one policy.

    Attributes:
        counts: how many items of each kind were left out (or clipped: ``box_clipped``).
        examples: the first messages of each kind.
    """

    def __init__(self, on_error: str = "raise") -> None:
        if on_error not in ON_ERROR:
            raise DataError(f"on_error is {on_error!r}; valid: {choices(str(on_error), ON_ERROR)}")
        self.on_error = on_error
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        self._seen: set[int] = set()  # a broken image is met once an epoch and counted once

    def found(self, problem: Problem) -> None:
        """Raise the fault, or count it once.

        Raises:
            DataError: ``on_error`` is "raise".
        """
        if self.on_error == "raise":
            raise DataError(f"{problem.message}; correct it, or leave such items out with data.on_error=skip")
        key = hash(problem)
        if key in self._seen:
            return
        self._seen.add(key)
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(problem.message)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        if not self.counts:
            return "no faults"
        parts = [f"{count} {kind} (first: {self.examples[kind][0]})" for kind, count in sorted(self.counts.items())]
        return f"{len(self)} faults: " + "; ".join(parts)
