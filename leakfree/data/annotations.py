"""A COCO instances JSON, checked item by item and packed into flat arrays.

Every fault that the JSON alone shows is found here, when the data set is opened and not in the middle of
a training: polygons are rasterized once and kept as run lengths. Afterwards nothing of the JSON's objects
is left: a million annotations are a few arrays, which loader processes share without copying.
"""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leakfree.data.masks import segmentation_to_rle
from leakfree.data.problems import Problem, Problems
from leakfree.errors import DataError

__all__ = ["Annotations", "read_annotations"]

OVERHANG = 1.0  # pixels by which a box may reach over the image's edge: rounding in common annotation tools
LARGEST_SIDE = 1_000_000  # pixels; a larger one is a mistake that would exhaust memory
SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Annotations:
    """The objects of a data set, those of image i in rows ``starts[i]:starts[i + 1]``."""

    image_ids: list[int]
    file_names: list[str]
    sizes: np.ndarray  # int64 (images, 2): height, width in pixels
    categories: dict[int, str]  # label 1..K -> name
    category_ids: dict[int, int]  # label 1..K -> id in the file
    starts: np.ndarray  # int64 (images + 1,)
    boxes: np.ndarray  # float32 (objects, 4): x0, y0, x1, y1 in pixels, inside the image
    labels: np.ndarray  # int64 (objects,): 1..K
    areas: np.ndarray  # float32 (objects,): pixels
    crowd: np.ndarray  # int64 (objects,): 0 or 1
    mask_bytes: bytes  # compressed run lengths of all masks
    mask_spans: np.ndarray  # int64 (objects, 2): begin and end in mask_bytes


@dataclass
class _Object:
    """One checked annotation."""

    image: int
    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: int
    counts: bytes


