"""A detector small enough to train a step in milliseconds, on real digit scenes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from leakfree.config.schema import DetectionRunConfig


def small_config(root: str, norm: str = "BN", **head: object) -> DetectionRunConfig:
    config = DetectionRunConfig()
    for split, count in ((config.data.train, 12), (config.data.val, 6)):
        split.name = "digit_scenes"
        split.digits.num_images = count
    config.data.root, config.data.min_size, config.data.max_size, config.data.flip = root, [96], 96, 0.0
    config.data.num_workers = 0
    model = config.model
    model.image_mean, model.image_std = [0.425] * 3, [0.125] * 3
    model.backbone.name, model.backbone.norm = "small", "none"
    model.rpn.anchor_sizes, model.rpn.aspect_ratios = [[24]], [1.0]
    model.rpn.post_nms_top_n_train = model.rpn.post_nms_top_n_test = 32
    box, mask = model.box_head, model.mask_head
    box.name, box.num_convs, box.conv_dim, box.fc_dim, box.batch_size_per_image = "4conv1fc", 2, 8, 16, 16
    mask.num_convs, mask.conv_dim = 1, 8
    for part in (box, mask):
        part.norm = norm
        for key, value in head.items():
            setattr(part, key, value)
    config.trainer.total_batch_size = 4
    config.evaluation.images_per_batch = 3
    config.evaluation.precise_images = 8
    config.leakage.influence_batches, config.leakage.influence_probes, config.leakage.max_images = 1, 4, 6
    return config


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def make_config(data_root: str) -> Callable[..., DetectionRunConfig]:
    return lambda *args, **kwargs: small_config(data_root, *args, **kwargs)
