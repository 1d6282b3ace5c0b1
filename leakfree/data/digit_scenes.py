"""DigitScenes: real handwritten digits composed into cluttered scenes, written as an ordinary COCO data set.

The digits are scikit-learn's bundled ``load_digits`` (1,797 of 8 x 8 pixels, UCI). No digit image is in both
splits. The knob ``class_sharing`` sets how many images hold digits of one class only: the structure that batch
statistics over the RoIs of one image give away.

A scene is ``digits + texture`` in units where ink is 1 and paper 0. An 8-bit file holds
``(scene - PIXEL_LOW) / (PIXEL_HIGH - PIXEL_LOW)`` of the full range; values beyond are clipped (0.03 % of the
pixels at the default clutter). A model with :data:`IMAGE_MEAN` and :data:`IMAGE_STD` sees ``(scene - 0.2) / 0.5``.

Deterministic: a scene depends on (seed, split, index) and the settings, and on nothing else. Scenes of equal
seed share texture, cells, sizes and positions whatever ``class_sharing`` and ``clutter`` are, so that settings
are compared on the same scenes. The bytes of files also depend on the versions of numpy and Pillow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from leakfree.config.schema import DigitScenesConfig
from leakfree.data.digits import SPLITS, Split, digit_images, digits_by_class, resize_bilinear
from leakfree.data.masks import encode_mask, mask_polygons
from leakfree.errors import ConfigError, DataError, choices

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "Scene", "compose_scene", "digit_scenes_path", "write_digit_scenes"]

PIXEL_LOW, PIXEL_HIGH = -1.5, 2.5  # scene values stored as 0 and 255
IMAGE_MEAN = ((0.2 - PIXEL_LOW) / (PIXEL_HIGH - PIXEL_LOW),) * 3  # 0.425
IMAGE_STD = (0.5 / (PIXEL_HIGH - PIXEL_LOW),) * 3  # 0.125

FORMAT = 1  # of the recipe: raise it when the same settings give other scenes
TEXTURE_SIZE = 32  # grid points of the texture per side
TEXTURE_STD = 0.66  # of unit noise after bilinear upsampling (2/3 in the limit)
INK = 0.3  # an upsampled digit is its object where it exceeds this


class Scene(NamedTuple):
    """One composed image (S x S) and its n objects."""

    pixels: np.ndarray  # uint8 (S, S)
    masks: np.ndarray  # bool (n, S, S)
    classes: np.ndarray  # int64 (n,): 0..9
    digits: np.ndarray  # int64 (n,): rows of load_digits


def digit_scenes_path(root: str | os.PathLike[str], config: DigitScenesConfig, split: Split) -> Path:
    """Return the folder under ``root`` for these settings: a readable name and a hash of all settings."""
    settings = _settings(config, split)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = (
        f"digit_scenes_{split}_{config.num_images}x{config.image_size}px_share{config.class_sharing:g}"
        f"_clutter{config.clutter:g}_seed{config.seed}_{digest}"
    )
    return Path(root) / name


def write_digit_scenes(folder: str | os.PathLike[str], config: DigitScenesConfig, split: Split) -> Path:
    """Write ``images/000001.png`` ... and ``instances.json``, or reuse them where they are already.

    The folder appears whole or not at all, under crashes and when several processes write it at once.
    Annotations carry ``digit_index``, the row of ``load_digits``.

    Raises:
        ConfigError: settings that fit no scene (a digit larger than its cell, more digits than cells).
        DataError: the folder holds something else or lost images, or it cannot be written.
    """
    folder = Path(folder)
    settings = _settings(config, split)
    if _is_written(folder, settings):
        return folder
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        temporary.chmod(0o755)
        _write(temporary, config, split, settings)
        os.rename(temporary, folder)
    except OSError as error:
        if not _is_written(folder, settings):  # otherwise another process was faster: its scenes are ours
            raise DataError(
                f"{folder}: cannot write the digit scenes: {error.strerror}; "
                "free it, or choose another place with data.root"
            ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def compose_scene(config: DigitScenesConfig, split: Split, index: int) -> Scene:
    """Compose scene ``index`` (0-based) of a split.

    Each digit lies in its own cell of the grid, at a random size and position; the texture is unit noise on a
    32 x 32 grid, upsampled bilinearly, times ``clutter / 0.66``, and is added over the whole image.
    """
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    size, cell, count = config.image_size, config.image_size // config.grid, config.objects_per_image
    scene = resize_bilinear(rng.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE)), size) * (config.clutter / TEXTURE_STD)
    cells = rng.permutation(config.grid**2)[:count]
    sides = rng.integers(config.digit_size[0], config.digit_size[1] + 1, size=count)
    corners = (rng.random((count, 2)) * (cell - sides[:, None] + 1)).astype(np.int64)
    corners += np.stack([cells // config.grid, cells % config.grid], axis=1) * cell

    classes, digits = _draw_digits(rng, config, split)  # last: the rest does not depend on what is drawn here
    masks = np.zeros((count, size, size), dtype=bool)
    for mask, digit, side, (top, left) in zip(masks, digits, sides, corners, strict=True):
        ink = resize_bilinear(digit_images()[0][digit], int(side))
        window = (slice(top, top + side), slice(left, left + side))
        scene[window] += ink
        mask[window] = ink > INK
    stored = np.rint((scene - PIXEL_LOW) * (255 / (PIXEL_HIGH - PIXEL_LOW)))
    return Scene(stored.clip(0, 255).astype(np.uint8), masks, classes, digits)


def _draw_digits(rng: np.random.Generator, config: DigitScenesConfig, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Classes and digits of a scene; no digit twice."""
    one_class = rng.random() < config.class_sharing
    classes = rng.integers(10, size=config.objects_per_image)
    if one_class:
        classes[1:] = classes[:1]
    digits = np.zeros_like(classes)
    for value in np.unique(classes):
        places = np.flatnonzero(classes == value)
        digits[places] = rng.choice(digits_by_class(split)[value], size=len(places), replace=False)
    return classes, digits


