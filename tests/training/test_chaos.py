"""Kills and the same command again; the bar of 50 is ``python -m tests.training.chaos --kills 50``."""

import pytest

from tests.contrastive.conftest import CONFIG
from tests.training.chaos import SMALL, Chaos

pytestmark = pytest.mark.alone


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_undisturbed_one(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    steps = ["schedule.max_steps=60", "trainer.checkpoint_period=5"]
    report = Chaos(tmp_path / "small.yaml", tmp_path, [*SMALL, *steps], kills=3, seed=47).run()
    assert report.faults == [], "\n".join(report.lines())
    assert len(report.kills) == 3
    assert {kill.victim for kill in report.kills} >= {"rank", "loader"}
    assert all(kill.step > 0 for kill in report.kills)
