"""Segmentations of COCO: polygons and run lengths to masks and back.

The run-length arithmetic is faster-coco-eval's. Ours is the checking (a damaged run-length string may
read or write out of bounds in C code, so none reaches it) and the exact outline of a mask as polygons.

Shapes: N masks, H, W image height and width in pixels.
"""

from __future__ import annotations

import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle_tools
from scipy import ndimage
from torch import Tensor

__all__ = ["decode_masks", "encode_mask", "mask_polygons", "segmentation_to_rle"]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return a binary mask (H, W) as COCO's compressed run lengths, ready for JSON (``counts`` is text)."""
    rle = rle_tools.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_masks(counts: Sequence[bytes], height: int, width: int) -> Tensor:
    """Return compressed run lengths, as :func:`segmentation_to_rle` gives them, as masks: uint8 (N, H, W)."""
    if not counts:
        return torch.zeros((0, height, width), dtype=torch.uint8)
    size = [height, width]
    stacked = rle_tools.decode([{"size": size, "counts": item} for item in counts])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(2, 0, 1)))


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> tuple[bytes, int]:
    """Check one ``segmentation`` of a COCO annotation and return it as compressed run lengths.

    Args:
        segmentation: a list of polygons ``[x0, y0, x1, y1, ...]`` in pixels, or run lengths
            ``{"size": [H, W], "counts": list or text}``.
        height, width: of the image, pixels.

    Returns:
        The compressed counts and the area in pixels (0 for an empty mask).

    Raises:
        ValueError: the segmentation is malformed; the message says how.
    """
    if isinstance(segmentation, list):
        return _polygons_to_rle(segmentation, height, width)
    if not isinstance(segmentation, dict):
        raise ValueError(f"neither polygons nor run lengths but {type(segmentation).__name__}")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"run lengths of size {size} in an image of [height, width] = [{height}, {width}]")
    if isinstance(counts, list):
        runs = _integers(counts)
        _check_runs(runs, height, width)
        compressed = rle_tools.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
    elif isinstance(counts, str):
        compressed = counts.encode("ascii", errors="replace")
        runs = _parse_runs(compressed)
        _check_runs(runs, height, width)
    else:
        raise ValueError(f"run lengths whose counts are {type(counts).__name__}, not a list or text")
    return compressed, int(runs[1::2].sum())


def _polygons_to_rle(polygons: list[Any], height: int, width: int) -> tuple[bytes, int]:
    if not polygons:
        raise ValueError("an empty list of polygons")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is a list of at least 3 points: x0, y0, x1, y1, x2, y2, ...")
        try:
            points = np.frombuffer(array.array("d", polygon)).reshape(-1, 2)
        except (TypeError, OverflowError):
            raise ValueError("a polygon with a coordinate that is not a number") from None
        # Also false for NaN. Rasterizing takes memory in proportion to an edge's length.
        low, high = points.min(0), points.max(0)
        if not (low[0] >= -width and low[1] >= -height and high[0] <= 2 * width and high[1] <= 2 * height):
            raise ValueError("a polygon with a point that is not finite, or farther out than the image is large")
    rles = rle_tools.frPyObjects(polygons, height, width)
    rle = rles[0] if len(rles) == 1 else rle_tools.merge(rles)
    return rle["counts"], int(rle_tools.area(rle))


def _integers(counts: list[Any]) -> np.ndarray:
    try:
        return np.array(array.array("q", counts), dtype=np.int64)
    except (TypeError, OverflowError):
        raise ValueError("run lengths with a count that is not an integer") from None


def _parse_runs(text: bytes) -> np.ndarray:
    """Run lengths of a compressed string: little-endian base 32 digits with a continuation bit, offset 48;
    from the fourth on each is the difference to the one before the last (``rleFrString`` of the COCO API)."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("run lengths whose text is damaged")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("run lengths whose text is damaged")
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def _check_runs(runs: np.ndarray, height: int, width: int) -> None:
    if (runs < 0).any() or runs.max(initial=0) > height * width or runs.sum() != height * width:
        raise ValueError(f"run lengths that do not add up to {height} x {width} pixels")


def mask_polygons(mask: np.ndarray) -> list[list[int]]:
    """Return a binary mask (H, W) as polygons along its pixel edges, whose union is exactly the mask.

    A COCO polygon cannot have a hole, so a part with a hole is cut in two through it.
    """
    polygons = []
    parts, count = ndimage.label(mask)
    for number, window in enumerate(ndimage.find_objects(parts, count), start=1):
        top, left = window[0].start, window[1].start
        for row, column, part in _without_holes(parts[window] == number):
            outline = np.array(_outline(part)) + np.array([column + left, row + top])
            polygons.append(outline.ravel().tolist())
    return polygons


def _without_holes(part: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (row, column, piece) of one connected part, cut until no piece has a hole."""
    holes = ndimage.binary_fill_holes(part) & ~part
    if not holes.any():
        yield 0, 0, part
        return
    cut = int(np.flatnonzero(holes.any(0))[0]) + 1
    for offset, half in ((0, part[:, :cut]), (cut, part[:, cut:])):
        pieces, count = ndimage.label(half)
        for number in range(1, count + 1):
            for row, column, piece in _without_holes(pieces == number):
                yield row, column + offset, piece


def _outline(part: np.ndarray) -> list[tuple[int, int]]:
    """Corners (x, y) of the outline of one connected part without holes, clockwise on the screen.

    In such a part each corner is entered and left once: two pixels that touch only diagonally would
    enclose a hole.
    """
    padded = np.pad(part, 1)
    inside = padded[1:-1, 1:-1]
    follow: dict[tuple[int, int], tuple[int, int]] = {}
    sides = (  # neighbour that must be outside, start and end of the pixel's edge towards it
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    for neighbour, (x0, y0), (x1, y1) in sides:
        for y, x in zip(*np.nonzero(inside & ~neighbour), strict=True):
            follow[int(x) + x0, int(y) + y0] = (int(x) + x1, int(y) + y1)
    start = point = min(follow)  # a corner: nothing lies left of it, and above it in its column
    corners = []
    before = (0, 0)
    while True:
        after = follow[point]
        direction = (after[0] - point[0], after[1] - point[1])
        if direction != before:
            corners.append(point)
        before, point = direction, after
        if point == start:
            return corners
