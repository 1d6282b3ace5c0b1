"""Statistics for inference: those of the population, instead of the moving average that training keeps.

==================================== =========================================================================
:func:`precise_bn`                   the statistics of the training data under the current weights
:func:`recompute_statistics`         those of another domain (AdaBN), also blended with the stored ones
``leakfree.norms.batch_statistics``  those of each batch at test time ("prediction-time BN"): nothing is stored
==================================== =========================================================================

Not here: how moments are taken and merged over ranks (``input_moments``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from leakfree.distributed import broadcast_object
from leakfree.errors import LeakfreeError
from leakfree.input_moments import (
    Forward,
    Measurement,
    Seen,
    Statistics,
    is_plain,
    measuring,
    statistics_of,
    unwrap,
)
from leakfree.norms import DomainBatchNorm
from leakfree.norms.domains import Key
from leakfree.norms.domains import domain as inside_domain

__all__ = ["PreciseBNResult", "Shift", "precise_bn", "recompute_statistics"]

Rows = dict[str, list[Statistics]]  # path of a layer -> rows of its running statistics
Target = Callable[[Statistics, int], tuple[Tensor, Tensor]]  # (row, samples) -> the mean and variance to store


@dataclass(frozen=True)
class Shift:
    """How far the statistics of a layer moved, averaged over its channels.

    ``mean``: |new mean - old mean| in units of the old standard deviation, sqrt(old var + eps).
    ``var``: |new var - old var| / (old var + eps).
    """

    mean: float
    var: float


@dataclass(frozen=True)
class PreciseBNResult:
    """What :func:`precise_bn` or :func:`recompute_statistics` did.

    Attributes:
        num_samples: samples used, over all ranks.
        layers: module path -> how far its statistics moved; where a DomainBN keeps statistics of each
            domain, "path[domain]" for each.
        untouched: the same names, for what saw fewer than two values and keeps its statistics.
    """

    num_samples: int
    layers: dict[str, Shift]
    untouched: tuple[str, ...] = ()


def precise_bn(
    model: nn.Module,
    loader: Iterable[Any],
    num_samples: int | None = None,
    *,
    layerwise: bool = False,
    forward: Forward | None = None,
    progress: bool = True,
) -> PreciseBNResult:
    """Replace the running statistics of every batch norm by those of the data under the current weights.

    Definition (pooled estimator): mean and variance of all values that enter the layer, over all
    batches, calls and ranks, as if they were one batch. ``running_var`` receives the unbiased
    variance, M2 / (n - 1), as torch's own update does. For the first batch norm this is exactly the
    statistics of the concatenated data; a later one sees inputs that the earlier ones normalized with
    *batch* statistics, so use batches composed like those of training and not too small (>= 32).

    With ``layerwise`` every layer is exact and batches may be of any size: in the order of their first
    execution, each layer is estimated and then normalizes with its result while the next one is, so what is
    stored is what a forward in eval mode produces. That takes one pass over the loader for each layer.
    (A layer that runs again *behind* a later one sees there what the old statistics of that one make.)

    Meanwhile batch norms that track statistics normalize in training mode (``layerwise``: in eval mode); frozen
    ones (their ``frozen`` attribute) and everything else, dropout included, stay in the mode you left them in, so
    call it on a model in eval mode unless your forward needs otherwise. A DomainBN gets the statistics
    of each domain from its own rows; let ``forward`` say the domains. Afterwards only
    ``running_mean`` and ``running_var`` differ, written in place: modes, momentum, hooks, counters,
    other buffers and random states are restored, also when something raises, and then the statistics too.
    No gradients.

    Across ranks: every rank calls it with its own share of the data. Numbers of samples may differ and
    be zero; the result is bitwise the same on all ranks. One exchange of 2C + 1 numbers per layer and
    rank. If the model itself communicates in its forward (SyncBN unless ``layerwise``, ShuffleBN likewise,
    Shuffled), every rank needs the same number of batches (which may differ in size); they are counted in step. An
    error of one rank's loader, or of its forward in a model that does not communicate, is raised on all ranks.

    Args:
        loader: batches; iterated once, or with ``layerwise`` once per layer, with the same random states each time.
        num_samples: samples to use over all ranks; each rank stops after the batch with which it has
            its equal share, ``ceil(num_samples / world size)``. None = the whole loader. A loader
            that ends earlier is no error: the result tells how many were used.
        layerwise: the exact mode.
        forward: called as ``forward(model, batch)``. By default the model gets, on its own device, the
            batch if it is a tensor, the first item of a tuple or list, or a dict as keyword arguments.
        progress: show a progress bar on rank 0 when stderr is a terminal.

    The samples of a batch are the length of its first tensor (of a tuple, list or dict), of its first
    list (as in a detection batch), or of the batch itself if it is a list of dicts (detectron2's).

    Raises:
        LeakfreeError: no batch norm to estimate, no samples on any rank, a non-finite activation, ranks with different
            numbers of batches in a model that communicates, or (``layerwise``) a loader that can be iterated only once
            or gives other numbers of samples the second time.

    Reference: Wu & Johnson 2021, section 3; the estimator of fvcore's ``update_bn_stats``, merged over ranks. The
    paper leaves the layer-by-layer order open; first execution is the choice here.
    """
    model = unwrap(model)
    layers = dict(_layers(model))
    if not layers:
        raise LeakfreeError("precise_bn: the model has no batch norm with running statistics that is not frozen")
    rows = {path: statistics_of(path, layer) for path, layer in layers.items()}
    task = _Task("precise_bn", model, layers, rows, rows, _pooled)
    return task.run(loader, num_samples, layerwise=layerwise, forward=forward, progress=progress)


def recompute_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    domain: Key | None = None,
    *,
    source_samples: float = 0,
    source_domain: Key | None = None,
    num_samples: int | None = None,
    layerwise: bool = False,
    forward: Forward | None = None,
    progress: bool = True,
) -> PreciseBNResult:
    """Replace the running statistics by those of (unlabelled) data of a target domain, or move them towards these.

    AdaBN is ``source_samples=0``: the pooled estimator of :func:`precise_bn` on the target data. Else the stored
    statistics, those of the source, count as ``source_samples`` = N samples beside the n of the target::

        mean = N / (N + n) * source + n / (N + n) * target,  the variance likewise

    where n is the number of samples (images, not values) used over all ranks, and the source's statistics are those
    of rank 0. A small target set wants an N > 0;
    never tune it on test labels. With ``layerwise`` each layer sees inputs that the earlier ones normalized with their
    blended statistics, which is what a forward in eval mode then does.

    What it restores, raises, sends over ranks and leaves alone is as in :func:`precise_bn`. Estimate one domain or
    corruption at a time, from batches that are not sorted by class. Statistics of each batch at test time instead
    ("prediction-time BN") are the context ``leakfree.norms.batch_statistics``.

    Args:
        domain: the index or name of the domain that the data is from. Then only the statistics of this domain, of
            every DomainBN that keeps some for each domain, are replaced; other batch norms use what they have stored.
        source_samples: N, at least 0 and finite.
        source_domain: the domain whose statistics are the source's; by default ``domain`` itself.
        loader, num_samples, layerwise, forward, progress: as in :func:`precise_bn`; ``forward`` runs inside
            ``leakfree.norms.domain(domain)``.

    Raises:
        LeakfreeError: as in :func:`precise_bn`; N out of range; a domain that a layer does not have; ``domain`` for a
            model without DomainBN, ``source_domain`` without ``domain``.

    Reference: Li et al. 2017 (AdaBN); the blend is Schneider et al. 2020, section 3. Choices: n counts samples, and
    variances are averaged without the distance between the two means, both as there.
    """
    if not 0 <= source_samples < math.inf:
        raise LeakfreeError(f"recompute_statistics: source_samples must be finite and at least 0, got {source_samples}")
    if source_domain is not None and domain is None:
        raise LeakfreeError("recompute_statistics: source_domain needs a domain whose statistics are to be replaced")
    model = unwrap(model)
    layers = {path: layer for path, layer in _layers(model) if domain is None or _keeps_domains(layer)}
    if not layers:
        kind = "batch norm with running statistics" if domain is None else "DomainBN with statistics of each domain"
        raise LeakfreeError(f"recompute_statistics: the model has no {kind} that is not frozen")
    rows = {path: statistics_of(path, layer) for path, layer in layers.items()}
    wanted, source = rows, rows
    if domain is not None:
        of_source = domain if source_domain is None else source_domain
        wanted = {path: _of_domain(layers[path], own, domain) for path, own in rows.items()}
        source = {path: _of_domain(layers[path], own, of_source) for path, own in rows.items()}
    pairs = zip(chain.from_iterable(wanted.values()), chain.from_iterable(source.values()), strict=True)
    stored = {row.name: [table.cpu() for table in other.stored()] for row, other in pairs}
    if source_samples:
        stored = broadcast_object(stored)  # ranks may have moving averages of their own

    def blended(row: Statistics, samples: int) -> tuple[Tensor, Tensor]:
        share = samples / (source_samples + samples)
        tables = zip(stored[row.name], row.of_inputs(), strict=True)
        mean, var = (new if share == 1 else old.to(new.device).lerp(new, share) for old, new in tables)
        return mean, var

    task = _Task("recompute_statistics", model, layers, rows, wanted, blended)
    with nullcontext() if domain is None else inside_domain(domain):
        return task.run(loader, num_samples, layerwise=layerwise, forward=forward, progress=progress)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose running statistics can be estimated: batch norms, and what splits its input by itself."""
    for path, module in model.named_modules():
        kind = isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "by_statistics")
        if kind and isinstance(getattr(module, "running_mean", None), Tensor) and not getattr(module, "frozen", False):
            yield path or type(module).__name__, module


