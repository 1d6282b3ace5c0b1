"""What several keys of a classification config must satisfy together."""

import pytest

from leakfree.config import ClassificationRunConfig, load_config


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: classification\ntrainer: {total_batch_size: 160}\n")
    return lambda *overrides: load_config(path, overrides)


def test_the_defaults_are_a_config(load, caplog):
    config = load()
    assert isinstance(config, ClassificationRunConfig)
    assert (config.model.norm, config.data.train.name) == ("BN", "digits")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["data.train.name=image_folder"], "data.train.path", ["is empty", "subfolder of images for each class"]),
        (["data.train.name=cifar"], "data.train.name", ["'cifar'", "valid: ", "cifar10"]),
        (["data.val.corruptions=[]"], "data.val.corruptions", ["is empty", "none, blur, contrast, invert"]),
        (["data.val.corruptions=[fog]"], "data.val.corruptions[0]", ["'fog'", "valid: ", "blur"]),
        (["model.norm=DomainBN", "data.val.corruptions=[blur]"], "data.val.corruptions", ["no statistics for blur"]),
        (["data.composition=same_class", "data.group_size=15"], "data.group_size", ["160 images", "nearest", "16"]),
        (["model.images_per_group=15"], "model.images_per_group", ["160 images", "groups of 15", "16"]),
        (["data.mean=[0.5]"], "data.mean", ["3 numbers"]),
        (["data.std=[1.0, 1.0, 0.0]"], "data.std", ["above 0"]),
        (["model.norm=none", "model.name=resnet18"], "model.norm", ["model.name=small", "resnet18"]),
        (
            ["evaluation.statistics=[]"],
            "evaluation.statistics",
            ["is empty", "population, precise, random, same_class, target, embeddings"],
        ),
        (["evaluation.statistics=[image]"], "evaluation.statistics[0]", ["'image'", "same_class"]),
        (["evaluation.statistics=[embeddings]"], "evaluation.statistics", ["model.norm is BN", "model.norm=DomainBN"]),
        (
            ["model.norm=DomainBN", "data.val.corruptions=[blur]", "evaluation.statistics=[embeddings, target]"],
            "data.val.corruptions",
            ["no statistics for blur", "evaluation.statistics=[embeddings]"],
        ),
        (
            [
                "model.norm=DomainBN",
                "model.norm_options={running_statistics: shared}",
                "evaluation.statistics=[embeddings]",
            ],
            "model.norm_options.running_statistics",
            ["is shared", "running statistics of each domain"],
        ),
        (["evaluation.source_share=1.0"], "evaluation.source_share", ["below 1", "population"]),
        (["evaluation.source_share=-0.1"], "evaluation.source_share", ["at least 0"]),
        (["trainer.num_processes=3"], "trainer.total_batch_size", ["3 ranks"]),
        (["data.min_size=[3]"], "data.min_size", ["unknown key"]),
        (["model.box_head.norm=BN"], "model.box_head.norm", ["unknown key", "model.norm"]),
    ],
)
def test_a_broken_rule_is_one_line_with_its_key(load, overrides, key, words, refused):
    refused(load, overrides, key, words)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["data.group_size=8"], "data.group_size", "data.composition=random"),
        (["data.train.path=somewhere"], "data.train.path", "data.train.name=digits"),
        (["data.val.seed=1"], "data.val.seed", "data.val.noise=0"),
        (["schedule.burn_in=0.5"], "schedule.burn_in", "norm CBN"),
        (["model.norm=CBN", "schedule.burn_in=0.5", "schedule.scale_ramps=false"], "schedule.burn_in", "norm CBN"),
        (["model.norm=CBN", "model.norm_options={burn_in: 9}"], "model.norm_options.burn_in", "scale_ramps=true"),
        (["evaluation.source_share=0.5"], "evaluation.source_share", "without target in evaluation.statistics"),
        (["evaluation.target_images=50"], "evaluation.target_images", "without target in evaluation.statistics"),
        (["model.norm=LN", "evaluation.statistics=[target]"], "evaluation.statistics", "norm LN has no statistics"),
        (["model.norm=BatchStatBN", "evaluation.statistics=[target]"], "evaluation.statistics", "of the test batch"),
        (["model.norm=DomainBN", "evaluation.statistics=[embeddings]"], "evaluation.statistics", "one domain"),
        (["model.norm=BatchRenorm", "model.norm_options={ramp: null}"], "model.norm_options.ramp", "scale_ramps=true"),
    ],
)
def test_a_setting_without_effect_is_one_warning(load, overrides, key, words, warned):
    warned(load, overrides, key, words)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.composition=same_class", "data.group_size=8", "model.images_per_group=32"],
        ["model.norm=DomainBN", "data.train.corruptions=[none, blur]", "data.val.corruptions=[blur]"],
        ["evaluation.statistics=[target]", "evaluation.source_share=0.5", "data.val.corruptions=[blur]"],
        [
            "model.norm=DomainBN",
            "data.train.corruptions=[none, invert]",
            "data.val.corruptions=[blur]",
            "evaluation.statistics=[embeddings]",
        ],
        ["model.norm=CBN", "schedule.burn_in=0.5"],
        ["model.norm=CBN", "model.norm_options={burn_in: 9}", "schedule.scale_ramps=false"],
        ["data.train.noise=0.1", "data.train.seed=4"],
        ["model.norm=none"],
        ["data.train.name=cifar10", "data.val.name=cifar10"],
        ["data.train.name=cifar100", "data.train.path=somewhere"],
    ],
)
def test_what_keeps_the_rules_passes_without_a_word(load, overrides, caplog):
    load(*overrides)
    assert caplog.text == ""
