"""Statistics for inference: the precise population statistics of every batch norm of a model.

Moments are taken from the *input* of each layer, so that who shared statistics in the forward (a
rank, a ghost batch, a random group) does not enter the estimate, and a layer that runs several times
in one forward is simply counted several times. Not here: the moving average, which the layers keep
by themselves in training.

Legend: C channels, n values per channel, M2 = sum of squared deviations from the mean.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from leakfree.distributed import all_gather_ints, all_gather_objects, get_rank, get_world_size, is_distributed
from leakfree.errors import LeakfreeError
from leakfree.norms import DomainBatchNorm, ShuffleBatchNorm, SyncBatchNorm
from leakfree.shuffle import Shuffled

__all__ = ["PreciseBNResult", "Shift", "precise_bn"]

_CHUNK = 2**24  # values converted to float64 at a time (128 MiB)
_END = object()
_Layer = nn.modules.batchnorm._BatchNorm
Forward = Callable[[nn.Module, Any], object]


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
    """What :func:`precise_bn` did.

    Attributes:
        num_samples: samples used, over all ranks.
        layers: module path -> how far its statistics moved; where a DomainBN keeps statistics of each
            domain, "path[domain]" for each.
        untouched: the same names, for what saw fewer than two values and keeps its statistics.
    """

    num_samples: int
    layers: dict[str, Shift]
    untouched: tuple[str, ...] = ()


class _Moments:
    """(n, mean, M2) per channel in float64, merged by Chan's formula: no cancellation.

    ``running_mean`` and ``running_var`` (C,) are what they will replace, in place.
    """

    def __init__(self, running_mean: Tensor, running_var: Tensor, eps: float) -> None:
        self.running_mean, self.running_var, self.eps = running_mean, running_var, eps
        self.count = 0
        self.mean = torch.zeros_like(running_mean, dtype=torch.float64)
        self.m2 = torch.zeros_like(self.mean)

    def clear(self) -> None:
        """Back to no values, on the CPU (where the ranks' results meet)."""
        self.count = 0
        self.mean = torch.zeros_like(self.mean, device="cpu")
        self.m2 = torch.zeros_like(self.mean)

    def merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta * delta * (self.count * count / total)
        self.count = total

    def add(self, x: Tensor) -> None:
        """Count the values of ``x`` (N, C, *)."""
        if not x.numel():
            return
        rows = max(1, _CHUNK // x[0].numel())
        for part in x.detach().split(rows):
            dims = [0, *range(2, part.ndim)]
            count = part.numel() // part.shape[1]
            var, mean = torch.var_mean(part.double(), dims, correction=0)
            self.merge(count, mean, var * count)


def precise_bn(
    model: nn.Module,
    loader: Iterable[Any],
    num_samples: int | None = None,
    *,
    forward: Forward | None = None,
    progress: bool = True,
) -> PreciseBNResult:
    """Replace the running statistics of every batch norm by those of the data under the current weights.

    Definition (pooled estimator): mean and variance of all values that enter the layer, over all
    batches, calls and ranks, as if they were one batch. ``running_var`` receives the unbiased
    variance, M2 / (n - 1), as torch's own update does. For the first batch norm this is exactly the
    statistics of the concatenated data; a later one sees inputs that the earlier ones normalized with
    *batch* statistics, so use batches composed like those of training and not too small (>= 32).

    Meanwhile batch norms that track statistics normalize in training mode; frozen ones (their
    ``frozen`` attribute) and everything else, dropout included, stay in the mode you left them in, so
    call it on a model in eval mode unless your forward needs otherwise. A DomainBN gets the statistics
    of each domain from its own rows; let ``forward`` say the domains. Afterwards only
    ``running_mean`` and ``running_var`` differ, written in place: modes, momentum, hooks, counters,
    other buffers and random states are restored, also when something raises, and then the statistics too.
    No gradients.

    Across ranks: every rank calls it with its own share of the data. Numbers of samples may differ and
    be zero; the result is bitwise the same on all ranks. One exchange of 2C + 1 numbers per layer and
    rank. If the model itself communicates in its forward (SyncBN, ShuffleBN, Shuffled), every rank
    needs the same number of batches (which may differ in size); they are counted in step. An error of
    one rank's loader, or of its forward in a model that does not communicate, is raised on all ranks.

    Args:
        loader: batches; iterated once, in one pass.
        num_samples: samples to use over all ranks; each rank stops after the batch with which it has
            its equal share, ``ceil(num_samples / world size)``. None = the whole loader. A loader
            that ends earlier is no error: the result tells how many were used.
        forward: called as ``forward(model, batch)``. By default the model gets, on its own device, the
            batch if it is a tensor, the first item of a tuple or list, or a dict as keyword arguments.
        progress: show a progress bar on rank 0 when stderr is a terminal.

    The samples of a batch are the length of its first tensor (of a tuple, list or dict), of its first
    list (as in a detection batch), or of the batch itself if it is a list of dicts (detectron2's).

    Raises:
        LeakfreeError: no batch norm to estimate, no samples on any rank, a non-finite activation, or
            ranks with different numbers of batches in a model that communicates.

    Reference: Wu & Johnson 2021, section 3; the estimator of fvcore's ``update_bn_stats``, merged over ranks.
    """
    if num_samples is not None and num_samples < 1:
        raise LeakfreeError(f"precise_bn: num_samples must be at least 1, got {num_samples}")
    model = _unwrap(model)
    layers = dict(_layers(model))
    if not layers:
        raise LeakfreeError("precise_bn: the model has no batch norm with running statistics that is not frozen")
    estimates = {path: _estimates(path, layer) for path, layer in layers.items()}
    moments = {name: item for own in estimates.values() for name, item in own.items()}
    share = None if num_samples is None else -(-num_samples // get_world_size())
    with torch.no_grad(), _estimating(model, layers, estimates), _progress(progress, share) as advance:
        seen, failure = _run(model, loader, share, forward or _default_forward, advance)
    total = _merge_ranks(seen, moments, failure)
    return _write(moments, total)


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP (which would synchronize buffers) and inside ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _layers(model: nn.Module) -> Iterator[tuple[str, _Layer]]:
    for path, module in model.named_modules():
        if isinstance(module, _Layer) and module.running_mean is not None and not getattr(module, "frozen", False):
            yield path or type(module).__name__, module


def _estimates(path: str, layer: _Layer) -> dict[str, _Moments]:
    """What is estimated for ``layer``, by name: one for each row of its running statistics."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    if isinstance(layer, DomainBatchNorm) and mean.ndim == 2:
        rows = enumerate(zip(mean, var, strict=True))
        return {f"{path}[{layer.label_of(index)}]": _Moments(*row, layer.eps) for index, row in rows}
    return {path: _Moments(mean, var, layer.eps)}


def _communicates(model: nn.Module) -> bool:
    kinds = (nn.SyncBatchNorm, SyncBatchNorm, ShuffleBatchNorm, Shuffled)
    return any(isinstance(module, kinds) or getattr(module, "communicates", False) for module in model.modules())


@contextmanager
def _estimating(
    model: nn.Module, layers: dict[str, _Layer], estimates: dict[str, dict[str, _Moments]]
) -> Iterator[None]:
    """Inside, ``layers`` normalize with batch statistics and their inputs are counted in ``estimates``."""
    with ExitStack() as stack:
        stack.enter_context(_random_states_kept())
        stack.enter_context(_state_kept(model, layers.values()))
        if "torch._dynamo" in sys.modules:  # compiled code would not see the hooks; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for path, layer in layers.items():
            layer.training = True
            layer.momentum = 0.0
            handle = layer.register_forward_pre_hook(_counter(list(estimates[path].values())), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _counter(moments: list[_Moments]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        for row, part in layer.by_statistics(x) if isinstance(layer, DomainBatchNorm) else [(0, x)]:
            moments[row].add(part)

    return count


@contextmanager
def _state_kept(model: nn.Module, layers: Iterable[_Layer]) -> Iterator[None]:
    """Restore modes, momentum and every buffer (the object and its values) on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _run(
    model: nn.Module, loader: Iterable[Any], share: int | None, forward: Forward, advance: Callable[[int], None]
) -> tuple[int, Exception | None]:
    """Run this rank's batches; return (samples seen, what went wrong).

    Errors are returned, not raised: a rank that left here would keep the others waiting for it.
    """
    in_step = is_distributed() and _communicates(model)
    seen = 0
    batches: Iterator[Any] | None = None
    failure: Exception | None = None
    while True:
        batch = _END
        try:
            if failure is None and (share is None or seen < share):
                batches = iter(loader) if batches is None else batches
                batch = next(batches, _END)
        except Exception as error:
            failure = error
        if in_step:
            goes_on, disagreement = _agree(batch is not _END, failure is not None)
            failure = failure or disagreement
        else:
            goes_on = batch is not _END
        if not goes_on:
            return seen, failure
        try:
            size = _batch_size(batch)
            forward(model, batch)
            seen += size
            advance(size)
        except Exception as error:
            failure = error


def _agree(has_batch: bool, failed: bool) -> tuple[bool, Exception | None]:
    """(whether all ranks run another batch, the error if only some could)."""
    everyone = all_gather_ints([int(has_batch), int(failed)])
    have = [bool(batch) for batch, _ in everyone]
    if any(failed for _, failed in everyone) or not any(have):
        return False, None
    if all(have):
        return True, None
    return False, LeakfreeError(
        "precise_bn: this model communicates in its forward (SyncBN, ShuffleBN or Shuffled), so every rank needs the "
        f"same number of batches, but rank {have.index(False)} ran out before rank {have.index(True)}"
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        return [_to(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value


def _default_forward(model: nn.Module, batch: Any) -> object:
    device = next(chain(model.parameters(), model.buffers())).device
    if isinstance(batch, dict):
        return model(**_to(batch, device))
    return model(_to(batch[0] if isinstance(batch, (list, tuple)) else batch, device))


def _batch_size(batch: Any) -> int:
    """The number of samples in ``batch``; see :func:`precise_bn`."""
    first = batch
    if isinstance(batch, (list, tuple)) and batch and not isinstance(batch[0], dict):
        first = batch[0]
    elif isinstance(batch, dict):
        first = next((value for value in batch.values() if isinstance(value, (Tensor, list, tuple))), None)
    if isinstance(first, (list, tuple)) or (isinstance(first, Tensor) and first.ndim):
        return len(first)
    raise LeakfreeError(f"precise_bn: cannot tell how many samples a batch of type {type(batch).__name__} holds")


@contextmanager
def _progress(wanted: bool, share: int | None) -> Iterator[Callable[[int], None]]:
    if not (wanted and get_rank() == 0 and sys.stderr.isatty()):
        yield lambda size: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("precise batch-norm statistics (samples)", total=share)
        yield lambda size: bar.advance(task, size)


def _merge_ranks(seen: int, moments: dict[str, _Moments], failure: Exception | None) -> int:
    """Merge all ranks' moments in rank order, hence alike on every rank; return the samples of all."""
    mine = {path: (item.count, item.mean.cpu(), item.m2.cpu()) for path, item in moments.items()}
    told = None if failure is None else (isinstance(failure, LeakfreeError), f"{type(failure).__name__}: {failure}")
    everyone = all_gather_objects((seen, told, mine))
    if failure is not None:
        raise failure
    for rank, (_, error, _) in enumerate(everyone):
        if error is not None:
            kind = LeakfreeError if error[0] else RuntimeError
            raise kind(f"precise_bn: rank {rank} failed: {error[1]}")
    if len(everyone) > 1:
        for path, item in moments.items():
            item.clear()
            for _, _, theirs in everyone:
                item.merge(*theirs[path])
    return sum(samples for samples, _, _ in everyone)


def _write(moments: dict[str, _Moments], num_samples: int) -> PreciseBNResult:
    """Fill the buffers in place; nothing is written if any layer's statistics are not finite."""
    if num_samples == 0:
        raise LeakfreeError("precise_bn: the loader gave no samples" + (" on any rank" if is_distributed() else ""))
    if all(item.count == 0 for item in moments.values()):
        raise LeakfreeError("precise_bn: the forward ran no batch norm of the model")
    known = {path: item for path, item in moments.items() if item.count > 1}
    for path, item in known.items():
        if not bool((item.mean + item.m2).isfinite().all()):
            raise LeakfreeError(f"precise_bn: the inputs of {path} are not finite, so it has no population statistics")
    shifts = {path: _fill(item) for path, item in known.items()}
    return PreciseBNResult(num_samples, shifts, tuple(path for path in moments if path not in known))


def _fill(moments: _Moments) -> Shift:
    mean, var = moments.mean, moments.m2 / (moments.count - 1)
    old_mean, old_var = moments.running_mean.to(mean), moments.running_var.to(mean)
    scale = old_var + moments.eps
    shift = Shift(((mean - old_mean).abs() / scale.sqrt()).mean().item(), ((var - old_var).abs() / scale).mean().item())
    moments.running_mean.copy_(mean)
    moments.running_var.copy_(var)
    return shift
