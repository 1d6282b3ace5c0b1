"""Norms by the equations of their papers: one operation each, derivatives by autograd, nothing of leakfree's code.

All in the dtype of the input, so float64 in float64. ``parameters`` are those of the layer by name; ``groups`` is the
group (for DomainBN the domain) of each row, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


def column(table: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C) beside an input (N, C, *)."""
    return table.reshape(*(table.shape if table.ndim == 2 else (1, -1)), *[1] * (x.ndim - 2))


def values_of(x: Tensor) -> Tensor:
    """(C, values)"""
    return x.transpose(0, 1).flatten(1)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,)."""
    values = values_of(x)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1)


def normal(x: Tensor, mean: Tensor, var: Tensor, eps: float = EPS) -> Tensor:
    return (x - column(mean, x)) / (column(var, x) + eps).sqrt()


def affine(xhat: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    if "weight" in parameters:
        xhat = xhat * column(parameters["weight"], xhat)
    return xhat + column(parameters["bias"], xhat) if "bias" in parameters else xhat


class BatchNorm:
    """Ioffe & Szegedy 2015, in groups of rows; the running statistics (variance unbiased) are those of all rows."""

    def __init__(self, channels: int, momentum: float | None = 0.1) -> None:
        self.channels, self.momentum, self.steps = channels, momentum, 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.ones(channels, dtype=torch.float64)

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        """The output of a training forward, which the state then follows."""
        y = self.alone(x, parameters, groups)
        self.steps += 1
        with torch.no_grad():
            self.follow(x)
        return y

    def evaluate(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return affine(normal(x, self.mean, self.var), parameters)

    def frozen(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        """Of a frozen layer, in any mode."""
        return self.evaluate(x, parameters, groups)

    def alone(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        """With the statistics of this batch and of nothing else."""
        return affine(in_groups(x, groups), parameters)

    def share(self) -> float:
        return 1 / self.steps if self.momentum is None else self.momentum

    def follow(self, x: Tensor) -> None:
        mean, var = self.population(x)
        self.mean = self.mean + self.share() * (mean - self.mean)
        self.var = self.var + self.share() * (var - self.var)

    def population(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of a data set, (C,), as the running buffers hold them."""
        values = values_of(x)
        return values.mean(1), values.var(1)

    def buffers(self) -> dict[str, Tensor]:
        counter = torch.tensor(self.steps)
        return {"running_mean": self.mean, "running_var": self.var, "num_batches_tracked": counter}


def in_groups(x: Tensor, groups: Tensor | None) -> Tensor:
    """xhat of each group of rows by its own statistics."""
    if groups is None:
        return normal(x, *moments(x))
    xhat = torch.zeros_like(x)
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        xhat = xhat.index_put((rows,), normal(x[rows], *moments(x[rows])))
    return xhat


