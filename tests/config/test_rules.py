"""What several keys must satisfy together."""

import logging
from pathlib import Path

import pytest

from leakfree.config import load_config
from leakfree.config.overrides import parse_override
from leakfree.config.rules import check_rules
from leakfree.config.schema import DetectionRunConfig
from leakfree.errors import ConfigError


def config_with(*overrides: str) -> DetectionRunConfig:
    config = DetectionRunConfig()
    config.data.train.name = config.data.val.name = "digit_scenes"
    for text in overrides:
        key, value = parse_override(text, DetectionRunConfig)
        *sections, leaf = key.split(".")
        target = config
        for name in sections:
            target = getattr(target, name)
        setattr(target, leaf, value)
    return config


def check(*overrides: str) -> None:
    check_rules(config_with(*overrides), lambda key: "a.yaml:7")


CONV = "model.box_head.name=4conv1fc"


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["data.train.name=coco"], "data.train.images", ["is empty", "coco"]),
        (["data.val.name=coco", "data.val.images=x"], "data.val.annotations", ["is empty", "JSON"]),
        (["data.train.digits.digit_size=[28, 20]"], "data.train.digits.digit_size", ["[smallest", "[28, 20]"]),
        (["data.train.digits.digit_size=[28]"], "data.train.digits.digit_size", ["[smallest, largest]"]),
        (["data.train.digits.digit_size=[0, 20]"], "data.train.digits.digit_size", ["[smallest, largest]"]),
        (["data.train.digits.digit_size=[20, 33]"], "data.train.digits.digit_size", ["33", "96 // 3 = 32"]),
        (["data.val.digits.objects_per_image=10"], "data.val.digits.objects_per_image", ["3 x 3 = 9", "10"]),
        (["data.min_size=[]"], "data.min_size", ["is empty"]),
        (["data.min_size=[640, 0]"], "data.min_size", ["at least 1"]),
        (["trainer.num_processes=3"], "trainer.total_batch_size", ["16", "3 ranks", "num_processes", "15, 18"]),
        (["trainer.num_gpus=32"], "trainer.total_batch_size", ["16", "32 ranks", "num_gpus", "32"]),
        (["trainer.precision=16-mixed"], "trainer.precision", ["GPUs", "bf16-mixed"]),
        (["model.images_per_group=3"], "model.images_per_group", ["16 images", "groups of 3", "can: 2, 4"]),
        (["model.images_per_group=32"], "model.images_per_group", ["16 images", "groups of 32", "can: 8, 16"]),
        (["evaluation.statistics=[]"], "evaluation.statistics", ["is empty", "population, precise, image, random"]),
        (["schedule.milestones=[0.9, 0.6]"], "schedule.milestones", ["increasing"]),
        (["schedule.milestones=[1.5]"], "schedule.milestones", ["at most 1"]),
        (["output_dir= "], "output_dir", ["is empty"]),
        (["model.image_mean=[0.5]"], "model.image_mean", ["3 numbers"]),
        (["model.image_std=[]"], "model.image_std", ["3 numbers"]),
        (["model.image_std=[1.0, 1.0, 0.0]"], "model.image_std", ["above 0"]),
        (["model.rpn.anchor_sizes=[[8], []]"], "model.rpn.anchor_sizes", ["each feature map"]),
        (["schedule.freeze_bn_at=1.5"], "schedule.freeze_bn_at", ["at most 1", "freeze_bn_unit"]),
        (["schedule.freeze_bn_at=2.5", "schedule.freeze_bn_unit=step"], "schedule.freeze_bn_at", ["whole number"]),
        (["model.rpn.aspect_ratios=[]"], "model.rpn.aspect_ratios", ["above 0"]),
        (["model.backbone.norm=none"], "model.backbone.norm", ["small", "resnet50_fpn"]),
        (["model.box_head.norm=BN"], "model.box_head.norm", ["2fc", "4conv1fc"]),
        ([CONV, "model.box_head.roi_shuffle=statistics"], "model.box_head.roi_shuffle", ["none", "BN or ShuffleBN"]),
        (["model.mask_head.roi_shuffle=statistics", "model.mask_head.norm=GN"], "model.mask_head.roi_shuffle", ["GN"]),
    ],
)
def test_a_broken_rule_is_one_line_with_place_and_key(overrides, key, words):
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    message = str(caught.value)
    assert message.startswith(f"a.yaml:7: {key}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.train.name=coco", "data.train.images=x", "data.train.annotations=y"],
        ["data.train.digits.digit_size=[20, 32]", "data.train.digits.objects_per_image=9"],
        ["trainer.num_processes=3", "trainer.num_gpus=4"],  # with GPUs, num_processes does not count
        ["trainer.precision=16-mixed", "trainer.num_gpus=4"],
        ["model.backbone.norm=none", "model.backbone.name=small"],
        [CONV, "model.box_head.norm=BN", "model.box_head.roi_shuffle=statistics"],
        [CONV, "model.box_head.norm=ShuffleBN", "model.box_head.roi_shuffle=statistics"],
        [CONV, "model.box_head.norm=BN", "model.box_head.roi_shuffle=features"],
        ["model.mask_head.roi_shuffle=statistics", "model.mask_head.enabled=false"],
        ["model.images_per_group=16", "model.mask_head.norm=BatchStatBN"],
        ["model.images_per_group=2", "model.mask_head.norm=SyncBN"],  # groups of 2 when it is measured
        ["schedule.max_steps=1001"],
        ["optimizer.momentum=0.8"],
        ["schedule.gamma=0.2", "schedule.milestones=[0.5]"],
        ["schedule.freeze_bn_statistics=ema", "schedule.freeze_bn_at=0.9"],
        ["schedule.freeze_bn_statistics=ema", "schedule.freeze_bn_at=1", "schedule.freeze_bn_unit=epoch"],
        ["schedule.freeze_bn_at=80000", "schedule.freeze_bn_unit=step"],
        ["schedule.freeze_bn_at=1.5", "schedule.freeze_bn_unit=epoch"],
        [CONV, "model.box_head.num_convs=2", "model.box_head.conv_dim=64"],
    ],
)
def test_what_keeps_the_rules_passes_without_a_word(overrides, caplog):
    check(*overrides)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (
            ["schedule.max_steps=1000"],
            "schedule.warmup_steps",
            "1000 steps of warmup in a run of schedule.max_steps=1000",
        ),
        (["optimizer.name=adamw", "optimizer.momentum=0.8"], "optimizer.momentum", "optimizer.name=adamw"),
        (["schedule.decay=cosine", "schedule.gamma=0.2"], "schedule.gamma", "schedule.decay=cosine"),
        (["schedule.decay=constant", "schedule.milestones=[0.5]"], "schedule.milestones", "schedule.decay=constant"),
        (
            ["schedule.freeze_bn_at=90000", "schedule.freeze_bn_unit=step"],
            "schedule.freeze_bn_at",
            "nothing is frozen at step 90000",
        ),
        (["schedule.freeze_bn_statistics=ema"], "schedule.freeze_bn_statistics", "schedule.freeze_bn_at=1"),
        (["model.box_head.num_convs=2"], "model.box_head.num_convs", "a 2fc head has no convolutions"),
        (["model.box_head.conv_dim=64"], "model.box_head.conv_dim", "a 2fc head has no convolutions"),
        (["model.images_per_group=2"], "model.images_per_group", "model.box_head.norm=none, model.mask_head.norm=none"),
        (["model.images_per_group=2", "model.mask_head.norm=GN"], "model.images_per_group", "model.mask_head.norm=GN"),
        (
            ["model.images_per_group=2", "model.mask_head.norm=BN", "model.mask_head.enabled=false"],
            "model.images_per_group",
            "no norm of a head shares statistics (model.box_head.norm=none)",
        ),
    ],
)
def test_a_setting_without_effect_is_one_warning_and_no_error(overrides, key, words, caplog):
    with caplog.at_level(logging.WARNING):
        check(*overrides)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"leakfree: warning: a.yaml:7: {key}: ")
    assert words in record.getMessage()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_shipped_config_holds_a_setting_without_effect(path, caplog):
    with caplog.at_level(logging.WARNING):
        load_config(path)
    assert caplog.text == ""
