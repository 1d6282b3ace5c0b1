import pytest

from leakfree.data.problems import EXAMPLES, Problem, Problems
from leakfree.errors import DataError


def test_raise_stops_with_one_line_that_offers_to_skip():
    with pytest.raises(DataError, match=r"^a\.png: broken; correct it, or .* data\.on_error=skip$"):
        Problems("raise").found(Problem("image_unreadable", "a.png: broken"))


def test_skip_counts_each_fault_once_and_keeps_the_first_examples():
    problems = Problems("skip")
    for _ in range(2):
        for number in range(EXAMPLES + 3):
            problems.found(Problem("box_no_area", f"annotation {number}"))
    assert problems.counts == {"box_no_area": EXAMPLES + 3}
    assert problems.examples["box_no_area"] == [f"annotation {number}" for number in range(EXAMPLES)]
    assert len(problems) == EXAMPLES + 3
    assert str(problems) == f"{EXAMPLES + 3} faults: {EXAMPLES + 3} box_no_area (first: annotation 0)"


def test_unknown_policy_names_the_valid_ones():
    with pytest.raises(DataError, match="'skipp'; valid: skip, raise"):
        Problems("skipp")
