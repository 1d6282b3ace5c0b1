"""Checkpoint files under a full disk, a kill at any moment, and damage afterwards."""

import os
import random
import resource
import time

import pytest
import torch

from leakfree.errors import CheckpointError, RunError
from leakfree.state import load_weights
from leakfree.training.checkpoints import (
    FINAL,
    checkpoint_name,
    damage,
    disk_is_full,
    list_checkpoints,
    newest_valid,
    point_to,
    read_checkpoint,
    remove_old,
    write_checkpoint,
)


def content(value, size=50_000):
    return {"leakfree": {"step": value}, "weights": torch.full((size,), float(value))}


def test_what_is_written_is_read_and_newest_comes_first(tmp_path):
    for step in (9_999_999, 10_000_000, 5):
        write_checkpoint(content(step), tmp_path / checkpoint_name(step))
    (tmp_path / "checkpoint_best.pt").write_text("somebody else's")
    names = ["checkpoint_10000000.pt", "checkpoint_9999999.pt", "checkpoint_0000005.pt"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    write_checkpoint(content(7), tmp_path / FINAL)
    assert list_checkpoints(tmp_path)[0].name == FINAL
    assert read_checkpoint(tmp_path / FINAL)["weights"][0] == 7.0
    assert os.stat(tmp_path / FINAL).st_mode & 0o777 == 0o644
    remove_old(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [FINAL, names[0]]
    point_to(tmp_path / FINAL)
    assert (tmp_path / "last_checkpoint").read_text() == f"{FINAL}\n"


@pytest.mark.parametrize("fault", ["truncated", "bit", "empty", "text"])
def test_a_damaged_file_is_passed_over_with_a_line(tmp_path, fault):
    for step in (1, 2):
        write_checkpoint(content(step), tmp_path / checkpoint_name(step))
    newest = tmp_path / checkpoint_name(2)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    spoiled = {"truncated": bytes(data[:1000]), "bit": bytes(data), "empty": b"", "text": b"<html>"}[fault]
    newest.write_bytes(spoiled)
    assert damage(newest)
    path, (notice,) = newest_valid(tmp_path)
    assert path == tmp_path / checkpoint_name(1)
    assert str(newest) in notice
    assert "damaged" in notice
    path.write_bytes(spoiled)
    with pytest.raises(
        CheckpointError, match=r"every checkpoint is damaged \(checkpoint_0000002.pt, checkpoint_0000001"
    ):
        newest_valid(tmp_path)


def test_no_checkpoint_is_no_fault(tmp_path):
    assert newest_valid(tmp_path) == (None, [])


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/leakfree-bomb",)


def test_nothing_in_a_file_runs(tmp_path):
    torch.save({"leakfree": _Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "bomb.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint: it holds a list"):
        read_checkpoint(tmp_path / "list.pt")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / checkpoint_name(1)
    write_checkpoint(content(1), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # writes beyond it fail as on a full disk
    try:
        with pytest.raises(RunError, match=r"checkpoint_0000001\.pt: the checkpoint could not be written") as caught:
            write_checkpoint(content(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "earlier ones are intact" in str(caught.value)
    assert disk_is_full(caught.value) is not None
    assert disk_is_full(ValueError("else")) is None
    assert read_checkpoint(path)["leakfree"]["step"] == 1
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path):
    moments = random.Random(0)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                for step in range(10_000):
                    write_checkpoint(content(step, 400_000), tmp_path / checkpoint_name(step % 3))
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.01, 0.1))
        os.kill(child, 9)
        os.waitpid(child, 0)
        for path in list_checkpoints(tmp_path):
            assert damage(path) == ""
            weights = read_checkpoint(path)["weights"]
            assert (weights == weights[0]).all()
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_file_of_another_kind_is_refused_without_advice_to_run_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: contrastive\n")
    for read in (read_checkpoint, lambda path: load_weights(torch.nn.Linear(1, 1), str(path))):
        with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint: .") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself"])
def test_what_is_no_file_is_a_damaged_checkpoint_and_stays(tmp_path, kind):
    write_checkpoint(content(1), tmp_path / checkpoint_name(1))
    odd = tmp_path / checkpoint_name(2)
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(odd.name if kind == "link to itself" else "nothing")
    path, (notice,) = newest_valid(tmp_path)
    assert path == tmp_path / checkpoint_name(1)
    assert f"{odd} is damaged (no regular file)" in notice
    remove_old(tmp_path, 1)
    assert path.is_file()
    assert os.path.lexists(odd)
    path.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):  # and no start from the beginning
        newest_valid(tmp_path)