def _settings(config: DigitScenesConfig, split: Split) -> dict[str, Any]:
    """Everything the scenes depend on, checked, as plain JSON values."""
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; valid: {choices(str(split), SPLITS)}")
    cell = config.image_size // config.grid
    if len(config.digit_size) != 2 or not 8 <= config.digit_size[0] <= config.digit_size[1] <= cell:
        raise ConfigError(
            f"data.{split}.digits.digit_size is {list(config.digit_size)}; valid: smallest and largest side in "
            f"pixels, 8 <= smallest <= largest <= {cell} (a cell: image_size {config.image_size} / grid "
            f"{config.grid})"
        )
    if config.objects_per_image > config.grid**2:
        raise ConfigError(
            f"data.{split}.digits.objects_per_image is {config.objects_per_image}; valid: 0 to {config.grid**2}, "
            f"one digit per cell of a {config.grid} x {config.grid} grid"
        )
    if config.objects_per_image > min(map(len, digits_by_class(split))):
        raise ConfigError(
            f"data.{split}.digits.objects_per_image is {config.objects_per_image}; valid: up to "
            f"{min(map(len, digits_by_class(split)))}, as many as the rarest class of the {split} digits has"
        )
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values |= {"class_sharing": float(config.class_sharing), "clutter": float(config.clutter)}  # 1 and 1.0: one name
    return {**values, "digit_size": list(config.digit_size), "split": split, "format": FORMAT}


def _is_written(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds exactly these scenes; what else it may hold is not ours to replace."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "instances.json").read_bytes())["info"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: exists, but holds no digit scenes; choose another place with data.root") from None
    different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if different:
        changes = ", ".join(f"{key} {found.get(key)} instead of {settings.get(key)}" for key in different)
        raise DataError(f"{folder}: holds digit scenes of other settings ({changes}); choose another folder")
    images = len(list((folder / "images").glob("*.png")))
    if images != settings["num_images"]:
        raise DataError(
            f"{folder}: has {images} of its {settings['num_images']} images; delete the folder, it is written anew"
        )
    return True


def _write(folder: Path, config: DigitScenesConfig, split: Split, settings: dict[str, Any]) -> None:
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(config.num_images):
        scene = compose_scene(config, split, index)
        name = f"{index + 1:06d}.png"
        Image.fromarray(scene.pixels).save(folder / "images" / name)
        images.append({"id": index + 1, "file_name": name, "height": config.image_size, "width": config.image_size})
        for mask, value, digit in zip(scene.masks, scene.classes, scene.digits, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(value) + 1,
                    "iscrowd": 0,
                    "bbox": _tight_box(mask),
                    "area": int(mask.sum()),
                    "digit_index": int(digit),
                    "segmentation": encode_mask(mask) if config.mask_format == "rle" else mask_polygons(mask),
                }
            )
    content = {
        "info": {
            "description": "DigitScenes: digits of scikit-learn's load_digits (UCI) in cluttered scenes",
            "settings": settings,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
        },
        "categories": [{"id": value + 1, "name": str(value)} for value in range(10)],
        "images": images,
        "annotations": annotations,
    }
    (folder / "instances.json").write_text(json.dumps(content, separators=(",", ":")))


def _tight_box(mask: np.ndarray) -> list[int]:
    """COCO's x, y, width, height around a mask: whole pixels, so the width is last - first + 1."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
