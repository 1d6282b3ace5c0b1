"""Linear probes: how much of the classes a linear map finds in frozen features.

Features may be spread over ranks: each holds its own rows, and what is summed over ranks is the loss and its
gradient, or the normal equations; so the probe is that of all rows in one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leakfree.distributed import all_gather_table, all_reduce_sum_
from leakfree.errors import ConfigError, DataError

__all__ = ["LinearProbe", "linear_probe"]


@dataclass(frozen=True)
class LinearProbe:
    """A trained probe: ``logits = (x - mean) / std @ weight + bias``.

    Attributes:
        accuracy: share of test rows, over all ranks, whose largest logit is their class.
        weight: (D, classes); bias: (classes,); mean, std: (D,) of the training features. All float64.
    """

    accuracy: float
    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, classes) float64."""
        return (x.detach().double() - self.mean) / self.std @ self.weight + self.bias


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    closed_form: bool = False,
    weight_decay: float = 1e-4,
    num_classes: int | None = None,
    max_steps: int = 200,
) -> LinearProbe:
    """Fit a linear classifier on standardized features and test it.

    Multinomial logistic regression, the mean loss plus ``weight_decay / 2 * |weight|^2``, to convergence by L-BFGS
    (deterministic: no batches, no seed). ``closed_form``: ridge regression onto one-hot classes instead, with the
    same penalty: one solve, for monitoring during training.

    Args:
        train_x, train_y: (N, D) features, int64 (N,) classes, of this rank; test_x, test_y likewise. Rows over
            ranks may be uneven, and none on some.
        max_steps: iterations of L-BFGS at most.

    Raises:
        DataError: shapes that do not fit, features that are not finite, no rows at all.
        ConfigError: a negative penalty.
    """
    if weight_decay < 0:
        raise ConfigError(f"weight_decay must be at least 0, got {weight_decay}")
    for x, y, what in ((train_x, train_y, "train"), (test_x, test_y, "test")):
        if x.ndim != 2 or y.shape != (len(x),) or y.is_floating_point():
            raise DataError(f"linear_probe: {what}: expected (N, D) features and N classes, got {tuple(x.shape)}")
    broken = not bool(train_x.isfinite().all() and test_x.isfinite().all())
    facts = [int(train_y.max()) if len(train_y) else -1, int(broken), len(train_x)]
    least = int(train_y.min()) if len(train_y) else 0
    everyone = all_gather_table([*facts, len(test_x), least, train_x.shape[1], test_x.shape[1]])
    if bool(everyone[:, 1].any()):
        raise DataError("linear_probe: some features are not finite")
    total, tested = int(everyone[:, 2].sum()), int(everyone[:, 3].sum())
    if not total or not tested:
        raise DataError(f"linear_probe: {total} training and {tested} test features; it needs both")
    classes = num_classes if num_classes is not None else int(everyone[:, 0].max()) + 1
    if int(everyone[:, 4].min()) < 0 or int(everyone[:, 0].max()) >= classes:
        raise DataError(f"linear_probe: classes of the training features must be from 0 to {classes - 1}")
    if len({int(width) for width in everyone[:, 5:].flatten()}) > 1:
        raise DataError(f"linear_probe: features of different widths: {everyone[:, 5:].tolist()} (train, test by rank)")
    x, y = train_x.detach().double(), train_y
    mean = all_reduce_sum_(x.sum(0)) / total
    std = (all_reduce_sum_((x - mean).square().sum(0)) / total).sqrt()
    std = torch.where(std > 0, std, torch.ones_like(std))
    x = (x - mean) / std
    fit = _ridge if closed_form else _logistic
    weight, bias = fit(x, y, classes, total, weight_decay, max_steps)
    probe = LinearProbe(0.0, weight, bias, mean, std)
    hits = (probe.logits(test_x).argmax(1) == test_y).sum().double().view(1)
    return LinearProbe(float(all_reduce_sum_(hits)) / tested, weight, bias, mean, std)


def _ridge(x: Tensor, y: Tensor, classes: int, total: int, penalty: float, _: int) -> tuple[Tensor, Tensor]:
    target = F.one_hot(y, classes).double()
    share = all_reduce_sum_(target.sum(0)) / total
    gram = all_reduce_sum_(x.T @ x) / total
    gram.diagonal().add_(max(penalty, 1e-12))  # constant features must not make it singular
    return torch.linalg.solve(gram, all_reduce_sum_(x.T @ (target - share)) / total), share


def _logistic(x: Tensor, y: Tensor, classes: int, total: int, penalty: float, steps: int) -> tuple[Tensor, Tensor]:
    table = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(x @ table[:-1] + table[-1], y, reduction="sum") / total
            (gradient,) = torch.autograd.grad(loss, table)
        both = all_reduce_sum_(torch.cat([loss.detach().view(1), gradient.flatten()]))
        weight = table.detach()[:-1]
        table.grad = both[1:].view_as(table).clone()
        table.grad[:-1] += penalty * weight
        return both[0] + penalty / 2 * weight.square().sum()

    optimizer.step(closure)
    return table.detach()[:-1], table.detach()[-1]
