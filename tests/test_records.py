"""Records and rows that were edited by hand, torn, or are something else: one line, and nobody waits."""

import json
import os

import pytest

from leakfree.errors import RunError
from leakfree.records import RunRecord, read_metrics, read_record, write_record

RECORD = RunRecord(name="run", task="detection", status="finished", seed=0, config={}, timing={"steps": 3})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"3", b"\xff", b"9" * 5000, b'{"a":' * 100_000, b'{"name": "x"}', b"\0" * 9]
)
def test_a_file_that_is_no_record_is_one_line(tmp_path, text):
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(RunError, match=r"record\.json: (cannot be read as|not) a run's record") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["name", "task", "status", "seed", "config", "environment", "timing", "results", "notes"]
)
@pytest.mark.parametrize("value", [None, 1.5, True, "text" * 100, [1], {"a": 1}])
def test_a_part_of_another_type_is_named(tmp_path, key, value):
    write_record(tmp_path, RECORD)
    raw = json.loads((tmp_path / "record.json").read_text())
    if type(raw[key]) is type(value):
        pytest.skip("of the right type")
    (tmp_path / "record.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(RunError, match=rf"record\.json: {key}: expected \w+, got ") as caught:
        read_record(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 150


def test_an_integer_that_no_float_holds_is_infinite(tmp_path):
    write_record(tmp_path, RECORD)
    text = (tmp_path / "record.json").read_text().replace('"steps": 3', f'"steps": {"9" * 5000}')
    (tmp_path / "record.json").write_text(text)
    assert read_record(tmp_path).timing["steps"] == float("inf")


@pytest.mark.parametrize("name", ["record.json", "metrics.json"])
def test_a_pipe_is_no_file_to_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match="no regular file"):
        (read_record if name == "record.json" else read_metrics)(tmp_path)


def test_rows_without_a_step_that_counts_are_left_out(tmp_path):
    rows = [
        "3",
        "[]",
        "null",
        '{"step": "x"}',
        '{"step": 1e999}',
        '{"step": true}',
        '{"step": 2, "loss": 1}',
        "{}",
        '{"st',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(rows))
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 1}, {}]


@pytest.mark.parametrize("line", [b"{]", b"\xff", b"9" * 5000 + b"x", b"[" * 100_000])
def test_a_line_that_is_no_json_is_told(tmp_path, line):
    (tmp_path / "metrics.json").write_bytes(line + b'\n{"step": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.json(:1)?: "):
        read_metrics(tmp_path)
