"""What several keys of a contrastive config must satisfy together."""

import pytest

from leakfree.config import ContrastiveRunConfig, load_config
from leakfree.contrastive import build_contrastive
from leakfree.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: contrastive\n"
        "trainer: {total_batch_size: 64}\n"
        "model: {backbone: small, queue_size: 512}\n"
        "data: {image_size: 16, views: {name: digits}}\n"
    )
    return lambda *overrides: load_config(path, overrides)


def test_the_defaults_are_a_config(tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text("task: contrastive\n")
    config = load_config(path)
    assert isinstance(config, ContrastiveRunConfig)
    assert (config.model.method, config.model.query, config.model.key) == ("moco", "bn", "same")
    assert caplog.text == ""


SIMCLR = "model.method=simclr"
PHOTOS = "data.views={name: moco_v2}"
FOLDERS = [f"data.{split}={{name: image_folder, path: x}}" for split in ("train", "val")]
WEIGHTS = "model.weights=a.pt"


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["data.train.name=image_folder", PHOTOS], "data.train.path", ["is empty", "subfolder of images"]),
        (["data.val.corruptions=[]"], "data.val.corruptions", ["is empty", "none, blur, contrast, invert"]),
        (["data.mean=[0.5]"], "data.mean", ["3 numbers"]),
        (["data.std=[1.0, 1.0, 0.0]"], "data.std", ["above 0"]),
        ([FOLDERS[0]], "data.views.name", ["one size", "data.train.name is image_folder", "moco_v2 or simclr"]),
        ([FOLDERS[1]], "data.views.name", ["data.val.name is image_folder"]),
        (["model.images_per_group=15"], "model.images_per_group", ["64 images", "groups of 15", "16"]),
        (["model.images_per_group=128"], "model.images_per_group", ["64 images", "groups of 128", "32, 64"]),
        (
            ["model.query=gn", "model.key=bn"],
            "model.key",
            ["both encoders", "query=gn model.key=same"],
        ),
        (["model.key=gn"], "model.key", ["gn is a network", "model.query=bn and model.key=gn"]),
        (["model.query=gn", "model.key=eman"], "model.key", ["gn is a network", "model.key=eman"]),
        (["model.key=frozen_bn", WEIGHTS], "model.key", ["frozen_bn is a network"]),
        (["model.query=frozen_bn"], "model.query", ["random weights", "set model.weights"]),
        (["model.key=eman", SIMCLR], "model.key", ["momentum encoder of moco", "simclr has none"]),
        (["model.query=eman"], "model.query", ["'eman'", "valid: "]),
        (["model.query=loader_shuffle"], "model.query", ["'loader_shuffle'", "valid: "]),
        (
            ["model.key=eman", "model.teacher_statistics=own"],
            "model.teacher_statistics",
            ["model.key=eman never", "use auto, ema or copy"],
        ),
        (["model.key=ghost_bn"], "model.norm_options.group_size", ["ghost_bn", "at least 2, got None"]),
        (["model.query=ghost_bn", "model.norm_options.group_size=1"], "model.norm_options.group_size", ["got 1"]),
        (["model.query=ghost_bn", "model.norm_options.group_size=8.0"], "model.norm_options.group_size", ["got 8.0"]),
        (["model.norm_options.num_groups=8"], "model.norm_options.num_groups", ["is for gn", "model.query is bn"]),
        (["model.query=gn", "model.norm_options.num_groups=0"], "model.norm_options.num_groups", ["got 0"]),
        (["model.queue_size=63"], "model.queue_size", ["63 keys", "trainer.total_batch_size=64"]),
        (["model.momentum_end=0.99"], "model.momentum_end", ["at least model.momentum=0.999", "got 0.99"]),
        (["evaluation.statistics=[]"], "evaluation.statistics", ["is empty", "population, precise"]),
        (["trainer.num_processes=3"], "trainer.total_batch_size", ["64 images", "3 ranks"]),
    ],
)
def test_a_broken_rule_is_one_line_with_its_key(load, overrides, key, words, refused):
    refused(load, overrides, key, words)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ([SIMCLR, "model.queue_size=65536", "model.momentum=0.99"], "model.momentum", "model.method=simclr"),
        ([SIMCLR], "model.queue_size", "model.method=simclr"),
        ([SIMCLR, "model.queue_size=65536", "model.momentum_end=0.5"], "model.momentum_end", "model.method=simclr"),
        ([SIMCLR, "model.queue_size=65536", "model.teacher_statistics=own"], "model.teacher_statistics", "simclr"),
        (["model.query=gn", "model.teacher_statistics=copy"], "model.teacher_statistics", "gn has no running"),
        (["model.head=linear", "model.hidden_dim=64"], "model.hidden_dim", "model.head=linear"),
        (["model.query=sync_bn", "model.images_per_group=8"], "model.images_per_group", "model.query=sync_bn"),
        (["model.query=gn", "model.images_per_group=8"], "model.images_per_group", "model.key=gn"),
        (["model.norm_options.group_size=8"], "model.norm_options.group_size", "for ghost_bn"),
        (["data.views.flip=0.1"], "data.views.flip", "data.views.name=digits: it is for moco_v2 and simclr"),
        (["data.views.min_crop=0.1"], "data.views.min_crop", "moco_v2 and simclr"),
        (["data.views.blur=0.1"], "data.views.blur", "moco_v2 and simclr"),
        ([PHOTOS, "data.views.style=0.1"], "data.views.style", "data.views.name=moco_v2: it is for digits"),
        (["data.views.style_noise=0.1"], "data.views.style_noise", "data.views.style=0"),
        (["data.train.path=somewhere"], "data.train.path", "data.train.name=digits"),
        (["data.val.seed=1"], "data.val.seed", "data.val.noise=0"),
        (["evaluation.online_images=100"], "evaluation.online_images", "trainer.eval_period=0"),
        (["trainer.eval_period=9", "evaluation.knn_k=4096"], "evaluation.knn_k", "online_images=2048"),
        (["leakage.max_images=127"], "leakage.max_images", "two batches of trainer.total_batch_size=64"),
        (["optimizer.name=adamw", "optimizer.momentum=0.8"], "optimizer.momentum", "sgd and lars"),
        (["schedule.burn_in=0.5"], "schedule.burn_in", "norm CBN"),
        (["data.train.noise=0.5"], "data.train.noise", "views are what distorts images"),
        (["data.val.corruptions=[blur]"], "data.val.corruptions", "views are what distorts images"),
    ],
)
def test_a_setting_without_effect_is_one_warning(load, overrides, key, words, warned):
    warned(load, overrides, key, words)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.key=eman", "model.teacher_statistics=copy"],
        ["model.key=shuffle_bn", "model.images_per_group=8", "model.teacher_statistics=ema"],
        ["model.query=sync_bn", "model.key=loader_shuffle", "model.images_per_group=16"],
        ["model.key=ghost_bn", "model.norm_options.group_size=8", "model.images_per_group=16"],
        ["model.query=gn", "model.norm_options.num_groups=4"],
        ["model.query=gn", "model.key=gn"],
        ["model.query=frozen_bn", WEIGHTS],
        ["optimizer.name=lars", "optimizer.momentum=0.8"],
        ["model.momentum=0.99", "model.momentum_end=1.0"],
        ["model.queue_size=64"],
        ["model.hidden_dim=64"],
        [SIMCLR, "model.queue_size=65536", "model.key=shuffle_images"],
        [PHOTOS, "data.views.flip=0.0", "data.views.min_crop=0.08", *FOLDERS],
        [PHOTOS],
        ["data.views.style=0.1", "data.views.style_noise=0.5"],
        ["trainer.eval_period=9", "evaluation.online_images=100"],
        ["leakage.max_images=127", "leakage.enabled=false"],
        ["leakage.max_images=128"],
    ],
)
def test_what_keeps_the_rules_passes_without_a_word(load, overrides, caplog):
    load(*overrides)
    assert caplog.text == ""


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("method", [SIMCLR, "model.method=moco"])
@pytest.mark.parametrize("query", ["bn", "gn"])
def test_an_option_that_the_norm_has_not_is_one_line(load, method, query, head):
    config = load(method, f"model.query={query}", f"model.head={head}", "model.norm_options={epss: 0.1}")
    with pytest.raises(
        ConfigError, match=rf"^model\.norm_options: norm {query.upper()} has no option 'epss'; it takes eps"
    ):
        build_contrastive(config)
