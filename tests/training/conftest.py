"""The smallest real run: an 8-image digit data set, a small Mask R-CNN, a few steps."""

import json
from pathlib import Path

import pytest

CONFIG = """
seed: 3
data:
  root: {root}
  num_workers: 0
  min_size: [64]
  max_size: 64
  train: {{name: digit_scenes, digits: {{num_images: 8, image_size: 64, grid: 2, objects_per_image: 3}}}}
  val: {{name: digit_scenes, digits: {{num_images: 4, image_size: 64, grid: 2, objects_per_image: 3, seed: 1}}}}
model:
  images_per_group: 1
  backbone: {{name: small, norm: none}}
  rpn: {{anchor_sizes: [[24]], aspect_ratios: [1.0], pre_nms_top_n_train: 32, post_nms_top_n_train: 16,
        pre_nms_top_n_test: 32, post_nms_top_n_test: 8}}
  box_head: {{name: 4conv1fc, num_convs: 1, conv_dim: 8, fc_dim: 16, norm: BN, batch_size_per_image: 8,
             positive_fraction: 0.5}}
  mask_head: {{norm: BN, num_convs: 1, conv_dim: 8}}
optimizer: {{lr: 0.005}}
schedule: {{max_steps: 6, warmup_steps: 2}}
trainer: {{total_batch_size: 2, num_threads: 1, checkpoint_period: 2, keep_checkpoints: 9, log_period: 2}}
evaluation: {{statistics: [population], precise_images: 4, images_per_batch: 2, max_images: 2}}
leakage: {{enabled: false, max_images: 2, influence_batches: 1, influence_probes: 2}}
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """A config file; its data is written once for all tests."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(root=folder / "data"))
    return path


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]


@pytest.fixture
def read_rows():
    return metrics
