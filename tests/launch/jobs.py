"""Jobs on the test cluster: submitted by the command, waited for, and their logs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leakfree.cli import main
from leakfree.launch import submit
from leakfree.launch.job import Training
from tests.launch.cluster import Cluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

TWO_NODES = ["--num-machines", "2", "--num-processes", "1", "--time", "5", "--cpus-per-task", "1"]

# The smallest real run, without what only costs time here.
CONFIG = """
task: classification
seed: 3
output_dir: {folder}/run
data:
  train: {{noise: 0.5}}
  val: {{noise: 0.5}}
  num_workers: 0
model: {{images_per_group: 8}}
optimizer: {{lr: 0.05}}
schedule: {{max_steps: 6, warmup_steps: 2}}
trainer: {{total_batch_size: 80, checkpoint_period: 2, keep_checkpoints: 9, log_period: 2}}
evaluation: {{statistics: [population], images_per_batch: 8, max_images: 80}}
leakage: {{enabled: false}}
"""


@dataclass
class Job:
    """A job, or an element of an array, as its output folder's ``launch.json`` names it."""

    cluster: Cluster
    job_id: str
    folder: Path
    logs: Path

    def log(self, rank: int = 0) -> str:
        path = self.logs / f"{self.job_id}_{rank}_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, text: str, rank: int = 0, seconds: float = 90) -> None:
        """Wait for a text in the log of a rank."""
        end = time.monotonic() + seconds
        while text not in self.log(rank):
            assert time.monotonic() < end, f"no {text!r} in the log of rank {rank}:\n{self.log(rank)}\n{self.log()}"
            time.sleep(0.1)

    def ended(self, seconds: float = 120) -> dict[str, str]:
        """What Slurm says once it is over; a requeued job is not."""
        facts = self.cluster.wait_for_state(self.job_id, *ENDED, seconds=seconds)
        return {name: facts[name] for name in ("JobState", "ExitCode", "Restarts")}

    def signal(self, name: str) -> None:
        """Send a signal to all tasks, as Slurm does."""
        self.cluster.run("scancel", f"--signal={name}", self.job_id)


def launched(cluster: Cluster, folder: Path, *words: str, training: type[Training] = Training) -> list[Job]:
    """Submit runs by the command (``--config-file`` and ``--log-dir`` are added), as many jobs or elements.

    Args:
        training: what each task does in place of a real training.
    """
    config_file = folder / "tiny.yaml"
    if not config_file.exists():
        config_file.write_text(CONFIG.format(folder=folder))
    known = set(folder.rglob("launch.json"))
    before, submit.Training = submit.Training, training  # type: ignore[misc]
    try:
        assert main(["launch", "--config-file", str(config_file), "--log-dir", str(folder / "jobs"), *words]) == 0
    finally:
        submit.Training = before  # type: ignore[misc]
    return jobs_of(cluster, [path.parent for path in sorted(set(folder.rglob("launch.json")) - known)])


def jobs_of(cluster: Cluster, folders: Sequence[Path]) -> list[Job]:
    found = []
    for folder in folders:
        facts = json.loads((folder / "launch.json").read_text())
        found.append(Job(cluster, facts["job_id"], folder, Path(facts["folder"])))
    return found
