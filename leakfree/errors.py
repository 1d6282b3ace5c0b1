"""The one family of errors that means "the user can fix this".

Commands turn a :class:`LeakfreeError` into a single line on stderr and exit code 2.
Anything else is a failure of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CheckpointError", "ConfigError", "DataError", "LeakfreeError", "RunError", "choices"]


class LeakfreeError(ValueError):
    """A mistake in what the user gave us: the message names it and says what would be right."""


class ConfigError(LeakfreeError):
    """A config file, key, value or override that cannot be used."""


class DataError(LeakfreeError):
    """A data set, an image or an annotation that cannot be used."""


class CheckpointError(LeakfreeError):
    """A checkpoint that is missing, damaged, or of another model."""


class RunError(LeakfreeError):
    """An output folder or a run that cannot be used as asked."""


def choices(given: str, valid: Iterable[str]) -> str:
    """Return ``valid`` as one comma-separated text, the names nearest to ``given`` first.

    >>> choices("ShufleBN", ["BN", "GN", "ShuffleBN"])
    'ShuffleBN, BN, GN'
    """
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=len(names) or 1, cutoff=0.5)
    return ", ".join([*near, *(name for name in names if name not in near)])