class _Fault(Exception):
    """One item is wrong: its kind and, in words, what."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what = kind, what


def read_annotations(
    file: str | os.PathLike[str], folder: str | os.PathLike[str], problems: Problems, *, masks: bool = True
) -> Annotations:
    """Read and check a COCO instances JSON.

    Args:
        file: the JSON.
        folder: where its images are; an image that is not there is a fault.
        problems: told of each fault of an image or annotation; decides whether to stop.
        masks: false ignores segmentations (boxes only).

    Raises:
        DataError: the file cannot be read as COCO instances at all, or ``problems`` stops at a fault.
    """
    raw = _read_json(Path(file))
    categories, category_ids = _read_categories(raw["categories"], file)
    labels = {original: label for label, original in category_ids.items()}
    image_ids, names, sizes, dropped = _read_images(raw["images"], file, Path(folder), problems)
    places = {image_id: place for place, image_id in enumerate(image_ids)}

    objects: list[_Object] = []
    first_at: dict[int, int] = {}
    for position, item in enumerate(raw["annotations"]):
        try:
            image_id = _check_identity(item, position, first_at)
            if image_id in dropped:
                continue  # the fault is the image's, and counted there
            if image_id not in places:
                raise _Fault("annotation_unknown_image", f"belongs to image {image_id}, which the file does not have")
            place = places[image_id]
            label = _check_label(item.get("category_id"), labels)
            box, overhang = _check_box(item.get("bbox"), *sizes[place])
            found = _check_rest(item, box, *sizes[place], masks)
            objects.append(_Object(place, box, label, *found))
            if overhang > OVERHANG:  # after the rest: this one stays, clipped
                raise _Fault(
                    "box_clipped",
                    f"box {item['bbox']} reaches {overhang:.1f} px over the edge of the image "
                    f"({sizes[place][1]} x {sizes[place][0]})",
                )
        except _Fault as fault:
            problems.found(Problem(fault.kind, f"{file}: {_name(item, position, places, names)}: {fault.what}"))
    return _pack(objects, image_ids, names, sizes, categories, category_ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot read the annotation file: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        early = error.pos >= len(text.rstrip()) or not text.rstrip().endswith("}")
        reason = f"it ends too early, at {len(data)} bytes (half copied?)" if early else error.msg
        raise DataError(f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {reason}") from None
    except (ValueError, RecursionError) as error:  # not text, an integer of thousands of digits, endless nesting
        raise DataError(f"{file}: not a JSON text: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(
            f"{file}: not COCO instances: the top level is a {type(raw).__name__}, "
            f"not an object with {', '.join(SECTIONS)}"
        )
    missing = [section for section in SECTIONS if not isinstance(raw.get(section), list)]
    if missing:
        has = ", ".join(sorted(raw)) or "nothing"
        raise DataError(
            f"{file}: not COCO instances: it lacks the list{'s' * (len(missing) > 1)} "
            f"{', '.join(missing)}; it has {has}"
        )
    return raw


def _read_categories(items: list[Any], file: str | os.PathLike[str]) -> tuple[dict[int, str], dict[int, int]]:
    """Labels 1..K in the order of the categories' ids. Without sound categories no label means anything, so
    faults here stop under every policy."""
    names: dict[int, str] = {}
    for position, item in enumerate(items):
        key = _as_id(item.get("id")) if isinstance(item, dict) else None
        if key is None:
            raise DataError(f"{file}: categories[{position}] has no integer id")
        if key in names:
            raise DataError(f"{file}: categories[{position}]: duplicate id {key}")
        names[key] = str(item.get("name", key))
    if not names:
        raise DataError(f"{file}: no categories")
    ids = dict(enumerate(sorted(names), start=1))
    return {label: names[key] for label, key in ids.items()}, ids


def _read_images(
    items: list[Any], file: str | os.PathLike[str], folder: Path, problems: Problems
) -> tuple[list[int], list[str], list[tuple[int, int]], set[int]]:
    """Ids, file names, (height, width) of the sound images, and the ids of the others."""
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    first_at: dict[int, int] = {}
    dropped: set[int] = set()
    present = _Folders(folder)
    for position, item in enumerate(items):
        key = _as_id(item.get("id")) if isinstance(item, dict) else None
        try:
            if key is None:
                raise _Fault("image_invalid", "has no integer id")
            if key in first_at:
                raise _Fault("image_duplicate_id", f"duplicate id {key}, first used by images[{first_at[key]}]")
            first_at[key] = position
            images[key] = _check_image(item, present)
        except _Fault as fault:
            where = f"images[{position}]" + (f" (image {key})" if key is not None else "")
            problems.found(Problem(fault.kind, f"{file}: {where}: {fault.what}"))
            if key is not None and key not in images:
                dropped.add(key)
    return list(images), [name for name, _ in images.values()], [size for _, size in images.values()], dropped


class _Folders:
    """Which files exist: lists a folder once instead of asking for each file (slow on shared disks)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.listed: dict[str, set[str]] = {}

    def __contains__(self, name: str) -> bool:
        folder, base = os.path.split(os.path.join(self.root, name))
        if folder not in self.listed:
            self.listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return base in self.listed[folder]


def _check_image(item: dict[str, Any], present: _Folders) -> tuple[str, tuple[int, int]]:
    name = item.get("file_name")
    if not isinstance(name, str) or not name:
        raise _Fault("image_invalid", "has no file_name")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise _Fault("image_outside", f"file_name {reprlib.repr(name)} leads out of the folder of the images")
    sides: tuple[Any, Any] = (item.get("height"), item.get("width"))
    if not all(_is_finite(side) and 0 < side <= LARGEST_SIDE and side == int(side) for side in sides):
        raise _Fault(
            "image_invalid", f"height and width must be whole pixels, but are {' and '.join(map(reprlib.repr, sides))}"
        )
    if name not in present:
        raise _Fault("image_missing", f"{present.root / name}: no such image file")
    return name, (int(sides[0]), int(sides[1]))


def _check_identity(item: Any, position: int, first_at: dict[int, int]) -> int:
    """The image id of an annotation whose own id is sound and new."""
    if not isinstance(item, dict):
        raise _Fault("annotation_invalid", f"is a {type(item).__name__}, not an object")
    key, image_id = _as_id(item.get("id")), _as_id(item.get("image_id"))
    if key is None or image_id is None:
        given = f"{reprlib.repr(item.get('id'))} and {reprlib.repr(item.get('image_id'))}"
        raise _Fault("annotation_invalid", f"id and image_id must be integers, but are {given}")
    if key in first_at:
        raise _Fault("annotation_duplicate_id", f"duplicate id {key}, first used by annotations[{first_at[key]}]")
    first_at[key] = position
    return image_id


