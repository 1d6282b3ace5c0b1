"""The detection task: its data, its losses on unusual batches, its checks."""

import json

import pytest
import torch

from leakfree.data import build_dataset
from leakfree.errors import ConfigError, DataError
from leakfree.training.detection import DetectionTask


def test_images_without_objects_still_reach_every_parameter(make_config):
    task = DetectionTask(make_config(), "")
    task.model.train()
    images, targets = next(iter(task.train_batches(0)))
    empty = [{**target, "iscrowd": torch.ones_like(target["iscrowd"])} for target in targets]
    sum(task.losses((images, empty)).values()).backward()
    gradients = [parameter.grad for parameter in task.model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert task.monitors()["roi_accuracy"] == 0


def test_crowd_regions_are_not_trained_on(make_config):
    config = make_config()
    task = DetectionTask(config, "")
    task.model.train()
    images, targets = next(iter(task.train_batches(0)))
    nothing = [{**target, "iscrowd": torch.ones_like(target["iscrowd"])} for target in targets]
    assert task.losses((images, targets))["loss_rpn_box_reg"] > 0
    assert task.losses((images, nothing))["loss_rpn_box_reg"] == 0


def test_classes_that_do_not_fit_are_told(make_config, tmp_path):
    with pytest.raises(
        ConfigError, match=r"model.num_classes: is 3, but the training data has 10; use at least 10, or 0"
    ):
        DetectionTask(make_config("run", "model.num_classes=3"), "")
    dataset = build_dataset(make_config().data, "val")
    source = json.loads((dataset.folder.parent / "instances.json").read_text())
    source["categories"][4]["name"] = "cat"
    (tmp_path / "val.json").write_text(json.dumps(source))
    settings = ["data.val.name=coco", f"data.val.images={dataset.folder}", f"data.val.annotations={tmp_path}/val.json"]
    with pytest.raises(DataError, match=r"its classes are not those of data\.train: class 5 is 'cat' in val"):
        DetectionTask(make_config("run", *settings), "")


def test_precise_statistics_are_those_of_training_batches_and_repeatable(make_config):
    task = DetectionTask(make_config(), "")
    layer = task.model.roi_heads.box_head[0][1]
    task.estimate_statistics()
    first = layer.running_mean.clone()
    assert first.abs().sum() > 0
    torch.rand(7)
    task.estimate_statistics()
    assert torch.equal(layer.running_mean, first)
