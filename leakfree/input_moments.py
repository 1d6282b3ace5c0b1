"""The moments of what enters the layers of a model that keep running statistics, over a loader and all ranks.

Taken from the *input* of a layer, so that who shared statistics in the forward (a rank, a ghost batch, a
random group) does not enter, and a layer that runs several times in one forward is simply counted
several times. What is done with them (population statistics, estimation shift) lives elsewhere.

Legend: C channels, n values per channel, M2 = sum of squared deviations from the mean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from leakfree.distributed import all_gather_ints, all_gather_objects, get_rank, get_world_size, is_distributed
from leakfree.errors import LeakfreeError
from leakfree.keeping import RandomStates, random_states_kept, state_kept
from leakfree.norms import BatchNorm, Partition, ShuffleBatchNorm, SyncBatchNorm, group_moments
from leakfree.partition import current_scope
from leakfree.shuffle import Shuffled

__all__ = [
    "Forward",
    "Measurement",
    "Seen",
    "Statistics",
    "default_forward",
    "is_plain",
    "measuring",
    "statistics_of",
    "unwrap",
]

_END = object()
_NEAR_ZERO = 8.0  # |mean| / std up to which a mean rounded to float32 does not show in the pooled variance
_BatchNorm = nn.modules.batchnorm._BatchNorm
Forward = Callable[[nn.Module, Any], object]


class Statistics:
    """One row of a layer's running statistics, and the moments of the inputs that it is about.

    A layer has one row, or one of each domain. The moments are (n, mean, M2) per channel in float64, merged by
    Chan's formula: no cancellation.

    Args:
        name: of the layer, and of the domain if there are several.
        row: the index of the row.
        running_mean, running_var: (C,), views of the layer's buffers.
        layer: what they are of. Its channels share statistics if it has ``pool_channels``, a function of the means and
            biased variances of channels, and ``channels_per_group``.
    """

    def __init__(self, name: str, row: int, running_mean: Tensor, running_var: Tensor, layer: nn.Module) -> None:
        self.name, self.row, self.running_mean, self.running_var = name, row, running_mean, running_var
        self.eps: float = layer.eps  # type: ignore[assignment]
        self._pool: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = getattr(layer, "pool_channels", None)
        self._channels: int = 1 if self._pool is None else layer.channels_per_group  # type: ignore[assignment]
        self.clear(running_mean.device)

    def clear(self, device: torch.device) -> None:
        """Back to no values."""
        self.count = 0
        self.mean = torch.zeros_like(self.running_mean, dtype=torch.float64, device=device)
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
        moments = group_moments(x, Partition())  # of this rank, by the norms' own passes: exact to a millionth
        count = x.numel() // x.shape[1]
        self.merge(count, moments.mean[0], moments.var[0] * count)

    @property
    def is_known(self) -> bool:
        """Whether there were the two values that a variance takes."""
        return self.count * self._channels > 1

    @property
    def is_finite(self) -> bool:
        return bool((self.mean + self.m2).isfinite().all())

    def of_inputs(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, M2 / (n - 1), as running statistics hold them; float64 (C,)."""
        if self._pool is None:
            return self.mean, self.m2 / (self.count - 1)
        mean, var = self._pool(self.mean, self.m2 / self.count)
        count = self.count * self._channels
        return mean, var * (count / (count - 1))

    def stored(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance that the layer normalizes with, float64 (C,), where those of the inputs are."""
        mean, var = self.running_mean.to(self.mean), self.running_var.to(self.mean)
        return (mean, var) if self._pool is None else self._pool(mean, var)

    @torch.no_grad()
    def store(self, mean: Tensor, var: Tensor) -> None:
        """Fill the layer's buffers, in place."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)


def statistics_of(path: str, layer: nn.Module) -> list[Statistics]:
    """The rows of the running statistics of ``layer``, named ``path``, or "path[domain]" for each domain."""
    mean: Any = layer.running_mean
    var: Any = layer.running_var
    if mean.ndim == 1:
        return [Statistics(path, 0, mean, var, layer)]
    label: Callable[[int], str] = getattr(layer, "label_of", str)
    rows = enumerate(zip(mean, var, strict=True))
    return [Statistics(f"{path}[{label(index)}]", index, *row, layer) for index, row in rows]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP (which would synchronize buffers) and inside ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


# ------------------------------------------------------------------------------------- nothing changes


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` may run in any mode and on any statistics; afterwards everything is as it was.

    Put back are modes, momenta, buffers (the objects and their values), extra state and random states. No gradients;
    compiled code, which would not see hooks, runs eagerly.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states_kept())
        stack.enter_context(state_kept(model, ("training", "momentum", "last_groups")))
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# ------------------------------------------------------------------------------------- passes over the data


@dataclass(frozen=True)
class Seen:
    """What a pass saw: samples over all ranks, and the paths of the layers in the order of their first execution."""

    num_samples: int
    order: tuple[str, ...]


class Measurement:
    """Passes of a model over a loader, in which the inputs of some layers are counted.

    Across ranks: every rank makes the same passes with its own share of the data, which may be uneven or
    empty; the merged moments are bitwise the same on all ranks. One exchange of 2C + 1 numbers per row of statistics
    and rank. If the model itself communicates in its forward, every rank needs the same number of batches (which may
    differ in size); they are counted in step. An error of one rank's loader, or of its forward in a model that does
    not communicate, is raised on all ranks.

    A plain batch norm in training mode at momentum 1 is not counted but read: its buffers then hold the moments of
    the batch.

    Args:
        name: who asks, for messages.
        num_samples: over all ranks; each rank stops after the batch with which it has its equal share.
        forward: called as ``forward(model, batch)``; None = the model on the batch, moved to its device.
        norms_communicate: whether batch norms are left in a mode in which they talk to other ranks.
        passes: how many there will be, for the progress bar; None = not known yet.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loader: Iterable[Any],
        num_samples: int | None,
        *,
        forward: Forward | None,
        progress: bool,
        norms_communicate: bool,
        passes: int = 1,
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise LeakfreeError(f"{name}: num_samples must be at least 1, got {num_samples}")
        if passes > 1 and isinstance(loader, Iterator):
            raise LeakfreeError(
                f"{name}: {passes} passes over the data need a loader that can be iterated again (a list, a "
                f"DataLoader), got {type(loader).__name__}, which can be iterated once"
            )
        self._name = name
        self._model = model
        self._loader = loader
        self._share = None if num_samples is None else -(-num_samples // get_world_size())
        self._forward = forward or default_forward
        self._in_step = is_distributed() and _communicates(model, norms_communicate)
        self._passes = passes
        self._states = RandomStates.take(loader)
        self._seen_first: int | None = None
        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not self._shows(progress))
        self._task = self._bar.add_task(f"{name} (samples)", total=self._share)

    @staticmethod
    def _shows(progress: bool) -> bool:
        return progress and get_rank() == 0 and sys.stderr.isatty()

    def __enter__(self) -> Measurement:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def run(self, layers: Mapping[str, nn.Module], statistics: Mapping[str, Sequence[Statistics]]) -> Seen:
        """One pass: count the inputs of ``layers`` in ``statistics`` (path -> all rows), merged over ranks.

        Every pass starts from the random states of the first, so that it sees the same batches.

        Raises:
            LeakfreeError: no samples on any rank, ranks out of step, or a loader that gave this pass other
                numbers of samples than the first.
        """
        if self._seen_first is not None:
            self._states.put_back()
        order: dict[str, None] = {}
        with ExitStack() as stack:
            for path, layer in layers.items():
                count, read = _counters(path, statistics[path], order)
                stack.callback(layer.register_forward_pre_hook(count, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(read, with_kwargs=True).remove)
            seen, failure = self._run()
        failure = failure or self._other_than_first(seen)
        return self._merge(seen, list(order), list(chain.from_iterable(statistics.values())), failure)

    def _other_than_first(self, seen: int) -> LeakfreeError | None:
        if self._seen_first is None:
            self._seen_first = seen
            if self._share is None:
                self._bar.update(self._task, total=seen * self._passes)
            else:
                self._bar.update(self._task, total=self._share * self._passes)
            return None
        if seen == self._seen_first:
            return None
        return LeakfreeError(
            f"{self._name}: the loader gave {seen} samples in a later pass but {self._seen_first} in the first; "
            "it must give the same data each time it is iterated"
        )

    def _run(self) -> tuple[int, Exception | None]:
        """Run this rank's batches; return (samples seen, what went wrong).

        Errors are returned, not raised: a rank that left here would keep the others waiting for it.
        """
        seen = 0
        batches: Iterator[Any] | None = None
        failure: Exception | None = None
        while True:
            batch = _END
            try:
                if failure is None and (self._share is None or seen < self._share):
                    batches = iter(self._loader) if batches is None else batches
                    batch = next(batches, _END)
            except Exception as error:
                failure = error
            if self._in_step:
                goes_on, disagreement = self._agree(batch is not _END, failure is not None)
                failure = failure or disagreement
            else:
                goes_on = batch is not _END
            if not goes_on:
                return seen, failure
            try:
                size = self._batch_size(batch)
                self._forward(self._model, batch)
                seen += size
                self._bar.advance(self._task, size)
            except Exception as error:
                failure = error

    def _agree(self, has_batch: bool, failed: bool) -> tuple[bool, Exception | None]:
        """(whether all ranks run another batch, the error if only some could)."""
        everyone = all_gather_ints([int(has_batch), int(failed)])
        have = [bool(batch) for batch, _ in everyone]
        if any(failed for _, failed in everyone) or not any(have):
            return False, None
        if all(have):
            return True, None
        return False, LeakfreeError(
            f"{self._name}: this model communicates in its forward (SyncBN, ShuffleBN or Shuffled), so every rank "
            f"needs the same number of batches, but rank {have.index(False)} ran out before rank {have.index(True)}"
        )

    def _merge(self, seen: int, order: list[str], rows: list[Statistics], failure: Exception | None) -> Seen:
        """Merge all ranks' moments in rank order, hence alike on every rank."""
        mine = [(row.count, row.mean.cpu(), row.m2.cpu()) for row in rows]
        told = None if failure is None else (isinstance(failure, LeakfreeError), f"{type(failure).__name__}: {failure}")
        everyone = all_gather_objects((seen, told, order, mine))
        if failure is not None:
            raise failure
        for rank, (_, error, *_) in enumerate(everyone):
            if error is not None:
                kind = LeakfreeError if error[0] else RuntimeError
                raise kind(f"{self._name}: rank {rank} failed: {error[1]}")
        if len(everyone) > 1:
            for index, row in enumerate(rows):
                row.clear(torch.device("cpu"))
                for *_, theirs in everyone:
                    row.merge(*theirs[index])
        total = sum(samples for samples, *_ in everyone)
        if total == 0:
            raise LeakfreeError(
                f"{self._name}: the loader gave no samples" + (" on any rank" if is_distributed() else "")
            )
        return Seen(total, tuple(dict.fromkeys(chain.from_iterable(paths for _, _, paths, _ in everyone))))

    def _batch_size(self, batch: Any) -> int:
        """The samples of ``batch``: the length of its first tensor or list, or of itself if it is a list of dicts."""
        first = batch
        if isinstance(batch, (list, tuple)) and batch and not isinstance(batch[0], dict):
            first = batch[0]
        elif isinstance(batch, dict):
            first = next((value for value in batch.values() if isinstance(value, (Tensor, list, tuple))), None)
        if isinstance(first, (list, tuple)) or (isinstance(first, Tensor) and first.ndim):
            return len(first)
        raise LeakfreeError(f"{self._name}: cannot tell how many samples a batch of type {type(batch).__name__} holds")


def _communicates(model: nn.Module, norms: bool) -> bool:
    kinds = (nn.SyncBatchNorm, SyncBatchNorm, ShuffleBatchNorm, Shuffled)
    modules = (module for module in model.modules() if norms or not isinstance(module, _BatchNorm))
    return any(isinstance(module, kinds) or getattr(module, "communicates", False) for module in modules)


def _counters(path: str, rows: Sequence[Statistics], order: dict[str, None]) -> tuple[Callable[..., None], ...]:
    """Hooks before and after the forward of the layer at ``path``, which count its input."""

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        # A layer whose rows of statistics are not simply those of its channels splits its input by itself.
        split: Callable[[Any], Iterable[tuple[int, Tensor]]] | None = getattr(layer, "by_statistics", None)
        order[path] = None
        if not _leaves_moments(layer, x):
            for row, part in [(0, x)] if split is None else split(x):
                rows[row].add(part)

    def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if _leaves_moments(layer, x):
            (row,) = rows
            mean, var, size = row.running_mean.double(), row.running_var.double(), x.numel() // x.shape[1]
            if bool((mean * mean <= _NEAR_ZERO**2 * var).all()):
                row.merge(size, mean, var * (size - 1))
            else:  # the float32 that it stores would show
                row.add(x)

    return count, read


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer's buffers hold the moments of its last batch if it trains at momentum 1."""
    return type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)


def _leaves_moments(layer: nn.Module, x: Tensor) -> bool:
    """Whether a forward puts the moments of ``x`` into the buffers of ``layer``: no pass is needed for them.

    Channels-last kernels are not exact enough.
    """
    buffer = layer.running_mean
    return bool(
        is_plain(layer)
        and layer.training
        and layer.momentum == 1.0
        and isinstance(buffer, Tensor)
        and x.device.type == "cpu"
        and x.dtype == buffer.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and x.is_contiguous()
        and current_scope() is None
    )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        return [_to(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value


def default_forward(model: nn.Module, batch: Any) -> object:
    """``model`` on the batch if it is a tensor, the first item of a tuple or list, or a dict as keyword arguments.

    Tensors are moved to the device of the model.
    """
    device = next(chain(model.parameters(), model.buffers())).device
    if isinstance(batch, dict):
        return model(**_to(batch, device))
    return model(_to(batch[0] if isinstance(batch, (list, tuple)) else batch, device))