class BatchStatNorm(BatchNorm):
    """Wu & Johnson 2021, section 3.3: the batch's statistics in eval too."""

    def evaluate(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return self.alone(x, parameters)

    def frozen(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return super().evaluate(x, parameters)


class FrozenNorm(BatchNorm):
    """A batch norm in eval, always, with the statistics it was given."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.mean = torch.linspace(-1, 1, channels, dtype=torch.float64)
        self.var = torch.linspace(0.25, 4, channels, dtype=torch.float64)

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return self.evaluate(x, parameters)


class BatchRenorm(BatchNorm):
    """Ioffe 2017, algorithm 1: moving mean and standard deviation, r and d without gradient."""

    def __init__(
        self,
        channels: int,
        momentum: float | None = 0.01,
        ramp: tuple[int, int, int] | None = None,
        r_max: float = 3.0,
        d_max: float = 5.0,
    ) -> None:
        super().__init__(channels, momentum)
        self.ramp, self.r_max, self.d_max = ramp, r_max, d_max
        self.std = torch.full((channels,), math.sqrt(1 + EPS), dtype=torch.float64)
        self.clipped: list[bool] = []

    def limits(self) -> tuple[float, float]:
        if self.ramp is None:
            return self.r_max, self.d_max
        start, end_d, end_r = self.ramp
        r, d = (min(max((self.steps - start) / (end - start), 0), 1) for end in (end_r, end_d))
        return 1 + r * (self.r_max - 1), d * self.d_max

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        mean, var = moments(x)
        std = (var + EPS).sqrt()
        r_max, d_max = self.limits()
        self.steps += 1
        with torch.no_grad():
            r, d = std / self.std, (mean - self.mean) / self.std
            self.clipped.append(bool(((r > r_max) | (r < 1 / r_max) | (d.abs() > d_max)).any()))
            r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)
            self.mean = self.mean + self.share() * (mean - self.mean)
            self.std = self.std + self.share() * (std - self.std)
            self.var = self.std**2 - EPS
        return affine((x - column(mean, x)) / column(std, x) * column(r, x) + column(d, x), parameters)


class BatchGroupNorm(BatchNorm):
    """Zhou et al. 2020: (N, G, D / G), one mean and variance over the rows and what is in the group."""

    def __init__(self, channels: int, num_groups: int, momentum: float | None = 0.1) -> None:
        super().__init__(channels, momentum)
        self.num_groups = num_groups

    def alone(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        parts = x.reshape(len(x), self.num_groups, -1)
        mean = parts.mean((0, 2), keepdim=True)
        var = (parts - mean).square().mean((0, 2), keepdim=True)
        return affine(((parts - mean) / (var + EPS).sqrt()).reshape(x.shape), parameters)

    def population(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.reshape(len(x), self.num_groups, -1).transpose(0, 1).flatten(1)
        mean, var = (
            table.repeat_interleave(self.channels // self.num_groups) for table in (values.mean(1), values.var(1))
        )
        return mean, var


class EnhancedBatchNorm(BatchNorm):
    """Liang et al. 2020: weight * sigmoid(gate_weight * instance mean + gate_bias) * xhat + bias."""

    def gated(self, x: Tensor, xhat: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        instance = x.mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x
        gate = torch.sigmoid(column(parameters["gate_weight"], x) * instance + column(parameters["gate_bias"], x))
        return affine(gate * xhat, parameters)

    def alone(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return self.gated(x, in_groups(x, groups), parameters)

    def evaluate(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return self.gated(x, normal(x, self.mean, self.var), parameters)


class MemorizedBatchNorm(BatchNorm):
    """Guo et al. 2018: weighted averages of mean and E[x^2] over the last batches, newest first."""

    def __init__(self, channels: int, memory: int, decay: float) -> None:
        super().__init__(channels)
        self.size, self.decay = memory, decay
        self.entries: list[tuple[Tensor, Tensor]] = []  # (mean, E[x^2])

    def combined(self, entries: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        weights = [self.decay**age for age in range(len(entries))]
        mean = sum((w * entry[0] for w, entry in zip(weights, entries, strict=True)), torch.zeros(())) / sum(weights)
        square = sum((w * entry[1] for w, entry in zip(weights, entries, strict=True)), torch.zeros(())) / sum(weights)
        return mean, square - mean.square()

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        self.steps += 1
        return self.remember(x, parameters, self.entries)

    def again(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The second of a double forward: the newest entry is taken anew."""
        return self.remember(x, parameters, self.entries[1:])

    def remember(self, x: Tensor, parameters: Mapping[str, Tensor], older: list[tuple[Tensor, Tensor]]) -> Tensor:
        mean, square = values_of(x).mean(1), values_of(x).square().mean(1)
        used = self.combined([(mean, square), *older][: self.size])
        self.entries = [(mean.detach(), square.detach()), *older][: self.size]
        self.mean, self.var = self.combined(self.entries)
        return affine(normal(x, *used), parameters)

    def buffers(self) -> dict[str, Tensor]:
        """Of the memory the rows in use: the others count for nothing."""
        means = torch.stack([mean for mean, _ in self.entries])
        variances = torch.stack([square - mean.square() for mean, square in self.entries])
        count = torch.tensor(len(self.entries))
        return {**super().buffers(), "memory_mean": means, "memory_var": variances, "memory_count": count}


class CrossIterationBatchNorm(BatchNorm):
    """Yao et al. 2021 without compensation: plain averages of mean and E[x^2] over the window."""

    def __init__(self, channels: int, window: int) -> None:
        super().__init__(channels)
        self.window = window
        self.past: list[tuple[Tensor, Tensor]] = []

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        self.steps += 1
        mean, square = values_of(x).mean(1), values_of(x).square().mean(1)
        entries = [(mean, square), *self.past[: self.window - 1]]
        center = torch.stack([entry[0] for entry in entries]).mean(0)
        var = torch.stack([entry[1] for entry in entries]).mean(0) - center**2
        self.past.insert(0, (mean.detach(), square.detach()))
        with torch.no_grad():
            self.follow(x)
        return affine(normal(x, center, var), parameters)


class DomainBatchNorm(BatchNorm):
    """A batch norm of each domain (methods.md, section 15); statistics and affine map may be shared."""

    def __init__(
        self, channels: int, num_domains: int, training: str, running: str, momentum: float | None = 0.1
    ) -> None:
        super().__init__(channels, momentum)
        self.apart = training == "domain"
        self.sets = [BatchNorm(channels, momentum) for _ in range(num_domains if running == "domain" else 1)]

    def alone(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        """Of one batch: whose statistics a scope shares, not a domain."""
        return affine(in_groups(x, None), self.of_rows(parameters, groups))

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        assert groups is not None
        y = affine(in_groups(x, groups if self.apart else None), self.of_rows(parameters, groups))
        with torch.no_grad():
            for index, one in enumerate(self.sets):
                rows = x[groups == index] if len(self.sets) > 1 else x
                if len(rows):
                    one.steps += 1
                    one.follow(rows)
        return y

    def evaluate(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        assert groups is not None
        sets = groups if len(self.sets) > 1 else torch.zeros_like(groups)
        mean, var = (torch.stack([getattr(one, name) for one in self.sets])[sets] for name in ("mean", "var"))
        return affine(normal(x, mean, var), self.of_rows(parameters, groups))

    def of_rows(self, parameters: Mapping[str, Tensor], groups: Tensor | None) -> dict[str, Tensor]:
        return {name: table[groups] if table.ndim == 2 else table for name, table in parameters.items()}

    def buffers(self) -> dict[str, Tensor]:
        parts = [one.buffers() for one in self.sets]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return stacked if len(self.sets) > 1 else {name: table[0] for name, table in stacked.items()}


class IndependentNorm:
    """GN, LN, IN, PN by definition, one set of values of a sample at a time; it has no state."""

    def __init__(self, sharing: str, eps: float = EPS) -> None:
        self.sharing, self.eps = sharing, eps

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)
        rows = []
        for sample in flat:
            if self.sharing == "sample":
                rows.append(self.normal(sample.flatten()).view(sample.shape))
            elif self.sharing == "groups of 2":
                rows.append(torch.cat([self.normal(part.flatten()).view(part.shape) for part in sample.split(2)]))
            elif self.sharing == "channel":
                rows.append(torch.stack([self.normal(values) for values in sample]))
            else:
                rows.append(torch.stack([self.normal(values) for values in sample.T], 1))
        return affine(torch.stack(rows).view(x.shape) if rows else x, parameters)

    def normal(self, values: Tensor) -> Tensor:
        mean = values.sum() / values.numel()
        var = ((values - mean) ** 2).sum() / values.numel()
        return (values - mean) / (var + self.eps) ** 0.5

    def evaluate(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        return self.train(x, parameters)

    def buffers(self) -> dict[str, Tensor]:
        return {}


class ProxyNorm(IndependentNorm):
    """Labatie et al. 2021, and the authors' quadrature."""

    def __init__(self, activation: Callable[[Tensor], Tensor], num_groups: int, num_points: int = 200) -> None:
        super().__init__("sample")
        self.activation, self.num_groups, self.num_points = activation, num_groups, num_points

    def train(self, x: Tensor, parameters: Mapping[str, Tensor], groups: Tensor | None = None) -> Tensor:
        weight, bias, scale, shift = (parameters[name] for name in ("weight", "bias", "proxy_scale", "proxy_shift"))
        return proxy_norm(x, weight, bias, scale, shift, self.activation, self.num_groups, self.num_points)


def proxy_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    phi: Callable[[Tensor], Tensor],
    groups: int,
    n: int = 200,
    eps: float = 0.03,
) -> Tensor:
    """Group norm, activation, and the moments of the activated proxy at ``n`` quantiles of the normal distribution."""
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(2, keepdim=True)
    var = ((grouped - mean) ** 2).mean(2, keepdim=True)
    y = ((grouped - mean) / (var + EPS).sqrt()).reshape(x.shape)
    z = phi(column(weight, x) * y + column(bias, x))
    levels = 2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1
    quantiles = (math.sqrt(2) * torch.erfinv(levels)).to(x.dtype)[:, None]
    responses = phi(weight * ((1 + scale) * quantiles + shift) + bias)
    expectation = responses.sum(0) / n
    variance = ((responses - expectation) ** 2).sum(0) / n
    return (z - column(expectation, x)) / (column(variance, x) + eps).sqrt()


class CompensatedBatchNorm:
    """Yao et al. 2021 behind its convolution, patches by unfold.

    ``moments="exact"`` computes the past moments anew from the patches of the past. The weight of the affine map and
    its bias are ``gamma`` and ``beta``.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        window: int = 3,
        burn_in: int = 0,
        rho: float = 1.0,
        guard: str = "max",
        moments: str = "taylor",
        ramp: str = "two_stage",
        momentum: float = 0.1,
    ) -> None:
        self.conv, self.window, self.burn_in, self.rho = conv, window, burn_in, rho
        self.guard, self.moments, self.ramp, self.momentum = guard, moments, ramp, momentum
        channels = conv.out_channels
        self.gamma = torch.linspace(0.5, 2, channels, dtype=torch.float64, requires_grad=True)
        self.beta = torch.linspace(-1, 1, channels, dtype=torch.float64, requires_grad=True)
        self.running_mean, self.running_var = torch.zeros(channels).double(), torch.ones(channels).double()
        self.past: list[list[Tensor | tuple[Tensor, ...] | list[Tensor]]] = []
        self.forwards = self.guarded = 0

    def patches(self, x):
        """(N * positions, groups, P)"""
        columns = F.unfold(x, self.conv.kernel_size, padding=self.conv.padding, stride=self.conv.stride)
        return columns.view(len(x), self.conv.groups, -1, columns.shape[-1]).permute(0, 3, 1, 2).flatten(0, 1)

    def outputs(self, patches, weight, bias):
        """(C, N * positions)"""
        weight = weight.flatten(1).unflatten(0, (self.conv.groups, -1))
        y = torch.einsum("gcp,mgp->gcm", weight, patches).flatten(0, 1)
        return y if bias is None else y + bias[:, None]

    def wanted(self):
        now = self.forwards + 1
        if self.ramp == "linear":
            return int((self.window - 1) * min(now / self.burn_in, 1.0))
        return self.window - 1 if now > self.burn_in else 0

    def __call__(self, x):
        weight, bias, patches = self.conv.weight, self.conv.bias, self.patches(x)
        y = self.outputs(patches, weight, bias)
        mean, square = y.mean(1), (y * y).mean(1)
        wanted = self.wanted()
        means, squares = [mean], [square]
        for entry in self.past[:wanted]:
            moved = self.moved(entry)
            means.append(moved[0])
            squares.append(moved[1])
        if wanted:
            leaves = [weight] if bias is None else [weight, bias]
            slopes = [torch.autograd.grad(table.sum(), leaves, retain_graph=True) for table in (mean, square)]
            values = [
                mean.detach(),
                square.detach(),
                *slopes,
                [leaf.detach().clone() for leaf in leaves],
                patches.detach(),
            ]
            self.past.insert(0, values)
        means, squares = torch.stack(means), torch.stack(squares)
        variances = squares - means**2
        self.guarded += int((variances < 0).sum())
        if self.guard == "max":
            center = means.mean(0)
            var = torch.maximum(squares, means**2).mean(0) - center**2
        else:
            valid = (variances >= 0).double()
            center = (valid * means).sum(0) / valid.sum(0)
            var = (valid * squares).sum(0) / valid.sum(0) - center**2
        out = (y - center[:, None]) / (var[:, None] + EPS).sqrt() * self.gamma[:, None] + self.beta[:, None]
        with torch.no_grad():
            count = y.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_((square - mean**2) * count / (count - 1), self.momentum)
        self.forwards += 1
        shape = self.conv(x).shape
        return out.view(len(center), len(x), *shape[2:]).transpose(0, 1)

    def moved(self, entry):
        """(mean, E[y^2]) of a past iteration at the present weights; a constant."""
        mean, square, mean_slopes, square_slopes, before, patches = entry
        now = [leaf.detach() for leaf in (self.conv.weight, self.conv.bias) if leaf is not None]
        if self.moments == "exact":
            y = self.outputs(patches, *now, *([None] if len(now) == 1 else []))
            return mean + self.rho * (y.mean(1) - mean), square + self.rho * ((y * y).mean(1) - square)
        for slope, square_slope, new, old in zip(mean_slopes, square_slopes, now, before, strict=True):
            mean = mean + self.rho * (slope * (new - old)).reshape(len(mean), -1).sum(1)
            square = square + self.rho * (square_slope * (new - old)).reshape(len(mean), -1).sum(1)
        return mean, square
