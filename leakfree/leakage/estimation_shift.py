"""Estimation shift: how far the statistics that a layer has stored are from those that its inputs have at test time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from leakfree.errors import LeakfreeError
from leakfree.input_moments import Forward, Measurement, Statistics, measuring, statistics_of, unwrap

__all__ = ["EstimationShift", "LayerShift", "estimation_shift"]


@dataclass(frozen=True)
class LayerShift:
    """The distances of one layer: Euclidean norms over its channels, ``s`` being standard deviations.

    Attributes:
        mean: |stored mean - mean of the inputs|.
        std: |stored s - s of the inputs|.
        relative_mean, relative_std: the same, divided by (|s of the inputs| + eps), to compare layers.
    """

    mean: float
    std: float
    relative_mean: float
    relative_std: float


@dataclass(frozen=True)
class EstimationShift:
    """What :func:`estimation_shift` found.

    Attributes:
        num_samples: samples used, over all ranks.
        layers: module path -> shift, in the order of first execution; "path[domain]" where a layer keeps statistics
            of each domain.
        unknown: the same names, for what saw fewer than two values.
    """

    num_samples: int
    layers: dict[str, LayerShift]
    unknown: tuple[str, ...] = ()


def estimation_shift(
    model: nn.Module,
    loader: Iterable[Any],
    num_samples: int | None = None,
    *,
    forward: Forward | None = None,
    progress: bool = True,
) -> EstimationShift:
    """Measure the estimation shift magnitude of every layer with running statistics, frozen ones included.

    ``ESM_mean = ||m_hat - m||_2`` and ``ESM_std = ||s_hat - s||_2`` over channels: m_hat and s_hat are what the layer
    has stored, m and s the mean and standard deviation (root of the unbiased variance) of all values that enter it
    when the *whole* data runs through the model in eval mode, in which the layers before it use what they
    have stored. So a shift that accumulates through the layers is seen where it arrives. 0 everywhere on the
    data of ``precise_bn(..., layerwise=True)``.

    The model is left as it was: modes, buffers, random states, hooks. No gradients. Across ranks: every rank calls
    it with its own share of the data, uneven or empty; all get the same result.

    Args:
        loader, num_samples, forward, progress: as in :func:`leakfree.population.precise_bn`; ``loader`` gives the test
            data. ``forward`` says the domains of a DomainBN.

    Raises:
        LeakfreeError: the model has no layer with running statistics, no samples, or inputs that are not finite.

    Reference: Huang et al. 2022, "Delving into the Estimation Shift of Batch Normalization in a Network". Choices:
    pooled moments at each layer's input, and the relative form.
    """
    model = unwrap(model)
    layers = {
        path or type(module).__name__: module for path, module in model.named_modules() if _has_statistics(module)
    }
    if not layers:
        raise LeakfreeError("estimation_shift: the model has no layer with running statistics")
    rows = {path: statistics_of(path, layer) for path, layer in layers.items()}
    with measuring(model):
        model.eval()
        measurement = Measurement(
            "estimation_shift", model, loader, num_samples, forward=forward, progress=progress, norms_communicate=False
        )
        with measurement:
            seen = measurement.run(layers, rows)
    order = dict.fromkeys([*seen.order, *layers])
    ordered = [row for path in order for row in rows[path]]
    shifts = {row.name: _shift(row) for row in ordered if row.is_known}
    return EstimationShift(seen.num_samples, shifts, tuple(row.name for row in ordered if not row.is_known))


def _has_statistics(module: nn.Module) -> bool:
    """Whether it normalizes with one mean and variance of everything; an instance norm averages those of instances."""
    stored = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return all(isinstance(table, Tensor) for table in stored) and not isinstance(
        module, nn.modules.instancenorm._InstanceNorm
    )


def _shift(row: Statistics) -> LayerShift:
    if not row.is_finite:
        raise LeakfreeError(f"estimation_shift: the inputs of {row.name} are not finite, so they have no statistics")
    (mean, var), (stored_mean, stored_var) = row.of_inputs(), row.stored()
    std = var.sqrt()
    of_mean = (stored_mean - mean).norm().item()
    of_std = (stored_var.clamp(min=0).sqrt() - std).norm().item()
    scale = std.norm().item() + row.eps
    return LayerShift(of_mean, of_std, of_mean / scale, of_std / scale)
