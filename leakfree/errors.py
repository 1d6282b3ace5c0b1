"""The one family of errors that means "the user can fix this".

Commands turn a :class:`LeakfreeError` into a single line on stderr and exit code 2.
Anything else is a failure of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CheckpointError", "ConfigError", "DataError", "LeakfreeError", "RunError", "choices", "one_line"]

_LONGEST = 1500  # characters of a line


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
    near = difflib.get_close_matches(given[:200], names, n=len(names) or 1, cutoff=0.5)
    return ", ".join([*near, *(name for name in names if name not in near)])


def one_line(error: object) -> str:
    """Return the text of an error as one line to show: no control characters, the middle left out of a very long one.

    Texts of files may be in it: they must not move a terminal's cursor, or fill the screen.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 2 // 3]} [...] {text[-_LONGEST // 3 :]}"
    if text.isprintable():
        return text
    return "".join(item if item.isprintable() else item.encode("unicode_escape").decode() for item in text)
