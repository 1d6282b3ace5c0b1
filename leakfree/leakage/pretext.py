"""The pretext gap: a contrastive run that gets better at its own task and not at telling classes apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsFloat

from leakfree.errors import DataError

__all__ = ["PretextGap", "pretext_gap"]

TOLERANCE = 0.02  # by so much an accuracy may move and is still said to stay: about the noise of a kNN on 600 images


@dataclass(frozen=True)
class PretextGap:
    """What the curves of a run say; accuracies are shares in [0, 1].

    Attributes:
        gap: pretext accuracy minus kNN accuracy, at the end.
        best_knn: the highest kNN accuracy.
        best_step: the first step at which it was reached.
        drop: ``best_knn`` minus the kNN accuracy at the end; 0 if the run ends at its best.
        pretext_rise: of the pretext accuracy over the second half of the steps: from the last point that is not
            behind their middle to the end. 0 for a single point.
        knn_rise: of the kNN accuracy over the same points.
        fell: ``drop`` is above the tolerance, and the pretext accuracy rose by more than the tolerance since
            ``best_step``.
        stalled: ``pretext_rise`` is above the tolerance, ``knn_rise`` is not, and kNN did not fall.
    """

    gap: float
    best_knn: float
    best_step: int
    drop: float
    pretext_rise: float
    knn_rise: float
    fell: bool
    stalled: bool


def pretext_gap(
    steps: Iterable[int],
    pretext: Iterable[SupportsFloat | None],
    knn: Iterable[SupportsFloat | None],
    *,
    tolerance: float = TOLERANCE,
) -> PretextGap:
    """Read MoCo's sign of cheating off the curves of a run.

    A query that recognizes its key by shared batch statistics gets the pretext task right without looking at the
    image: pretext accuracy goes up, and kNN accuracy on the features falls, or stays behind. Neither is a proof:
    features also stay poor for other reasons (a shortcut in the images, a collapse), so look at the companion swap
    and the loss as well.

    Args:
        steps: at which both were measured, increasing; any unit.
        pretext: share of queries whose own key is the most similar one.
        knn: share of held-out images whose class their neighbours vote for. A point at which either is None counts
            for nothing.
        tolerance: a rise or fall up to here is none.

    Raises:
        DataError: curves of different lengths, without a common point, with steps that do not increase, or with
            values outside [0, 1] (NaN included).

    Reference: He et al. 2020, "Momentum contrast", on shuffling BN: without it the pretext accuracy soon passes 99.9%
    and the kNN accuracy drops.
    """
    places, ours, theirs = list(steps), list(pretext), list(knn)
    if not len(places) == len(ours) == len(theirs):
        raise DataError(
            f"pretext_gap: {len(places)} steps, {len(ours)} pretext and {len(theirs)} kNN accuracies; they should be "
            "of one length"
        )
    points = [
        (int(step), float(left), float(right))
        for step, left, right in zip(places, ours, theirs, strict=True)
        if left is not None and right is not None
    ]
    if not points:
        raise DataError("pretext_gap: no step has both a pretext and a kNN accuracy")
    for step, left, right in points:
        for name, value in (("pretext", left), ("kNN", right)):
            if not 0 <= value <= 1:  # NaN too
                raise DataError(
                    f"pretext_gap: {name} accuracy at step {step} is {value:g}; it should be a share in [0, 1]"
                )
    if any(after[0] <= before[0] for before, after in pairwise(points)):
        raise DataError("pretext_gap: the steps do not increase")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise DataError(f"pretext_gap: tolerance must be at least 0, got {tolerance}")

    best = max(points, key=lambda point: point[2])  # the first of equals
    last = points[-1]
    half = max(point for point in points if 2 * point[0] <= points[0][0] + last[0])
    drop = best[2] - last[2]
    rises = (last[1] - half[1], last[2] - half[2])
    fell = drop > tolerance and last[1] - best[1] > tolerance
    return PretextGap(
        gap=last[1] - last[2],
        best_knn=best[2],
        best_step=best[0],
        drop=drop,
        pretext_rise=rises[0],
        knn_rise=rises[1],
        fell=fell,
        stalled=not fell and rises[0] > tolerance >= rises[1],
    )
