"""The text of an error as a line to show."""

import time

import pytest

from leakfree.errors import choices, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b is wrong", "a: b is wrong"),
        ("two\n  lines\r\n\tand a tab", "two lines and a tab"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("half \ud800, nul \0", "half \\ud800, nul \\x00"),
        ("\u202etxt.exe", "\\u202etxt.exe"),
        ("naïve ×", "naïve ×"),
    ],
)
def test_an_error_is_one_line_without_control_characters(text, line):
    assert one_line(ValueError(text)) == line


def test_an_error_without_words_is_its_kind():
    assert one_line(EOFError()) == "EOFError"


def test_of_a_very_long_line_the_ends_are_shown():
    line = one_line("a.yaml: " + "x" * 100_000 + " is wrong")
    assert len(line) < 1600
    assert line.startswith("a.yaml: xxx")
    assert line.endswith("xxx is wrong")


def test_a_very_long_name_has_its_neighbours_at_once():
    began = time.perf_counter()
    assert choices("x" * 1_000_000, ["BN", "GN"]) == "BN, GN"
    assert time.perf_counter() - began < 5
