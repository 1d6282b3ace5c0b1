"""What a checkpoint tells beside the weights is checked before it is trusted."""

import pytest
import torch

from leakfree.errors import CheckpointError
from leakfree.training import train
from leakfree.training.entry import FORMAT, training_entry

ENTRY = {
    "format": FORMAT,
    "version": "0.1",
    "step": 4,
    "seconds": 1.5,
    "world_size": 1,
    "freeze_bn": {"frozen_at": None, "layers": []},
    "rank_buffers": [{"running_mean": torch.zeros(2)}],
    "config": {},
}
WRONG = [None, "text", -1, 2**70, float("nan"), True, torch.zeros(2), [None], {"a": 1}]


def test_an_entry_of_a_training_is_returned_and_other_weights_have_none():
    assert training_entry({"leakfree": ENTRY}) is ENTRY
    assert training_entry({"state_dict": {}}) is None


@pytest.mark.parametrize("key", ["step", "seconds", "world_size", "freeze_bn", "rank_buffers"])
def test_another_thing_or_nothing_is_named(key):
    for wrong in ({**ENTRY, key: value} for value in WRONG):
        with pytest.raises(CheckpointError, match=f"leakfree.{key} is missing, or not what a training writes"):
            training_entry({"leakfree": wrong})
    with pytest.raises(CheckpointError, match=f"leakfree.{key}"):
        training_entry({"leakfree": {name: value for name, value in ENTRY.items() if name != key}})


@pytest.mark.parametrize("value", [FORMAT + 1, "1", None, -1, 1.0])
def test_another_format_is_told(value):
    with pytest.raises(CheckpointError, match=f"of format .*, and this leakfree reads {FORMAT}"):
        training_entry({"leakfree": {**ENTRY, "format": value}})


def test_an_entry_that_is_no_section():
    with pytest.raises(CheckpointError, match="entry leakfree is a list"):
        training_entry({"leakfree": []})


def _other_shape(content):
    name = next(name for name, value in content["state_dict"].items() if value.dim() == 4)
    content["state_dict"][name] = content["state_dict"][name][:-1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_shape, "cannot be continued from: RuntimeError: .*size mismatch"),
        (lambda content: content.pop("optimizer_states"), "cannot be continued from: KeyError"),
        (lambda content: content.update(loops=3), "cannot be continued from: TypeError"),
        (lambda content: content.update(lr_schedulers=[None]), "cannot be continued from: "),
        (lambda content: content["leakfree"].update(freeze_bn=None), "leakfree.freeze_bn is missing"),
        (lambda content: content["leakfree"].update(rank_buffers=[{"model.nobody": torch.zeros(1)}]), "continued from"),
        (lambda content: content["leakfree"].update(rank_buffers=[{}, {}]), "leakfree.rank_buffers is missing"),
    ],
)
def test_a_whole_checkpoint_of_other_content_is_one_line_that_names_it(make_config, tmp_path, damage, words):
    config = make_config("run", "schedule.max_steps=2", "trainer.checkpoint_period=1", "evaluation.max_images=1")
    train(config)
    folder = tmp_path / "run"
    (folder / "model_final.pt").unlink()
    record = folder / "record.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "running"'))
    (path,) = folder.glob("checkpoint_*.pt")
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: .*{words}") as caught:
        train(config, resume=True)
    assert "\n" not in str(caught.value)
