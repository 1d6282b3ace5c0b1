"""Sound runs and data, made once, which cases copy and damage."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from leakfree.cli import main
from tests.classification.conftest import CONFIG as CLASSIFICATION
from tests.contrastive.conftest import CONFIG as CONTRASTIVE
from tests.fuzz.place import SHORT
from tests.training.conftest import CONFIG as DETECTION

__all__ = ["TASKS", "make_sound"]

TASKS = ("detection", "classification", "contrastive")
_EXPORTED = ["model.backbone=shufflenet_v2_x0_5", "data.image_size=32"]  # small, and torchvision's


def make_sound(folder: Path) -> None:
    """Fill ``folder`` with configs, finished and interrupted runs of each task, and data of each format."""
    data = folder / "data"
    texts = {
        "detection": DETECTION.format(root=data),
        "classification": CLASSIFICATION,
        "contrastive": CONTRASTIVE,
    }
    for task, text in texts.items():
        (folder / f"{task}.yaml").write_text(text)
        _train(folder, task, f"finished_{task}", [*SHORT, "schedule.max_steps=2", "trainer.checkpoint_period=1"])
        _interrupt(folder / f"finished_{task}", folder / f"interrupted_{task}")
    _train(folder, "contrastive", "exported", [*SHORT, *_EXPORTED])
    scenes = next(data.glob("digit_scenes_train_*"))
    shutil.copytree(scenes, folder / "coco")
    _write_cifar(folder / "cifar-10-batches-py")
    _write_images(folder / "images")


def _train(folder: Path, task: str, name: str, overrides: list[str]) -> None:
    line = ["train", "--config-file", str(folder / f"{task}.yaml"), f"output_dir={folder / name}", *overrides]
    assert main(line) == 0, line


def _interrupt(finished: Path, interrupted: Path) -> None:
    """What a kill after the first of two steps leaves."""
    shutil.copytree(finished, interrupted)
    (interrupted / "model_final.pt").unlink()
    record = json.loads((interrupted / "record.json").read_text())
    record |= {"status": "running", "results": {}, "timing": {**record["timing"], "steps": 1}}
    (interrupted / "record.json").write_text(json.dumps(record))


def _write_cifar(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [n % 10 for n in range(20)]}, protocol=2))
    names = [f"class{number}".encode() for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))


def _write_images(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