def _keeps_domains(layer: nn.Module) -> bool:
    return isinstance(layer, DomainBatchNorm) and layer.running_mean is not None and layer.running_mean.ndim == 2


def _of_domain(layer: nn.Module, rows: list[Statistics], key: Key) -> list[Statistics]:
    assert isinstance(layer, DomainBatchNorm)
    return [rows[layer.index_of(key)]]


def _pooled(row: Statistics, samples: int) -> tuple[Tensor, Tensor]:
    return row.of_inputs()


@dataclass(frozen=True)
class _Task:
    """Which running statistics of a model are to be replaced, and by what."""

    name: str
    model: nn.Module
    layers: dict[str, nn.Module]
    rows: Rows  # all of the layers
    wanted: Rows  # those to replace
    target: Target

    def run(
        self,
        loader: Iterable[Any],
        num_samples: int | None,
        *,
        layerwise: bool,
        forward: Forward | None,
        progress: bool,
    ) -> PreciseBNResult:
        with measuring(self.model):
            measurement = Measurement(
                self.name,
                self.model,
                loader,
                num_samples,
                forward=forward,
                progress=progress,
                norms_communicate=not layerwise,
                passes=len(self.layers) if layerwise else 1,
            )
            for _, norm in _layers(self.model):
                norm.training = False
            with measurement:
                seen = self._layer_by_layer(measurement) if layerwise else self._at_once(measurement)
        return self._write(seen)

    def _at_once(self, measurement: Measurement) -> Seen:
        """All layers normalize with batch statistics, and are counted in one pass."""
        for layer in self.layers.values():
            layer.training = True
            # Buffers are put back. At 1 the moments of a plain norm can be read from them; others may use theirs.
            layer.momentum = 1.0 if is_plain(layer) else 0.0  # type: ignore[assignment]
        return measurement.run(self.layers, self.rows)

    def _layer_by_layer(self, measurement: Measurement) -> Seen:
        """All layers normalize with what they have stored, which is replaced in the order of execution."""
        seen = measurement.run(self.layers, self.rows)  # tells the order, and all about the first layer
        for path in seen.order:
            if path != seen.order[0]:
                for row in self.rows[path]:
                    row.clear(row.running_mean.device)
                measurement.run({path: self.layers[path]}, {path: self.rows[path]})
            for row in self._known(path):
                row.store(*self.target(row, seen.num_samples))
        return seen

    def _known(self, path: str) -> list[Statistics]:
        """The rows of a layer that can be replaced."""
        known = [row for row in self.wanted[path] if row.is_known]
        for row in known:
            if not row.is_finite:
                raise LeakfreeError(
                    f"{self.name}: the inputs of {row.name} are not finite, so it has no population statistics"
                )
        return known

    def _write(self, seen: Seen) -> PreciseBNResult:
        """Fill the buffers in place; nothing is written if any layer's statistics are not finite."""
        wanted = list(chain.from_iterable(self.wanted.values()))
        if all(row.count == 0 for row in wanted):
            raise LeakfreeError(f"{self.name}: the forward ran no batch norm of the model")
        known = list(chain.from_iterable(self._known(path) for path in self.wanted))
        targets = [self.target(row, seen.num_samples) for row in known]
        shifts = {row.name: _shift(row, *target) for row, target in zip(known, targets, strict=True)}
        for row, target in zip(known, targets, strict=True):
            row.store(*target)
        return PreciseBNResult(seen.num_samples, shifts, tuple(row.name for row in wanted if row.name not in shifts))


def _shift(row: Statistics, mean: Tensor, var: Tensor) -> Shift:
    old_mean, old_var = row.stored()
    scale = old_var + row.eps
    return Shift(((mean - old_mean).abs() / scale.sqrt()).mean().item(), ((var - old_var).abs() / scale).mean().item())