def _check_label(category_id: Any, labels: dict[int, int]) -> int:
    key = _as_id(category_id)
    if key is None or key not in labels:
        known = ", ".join(map(str, list(labels)[:10])) + (", ..." if len(labels) > 10 else "")
        given = reprlib.repr(category_id)
        raise _Fault("annotation_unknown_category", f"category {given} is not one of the file's: {known}")
    return labels[key]


def _check_box(bbox: Any, height: int, width: int) -> tuple[tuple[float, float, float, float], float]:
    """The box (x0, y0, x1, y1) clipped to the image, and how far it reached over the edge, in pixels."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise _Fault("box_invalid", f"bbox must be [x, y, width, height], but is {reprlib.repr(bbox)}")
    if not all(map(_is_finite, bbox)):
        raise _Fault("box_not_finite", f"box {bbox} is not finite")
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        raise _Fault("box_no_area", f"box {bbox} has no area: width {w}, height {h}")
    clipped = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise _Fault("box_outside", f"box {bbox} is outside the image ({width} x {height})")
    for low, high, side in ((clipped[0], clipped[2], width), (clipped[1], clipped[3], height)):
        if high - low < 4 * np.spacing(np.float32(side)):  # what is left of it once it is scaled and flipped as float32
            raise _Fault("box_no_area", f"box {bbox} has no area inside the image ({width} x {height})")
    return clipped, max(-x, -y, x + w - width, y + h - height)


def _check_rest(
    item: dict[str, Any], box: tuple[float, float, float, float], height: int, width: int, masks: bool
) -> tuple[float, int, bytes]:
    """Area, crowd flag and compressed mask. ``iscrowd`` may be missing (0), as may ``area`` (the mask's)."""
    crowd = item.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise _Fault("annotation_invalid", f"iscrowd must be 0 or 1, but is {reprlib.repr(crowd)}")
    counts, pixels = b"", 0
    if masks:
        if "segmentation" not in item:
            raise _Fault("mask_missing", "has no segmentation")
        try:
            counts, pixels = segmentation_to_rle(item["segmentation"], height, width)
        except ValueError as error:
            raise _Fault("mask_malformed", f"segmentation is malformed: {error}") from None
        if not pixels:
            raise _Fault("mask_empty", "segmentation covers no pixel of the image")
    area = item.get("area", pixels if masks else (box[2] - box[0]) * (box[3] - box[1]))
    if not _is_finite(area) or area < 0:
        raise _Fault("annotation_invalid", f"area must be a finite number of pixels, but is {reprlib.repr(area)}")
    return float(area), int(crowd), counts


def _pack(
    objects: list[_Object],
    image_ids: list[int],
    names: list[str],
    sizes: list[tuple[int, int]],
    categories: dict[int, str],
    category_ids: dict[int, int],
) -> Annotations:
    objects.sort(key=lambda item: item.image)  # stable: the file's order within an image
    per_image = np.bincount([item.image for item in objects], minlength=len(image_ids))
    ends = np.cumsum([len(item.counts) for item in objects], dtype=np.int64)
    return Annotations(
        image_ids=image_ids,
        file_names=names,
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        categories=categories,
        category_ids=category_ids,
        starts=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        boxes=np.array([item.box for item in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([item.label for item in objects], dtype=np.int64),
        areas=np.array([item.area for item in objects], dtype=np.float32),
        crowd=np.array([item.crowd for item in objects], dtype=np.int64),
        mask_bytes=b"".join(item.counts for item in objects),
        mask_spans=np.stack([np.concatenate([[0], ends[:-1]])[: len(ends)], ends], axis=1).astype(np.int64),
    )


def _name(item: Any, position: int, places: dict[int, int], names: list[str]) -> str:
    """How a message names an annotation: its place in the list, its id, its image's id and file."""
    text = f"annotations[{position}]"
    if not isinstance(item, dict):
        return text
    image_id = _as_id(item.get("image_id"))
    image = f", image {image_id}" if image_id is not None else ""
    if image_id in places:
        image += f" {names[places[image_id]]}"
    return f"{text} (id {reprlib.repr(item.get('id'))}{image})"


def _as_id(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """A number one can compute with: JSON has integers of any size, and Python's reader accepts NaN."""
    return _is_number(value) and -1e18 < value < 1e18
