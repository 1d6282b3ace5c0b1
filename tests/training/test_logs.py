"""What reaches the console and the log files."""

import logging
import resource
import warnings

import pytest
import torch

from leakfree.records import RunRecord
from leakfree.training.logs import LOG, environment, first_lines, logging_to, result_lines, track


def test_rank_zero_logs_everything_and_others_only_what_is_wrong(tmp_path, capsys):
    handlers = list(LOG.handlers)
    with logging_to(tmp_path, 0):
        LOG.info("step: 1/2", extra={"periodic": True})  # no terminal: lines are all there is
        LOG.warning("odd")
        warnings.warn("take care", stacklevel=1)
    with logging_to(tmp_path, 1):
        LOG.info("not of interest")
    assert not (tmp_path / "log.txt.rank1").exists()
    with logging_to(tmp_path, 1):
        LOG.error("broken")
    out = capsys.readouterr().out
    text = (tmp_path / "log.txt").read_text()
    assert out == text
    assert "] step: 1/2\n" in text
    assert "] WARNING: odd\n" in text
    assert "take care" in text
    assert "ERROR: broken" in (tmp_path / "log.txt.rank1").read_text()
    assert LOG.handlers == handlers


def test_a_full_disk_is_raised_and_not_printed(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with logging_to(tmp_path, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                LOG.info("a line " * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Logging error" not in capsys.readouterr().err


def test_the_head_of_the_log_tells_the_three_batch_sizes(tmp_path):
    found = environment(torch.device("cpu"), 2)
    batch = {"total": 16, "per_rank": 8, "normalization": {"box head": "1 image", "mask head": "each RoI alone"}}
    record = RunRecord("run", "detection", "running", 0, {}, found, batch=batch)
    lines = first_lines(record.environment, record.batch, tmp_path)
    assert lines[0].startswith("rank 0 of 1 on ")
    assert lines[-1] == (
        "batch: 16 images in total, 8 per rank; normalized together: box head: 1 image; mask head: each RoI alone"
    )
    assert any(str(tmp_path / "config.yaml") in line for line in lines)


def test_results_are_a_table_without_columns_of_nothing():
    results = {"population": {"bbox/AP": 0.25, "bbox/APl": None}, "image": {}}
    assert result_lines(RunRecord("run", "detection", "finished", 0, {}, results=results)) == [
        "statistics  bbox/AP",
        "population  0.2500",
        "image       n.a.",
    ]


def test_progress_passes_batches_on_and_says_what_for(caplog):
    with caplog.at_level(logging.INFO, "leakfree"):
        assert list(track(iter([1, 2]), "AP")) == [1, 2]
    assert caplog.messages == ["evaluating: AP"]
