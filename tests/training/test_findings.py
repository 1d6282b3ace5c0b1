"""What a config lets leak is said once at the start of a run, and kept in its record."""

from pathlib import Path

import pytest

from leakfree.config import load_config
from leakfree.leakage import check_config
from leakfree.training import evaluate, train

DIGITS = Path(__file__).parents[2] / "configs" / "contrastive" / "digits"
TINY = [
    "schedule.max_steps=2",
    "schedule.warmup_steps=0",
    "trainer.eval_period=0",
    "trainer.num_threads=1",
    "evaluation.statistics=[population]",
    "evaluation.max_images=64",
    "leakage.enabled=false",
]


@pytest.fixture
def make_config(tmp_path):
    def make(name, *overrides):
        return load_config(DIGITS / name, [*TINY, f"output_dir={tmp_path / 'run'}", *overrides])

    return make


def warned(tmp_path):
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    return [line.partition("WARNING: ")[2] for line in lines if "WARNING: " in line]


def test_a_leak_is_warned_of_and_noted(make_config, tmp_path):
    config = make_config("moco_sync_bn.yaml")
    (finding,) = check_config(config)
    record = train(config)
    assert record.notes == [str(finding)]
    assert record.notes[0].startswith("leak: model.query: all keys of a step share statistics")
    assert warned(tmp_path) == record.notes
    assert evaluate(config).notes == record.notes  # adds to the record of the training, and has nothing new to say
    assert warned(tmp_path) == record.notes


def test_ranks_warn_once_and_for_as_many_as_run(make_config, tmp_path):
    """Two ranks: the queries have two random groups, and all keys are one."""
    words = ["model.images_per_group=0", "model.query=shuffle_bn", "model.key=sync_bn"]
    record = train(make_config("moco_bn.yaml", *words, "trainer.num_processes=2"))
    assert [note.partition(":")[0] for note in record.notes] == ["leak", "no effect"]
    assert "sync_bn lets all 64 meet" in record.notes[1]
    assert warned(tmp_path) == record.notes
    assert not (tmp_path / "run" / "log.txt.rank1").exists()


def test_what_is_safe_is_not_mentioned(make_config, tmp_path):
    record = train(make_config("moco_shuffle_bn.yaml"))
    assert record.notes == []
    assert warned(tmp_path) == []
