"""What a sample's batch-mates do to its output, and whether two outputs show that they were batch-mates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from leakfree.errors import DataError
from leakfree.state import buffers_kept

__all__ = ["ProbeResult", "SwapResult", "batchmate_probe", "companion_swap"]


@dataclass(frozen=True)
class SwapResult:
    """How far outputs moved when everything else in the batch was replaced.

    Attributes:
        moved: mean over probes of ``|f(x | B1) - f(x | B2)| / |f(x | B1)|``; 0.0 for a batch-independent forward.
        flipped: share of probes whose prediction changed; None where outputs have no classes to predict.
        num_probes: pairs of forwards compared.
    """

    moved: float
    flipped: float | None
    num_probes: int


def companion_swap(
    model: nn.Module | Callable[[Tensor], Tensor],
    batch: Tensor,
    others: Tensor,
    *,
    num_probes: int = 8,
    predict: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> SwapResult:
    """Keep a sample, give it other batch-mates, and see how its output moves.

    A probe is a row of ``batch`` that stays in its place while all other rows are replaced by rows of ``others``.
    The forward runs in the mode the model is in, without gradient; buffers and random states are put back. In
    contrast to :func:`cross_sample_influence` it also sees paths that are cut off from the gradient.

    Args:
        model: maps (N, *) to per-sample outputs (N, *).
        batch: (N, *); others: (M, *) with M >= N - 1, the pool of replacements, of the same kind of data.
        num_probes: rows of ``batch`` that are kept, one at a time; at most N.
        predict: outputs (1, *) -> a prediction to compare; by default the largest entry of outputs (N, C), C > 1.
        seed: of the probes and replacements.

    Raises:
        DataError: too few others, or of another shape; an output with another number of rows.

    Example:
        >>> x = torch.randn(16, 4)
        >>> companion_swap(nn.Linear(4, 3), x, torch.randn(32, 4)).flipped
        0.0
    """
    size = len(batch)
    if others.shape[1:] != batch.shape[1:] or len(others) < size - 1:
        raise DataError(
            f"companion_swap: a batch {tuple(batch.shape)} needs at least {size - 1} others of the same shape, got "
            f"{tuple(others.shape)}"
        )
    if not size:
        raise DataError("companion_swap: the batch is empty")
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randperm(size, generator=generator)[:num_probes].tolist()
    moved, flips = [], []
    module = model if isinstance(model, nn.Module) else nn.Module()
    with buffers_kept(module), torch.random.fork_rng(), torch.no_grad():
        before = model(batch)
        if len(before) != size:
            raise DataError(f"companion_swap: {size} samples went in, {len(before)} outputs came out")
        if predict is None and before.ndim == 2 and before.shape[1] > 1:
            predict = _largest
        for row in probes:
            swapped = others[torch.randperm(len(others), generator=generator)[: size - 1].to(others.device)]
            swapped = torch.cat([swapped[:row], batch[row : row + 1], swapped[row:]])
            one, two = before[row : row + 1].double(), model(swapped)[row : row + 1].double()
            distance, length = float((one - two).norm()), float(one.norm())
            moved.append(distance / length if length else float(distance > 0))
            if predict is not None:
                flips.append(float(bool((predict(one) != predict(two)).any())))
    return SwapResult(float(np.mean(moved)), float(np.mean(flips)) if flips else None, len(probes))


def _largest(outputs: Tensor) -> Tensor:
    return outputs.argmax(1)


@dataclass(frozen=True)
class ProbeResult:
    """How well one can tell from two features whether their samples shared statistics.

    Attributes:
        auc: area under the ROC curve on groups that the probe was not fitted on; 0.5 is silence.
        num_pairs: pairs judged.
    """

    auc: float
    num_pairs: int


def batchmate_probe(
    features: Tensor, groups: Tensor, *, num_pairs: int = 4000, folds: int = 4, seed: int = 0
) -> ProbeResult:
    """Fit a probe that tells batch-mates from strangers, and test it on other groups.

    A pair is described by the squared differences of its features, and judged by a logistic regression, so that
    mates may be unlike each other too (with small groups centring makes them so). Half of the pairs are mates.

    Args:
        features: (N, D), one row for each sample; rows of unlike content (not views of one image).
        groups: (N,) integers: who shared statistics with whom, as ``last_groups`` of a norm or the batch's number.
        num_pairs: pairs drawn, at most.
        folds: groups are parted into as many; each part is judged by a probe fitted on the others.
        seed: of pairs and parts.

    Raises:
        DataError: fewer than two groups of two samples a fold; features that are not finite.

    Reference: a classifier two-sample test in the sense of Lopez-Paz & Oquab 2017, on pairs.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    x, group = features.detach().double().cpu().numpy(), groups.detach().cpu().numpy()
    if x.ndim != 2 or group.shape != (len(x),):
        raise DataError(f"batchmate_probe: expected features (N, D) and N groups, got {x.shape} and {group.shape}")
    if not np.isfinite(x).all():
        raise DataError("batchmate_probe: the features are not finite")
    if folds < 2 or num_pairs < 4 * folds:
        raise DataError(f"batchmate_probe: needs 2 folds of 4 pairs or more, got folds={folds}, num_pairs={num_pairs}")
    names, counts = np.unique(group, return_counts=True)
    names = names[counts > 1]
    if len(names) < 2 * folds:
        raise DataError(f"batchmate_probe: {folds} folds need {2 * folds} groups of two or more, got {len(names)}")
    std = x.std(0)
    x = (x - x.mean(0)) / np.where(std > 0, std, 1)
    random = np.random.default_rng(seed)
    part_of = dict(zip(names[random.permutation(len(names))].tolist(), np.arange(len(names)) % folds, strict=True))
    pairs = [
        _pairs(group, {n for n in part_of if part_of[n] == part}, num_pairs // folds, random) for part in range(folds)
    ]
    judged, truth = [], []
    for part in range(folds):
        fitted = [pairs[other] for other in range(folds) if other != part]
        probe = LogisticRegression(max_iter=1000)
        probe.fit(np.concatenate([_describe(x, p) for p, _ in fitted]), np.concatenate([mates for _, mates in fitted]))
        judged.append(probe.decision_function(_describe(x, pairs[part][0])))
        truth.append(pairs[part][1])
    return ProbeResult(float(roc_auc_score(np.concatenate(truth), np.concatenate(judged))), sum(map(len, truth)))


def _describe(x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    described: np.ndarray = (x[pairs[:, 0]] - x[pairs[:, 1]]) ** 2
    return described


def _pairs(
    group: np.ndarray, names: set[int], count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(pairs (P, 2) of row numbers, whether they are mates): as many mates as strangers, of these groups only."""
    rows = np.flatnonzero(np.isin(group, list(names)))
    left = np.repeat(rows, len(rows))
    right = np.tile(rows, len(rows))
    left, right = left[left < right], right[left < right]
    mates = group[left] == group[right]
    size = min(max(count // 2, 1), int(mates.sum()), int((~mates).sum()))
    chosen = np.concatenate([random.permutation(np.flatnonzero(kind))[:size] for kind in (mates, ~mates)])
    return np.stack([left[chosen], right[chosen]], 1), mates[chosen]
