"""The smallest real contrastive run: the embedded digits, the small network, a few steps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from leakfree.config import ContrastiveRunConfig, load_config

CONFIG = """
task: contrastive
seed: 3
data:
  train: {name: digits}
  val: {name: digits}
  image_size: 12
  num_workers: 0
  views: {name: digits, strength: 0.5, style: 0.15}
model: {backbone: small, head: linear, feature_dim: 16, queue_size: 40, images_per_group: 4, momentum: 0.9}
optimizer: {lr: 0.1}
schedule: {max_steps: 6, warmup_steps: 2}
trainer: {total_batch_size: 24, num_threads: 1, checkpoint_period: 2, keep_checkpoints: 9, log_period: 2}
evaluation: {images_per_batch: 24, precise_images: 48, max_images: 120, online_images: 60}
leakage: {influence_batches: 1, influence_probes: 4, max_images: 96}
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


MakeConfig = Callable[..., ContrastiveRunConfig]


@pytest.fixture
def make_config(config_file: Path, tmp_path: Path) -> MakeConfig:
    """``make_config("run", "seed=1")``: a config that writes to ``tmp_path / "run"``."""

    def make(name: str = "run", *overrides: str) -> ContrastiveRunConfig:
        config = load_config(config_file, [f"output_dir={tmp_path / name}", *overrides])
        assert isinstance(config, ContrastiveRunConfig)
        return config

    return make
