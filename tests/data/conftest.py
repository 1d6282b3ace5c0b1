"""A small hand-made COCO data set, sound until a test breaks it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH = 30, 40
TRIANGLE = [[5.0, 5.0, 25.0, 5.0, 5.0, 25.0]]


def rectangle_runs(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    """Uncompressed run lengths (column-major, background first) of a rectangle not at the image's ends."""
    runs, covered = [], 0
    for column in range(x, x + w):
        runs += [column * HEIGHT + y - covered, h]
        covered = column * HEIGHT + y + h
    return {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH - covered]}


def coco_content() -> dict[str, Any]:
    def annotation(
        key: int, image: int, category: int, bbox: list[float], segmentation: Any, area: float, crowd: int = 0
    ) -> dict[str, Any]:
        return {
            "id": key,
            "image_id": image,
            "category_id": category,
            "bbox": bbox,
            "segmentation": segmentation,
            "area": area,
            "iscrowd": crowd,
        }

    return {
        "images": [
            {"id": key, "file_name": f"{key}.png", "height": HEIGHT, "width": WIDTH} for key in (11, 12, 13, 14)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [  # image 13 is empty, image 14 has only a crowd
            annotation(101, 11, 7, [5, 5, 20, 20], TRIANGLE, 200),
            annotation(102, 12, 3, [2, 3, 4, 5], rectangle_runs(2, 3, 4, 5), 20),
            annotation(103, 11, 3, [30, 2, 5, 6], rectangle_runs(30, 2, 5, 6), 30),
            annotation(104, 14, 7, [1, 1, 8, 9], rectangle_runs(1, 1, 8, 9), 72, crowd=1),
        ],
    }


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write the data set after ``change(content)``; returns (images folder, annotation file)."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda content: None) -> tuple[Path, Path]:
        content = coco_content()
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for image in content["images"]:
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / image["file_name"])
        change(content)
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        return images, file

    return write
