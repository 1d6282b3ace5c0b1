"""Any COCO instances data set as a torch data set.

Shapes: N objects of an image, H, W its height and width in pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from leakfree.data.annotations import read_annotations
from leakfree.data.images import read_image
from leakfree.data.masks import decode_masks
from leakfree.data.problems import Problem, Problems
from leakfree.errors import DataError

__all__ = ["CocoInstances"]

Sample = tuple[Tensor, dict[str, Any]]


class CocoInstances(Dataset[Sample | None]):
    """Images with boxes, classes and masks, from a folder and a COCO instances JSON.

    The JSON is checked when the data set is opened; a broken image file shows when it is read. Boxes are
    continuous pixel coordinates (COCO's x, y, width, height become x0, y0, x1, y1), clipped to the image.
    Polygons and run lengths of both kinds become masks. Crowd regions stay in the target, marked by
    ``iscrowd``: training leaves them out, evaluation passes them on.

    Args:
        images_folder: where the images are; ``file_name`` of the JSON starts here.
        annotation_file: the JSON.
        on_error: "raise" stops at the first fault. "skip" leaves the faulty annotation or image out and
            counts it in ``problems``; a box more than 1 px over the image's edge stays, clipped and counted.
        keep_empty: keep images without an object (crowd regions are not objects).
        masks: false ignores segmentations; targets then have no ``masks``.

    Attributes:
        categories: label 1..K -> name.
        category_ids: label 1..K -> id in the JSON.
        num_classes: K, without background.
        image_ids: by index.
        problems: what was left out.

    Raises:
        DataError: the folder or file is missing, the JSON is truncated or not COCO instances; under "raise"
            any fault. One line that names the file and the id.
    """

    def __init__(
        self,
        images_folder: str | os.PathLike[str],
        annotation_file: str | os.PathLike[str],
        *,
        on_error: str = "raise",
        keep_empty: bool = True,
        masks: bool = True,
    ) -> None:
        self.folder = Path(images_folder)
        self.masks = masks
        self.problems = Problems(on_error)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder of images")
        self._table = read_annotations(annotation_file, self.folder, self.problems, masks=masks)
        image_of = np.repeat(np.arange(len(self._table.image_ids)), np.diff(self._table.starts))
        objects = np.bincount(image_of[self._table.crowd == 0], minlength=len(self._table.image_ids))
        self._rows = np.arange(len(objects)) if keep_empty else np.flatnonzero(objects)
        self.image_ids = [self._table.image_ids[row] for row in self._rows]
        self.categories = self._table.categories
        self.category_ids = self._table.category_ids
        self.num_classes = len(self.categories)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample | None:
        """Return (image, target), or None for an image that cannot be read under ``on_error="skip"``.

        Returns:
            image: uint8 (3, H, W), RGB.
            target: ``boxes`` float32 (N, 4), ``labels`` int64 (N,) in 1..K, ``masks`` uint8 (N, H, W),
                ``area`` float32 (N,) in pixels, ``iscrowd`` int64 (N,), ``image_id`` int,
                ``original_size`` int64 (2,): H, W of the file, whatever transforms do later.

        Raises:
            DataError: the image file is broken or has another size than the JSON says, under "raise".
        """
        loaded = self.load(index)
        if isinstance(loaded, Problem):
            self.problems.found(loaded)
            return None
        return loaded

    def load(self, index: int) -> Sample | Problem:
        """Like indexing, but the fault of an image file is returned, for whoever counts it (loader processes
        have their own copy of ``problems``)."""
        row = self._rows[index]
        path = self.folder / self._table.file_names[row]
        try:
            image = read_image(path)
        except DataError as error:
            return Problem("image_unreadable", f"{error} (image {self._table.image_ids[row]})")
        height, width = self._table.sizes[row].tolist()
        if image.shape[1:] != (height, width):
            return Problem(
                "image_size",
                f"{path}: image {self._table.image_ids[row]} is {image.shape[2]} x "
                f"{image.shape[1]} px (EXIF orientation applied), but its annotations say "
                f"{width} x {height}",
            )
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any]:
        """Return the target of an image as the JSON has it, without reading the image file."""
        table, row = self._table, self._rows[index]
        rows = slice(table.starts[row], table.starts[row + 1])
        target = {
            "boxes": torch.tensor(table.boxes[rows]),
            "labels": torch.tensor(table.labels[rows]),
            "area": torch.tensor(table.areas[rows]),
            "iscrowd": torch.tensor(table.crowd[rows]),
            "image_id": table.image_ids[row],
            "original_size": torch.tensor(table.sizes[row]),
        }
        if self.masks:
            counts = [table.mask_bytes[begin:end] for begin, end in table.mask_spans[rows].tolist()]
            target["masks"] = decode_masks(counts, *table.sizes[row].tolist())
        return target
