"""Rows, lines and timing of a training."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leakfree.training.journal import Journal, peak_memory_mib, timing_of
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def step(journal, number, loss, lr=0.1):
    journal.waiting()
    journal.fetched()
    journal.stepped(number, {"loss": torch.tensor(loss), "loss_mask": torch.tensor(loss / 2)}, lr)


def test_a_row_holds_the_means_of_its_period_and_the_last_period_may_be_short(tmp_path, read_rows, caplog):
    journal = Journal(tmp_path, period=2, max_steps=3, start_step=0, device=CPU)
    with caplog.at_level("INFO", "leakfree"):
        for number, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
            step(journal, number, loss)
    journal.close()
    assert [(row["step"], row["loss"], row["loss_mask"], row["lr"]) for row in read_rows(tmp_path)] == [
        (2, 3.0, 1.5, 0.1),
        (3, 1.0, 0.5, 0.1),
    ]
    assert "eta: 0:00:00  step: 2/3  loss: 3  loss_mask: 1.5  time: " in caplog.messages[0]
    timing = timing_of(tmp_path, 3, 12.5)
    assert (timing["steps"], timing["seconds"]) == (3, 12.5)
    assert timing["seconds_per_step"] >= timing["data_seconds_per_step"] >= 0
    assert timing["peak_memory_mib"] == pytest.approx(peak_memory_mib(CPU), rel=0.1)


def test_a_resumed_board_hides_what_was_lost(tmp_path):
    for start, end in ((0, 4), (2, 4)):
        journal = Journal(tmp_path, period=1, max_steps=4, start_step=start, device=CPU)
        for number in range(start + 1, end + 1):
            step(journal, number, float(10 * start + number))
        journal.close()
    values = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in values] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_numbers_that_do_not_apply_are_null(tmp_path, read_rows):
    journal = Journal(tmp_path, period=1, max_steps=1, start_step=0, device=CPU)
    journal.write({"step": 1, "bbox/AP": 0.5, "bbox/APl": None})
    journal.close()
    assert read_rows(tmp_path) == [{"step": 1, "bbox/AP": 0.5, "bbox/APl": None}]
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["bbox/AP"]


def _on_ranks(rank, world_size, folder):
    from pathlib import Path

    journal = Journal(Path(folder), period=1, max_steps=1, start_step=0, device=CPU)
    step(journal, 1, float(rank))
    journal.close()


def test_losses_are_averaged_over_ranks_and_written_once(tmp_path, read_rows):
    run_ranks(_on_ranks, 2, str(tmp_path))
    (row,) = read_rows(tmp_path)
    assert row["loss"] == 0.5


def _in_parts(rank, world_size, folder, stopped):
    from pathlib import Path

    journal = Journal(Path(folder), period=3, max_steps=3, start_step=0, device=CPU)
    for number in (1, 2, 3):
        if number == stopped + 1:
            state = journal.state_dict()
            journal.close()
            journal = Journal(Path(folder), period=3, max_steps=3, start_step=stopped, device=CPU)
            journal.load_state_dict(state)
        step(journal, number, 0.1 * number + rank)
    journal.close()


def test_a_row_is_the_same_whenever_a_session_ended_in_its_period(tmp_path, read_rows):
    for stopped in range(4):
        (tmp_path / str(stopped)).mkdir()
        run_ranks(_in_parts, 2, str(tmp_path / str(stopped)), stopped)
    rows = [
        [{name: row[name] for name in ("step", "loss", "loss_mask")} for row in read_rows(tmp_path / str(stopped))]
        for stopped in range(4)
    ]
    assert rows[0][0]["loss"] == pytest.approx(0.7)
    assert rows == [rows[0]] * 4


def test_a_period_goes_on_with_other_ranks_as_the_mean_of_the_old_ones(tmp_path, read_rows):
    done = [{"sums": {"loss": torch.tensor(value)}, "step_times": [0.5], "wait_times": [0.25]} for value in (1.0, 3.0)]
    journal = Journal(tmp_path, period=2, max_steps=2, start_step=1, device=CPU)
    journal.load_state_dict({"ranks": done})
    journal.stepped(2, {"loss": torch.tensor(4.0)}, 0.1)
    journal.close()
    assert read_rows(tmp_path)[0]["loss"] == 3.0  # of 2 and 4


def test_a_killed_session_leaves_its_points_on_the_board(tmp_path):
    journal = Journal(tmp_path, period=1, max_steps=2, start_step=0, device=CPU)
    step(journal, 1, 5.0)
    shutil.copytree(tmp_path, tmp_path / "as-killed")  # the writer is not closed
    journal.close()
    assert [event.value for event in EventAccumulator(str(tmp_path / "as-killed")).Reload().Scalars("loss")] == [5.0]


def test_a_timing_without_rows_has_no_medians(tmp_path):
    assert timing_of(tmp_path, 0, 0.0)["seconds_per_step"] is None


def test_a_timing_is_of_the_rows_up_to_its_step(tmp_path):
    rows = [
        {"step": step, "seconds_per_step": step, "data_seconds_per_step": 0.0, "peak_memory_mib": step}
        for step in (2, 4)
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert timing_of(tmp_path, 3, 1.0)["peak_memory_mib"] == 2  # training goes on while a checkpoint is written
