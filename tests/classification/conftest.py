"""The smallest real classification run: the embedded digits, the small network, a few steps."""

import pytest

CONFIG = """
task: classification
seed: 3
data:
  train: {noise: 0.5}
  val: {noise: 0.5}
  mean: [0.3, 0.3, 0.3]
  std: [0.5, 0.5, 0.5]
  group_size: 8
  num_workers: 0
model: {images_per_group: 8}
optimizer: {lr: 0.05}
schedule: {max_steps: 6, warmup_steps: 2}
trainer: {total_batch_size: 80, num_threads: 1, checkpoint_period: 2, keep_checkpoints: 9, log_period: 2}
evaluation: {images_per_batch: 8, precise_images: 160, max_images: 160}
leakage: {influence_batches: 1, influence_probes: 4}
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(CONFIG)
    return path
