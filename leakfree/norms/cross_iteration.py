"""Cross-Iteration BN: the statistics of the last iterations, corrected for how the weights have moved since.

Legend: C channels, K - 1 past iterations, and of the convolution before: G groups, P numbers in a patch, W (C, P),
b (C,). E is the mean over rows and positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms.blocked import Rows, product_sums
from leakfree.norms.calls import called_modules, name_of, trace_parts
from leakfree.norms.moments import BatchMoments
from leakfree.norms.partitioned import BatchNorm
from leakfree.norms.past import Past
from leakfree.norms.patches import (
    CONVOLUTIONS,
    Call,
    Convolution,
    Tap,
    output_covariance,
    patch_covariance,
    patch_mean,
    why_unsupported,
)
from leakfree.norms.statistics import Moments
from leakfree.partition import Partition

__all__ = ["CrossIterationBatchNorm", "attach_convolutions"]

_TABLES = ("window_mean", "window_var")
_SLOPES = ("window_patch", "window_slope", "window_anchor")
_EXACT = ("window_scatter", "window_weight")
_WINDOW = ("window_forwards", *_TABLES, *_SLOPES, *_EXACT)


class CrossIterationBatchNorm(BatchNorm):
    """CBN: a batch is normalized with its own moments and those of the last ``window - 1`` iterations, averaged.

    The moments of a past iteration are taken to the present weights of the convolution before the norm (its own
    only), by a first-order Taylor term::

        mean_j' = mean_j + rho * <dmean_j/dW, W - W_j>,    nu_j' = nu_j + rho * <dnu_j/dW, W - W_j>,    nu = E[y^2]
        mean = average of mean_j',    var = average of max(nu_j', mean_j'^2) - mean^2
        xhat = (y - mean) / sqrt(var + eps)

    The past is constant to the gradient, which flows through the batch's own share. In closed form, with p the
    patch of the input that the convolution sees, ``dmean_c/dW_c = E[p]`` and ``dnu_c/dW_c = 2 E[y_c p]``: a weight
    gradient. So a forward costs one of these on top of BN. The first-order mean is exact in W; nu is
    underestimated by ``dW^T E[p p^T] dW``, which ``moments="exact"`` adds.

    The norm must know the convolution: call :meth:`attach`, or :func:`attach_convolutions` on the model, after
    building or converting it. Only ``rho=0``, the window without compensation, goes without.
    The first ``burn_in`` training forwards are those of BN, and leave the window empty. After them every training
    forward is an iteration: with accumulated gradients each part of the batch is one. The buffers receive the moments
    of the current batch alone, and eval is that of BN.

    The window is in the state dict, so a resumed run continues with it. A checkpoint without one (of BN) empties it;
    when weights are changed by other means than steps of training, call :meth:`reset_window`. It is each
    rank's own: under DDP pass ``broadcast_buffers=False``, else every forward sends rank 0's to all.
    Inside a scope with base groups, each group is averaged with the same past, which is that of all groups pooled.
    Recomputed forwards (activation checkpointing) find their past again and are not iterations.

    Args:
        window: iterations averaged, the current one included; 1 is BN. (The authors' ``buffer_num`` + 1.)
        burn_in: training forwards of plain BN, counted by ``num_batches_tracked``; settable. The default is the
            authors' 8 of 12 epochs of COCO with 16 images a step: scale it to your run.
        rho: how much of the change of the weights is compensated for.
        guard: what is done with a variance that the compensation made negative, by channel: "max" takes 0 for it (the
            paper's ``max(nu, mean^2)``); "drop" leaves the iteration out of the average (the authors' code).
        moments: "taylor", or "exact": keeps ``Cov(p, p)``, P * P numbers for each group and iteration, so that nu
            is exact in W too. It costs about ``P / C`` more convolutions in a forward.
        ramp: "two_stage": the full window right after ``burn_in``; "linear": a window that grows from 1 to full
            until then.
        several_calls: allow training forwards before the backward of the last one. Each is an iteration: right for
            views of one batch or for pipelines, wrong for the levels of a pyramid, which differ in their statistics
            (attach a CBN of its own for each level to the shared convolution).

    Attributes:
        window_forwards: int64 (), iterations seen by the window since it was empty.
        window_mean, window_var: float64 (K - 1, C), moments of past batches, var biased, by order of writing.
        window_patch, window_slope: (K - 1, G, P), ``E[p]``, and ((K - 1) * C, input channels of a group, kernel
            positions), ``Cov(y_c, p)``, laid out in memory as the weight; float32, or float64 for a float64
            convolution. None before a convolution is attached, like those that follow.
        window_anchor: float64 (K - 1, 2, C), ``<E[p], W> + b`` and ``<Cov(y, p), W>`` at the time.
        window_scatter, window_weight: for "exact", (K - 1, G * P, P), ``Cov(p, p)``, and (K - 1, C, P), W.

    Raises:
        ValueError: an option out of its range.
        LeakfreeError: in a training forward: no convolution is attached, or not the one that made the input; a second
            forward before the backward of the last (unless ``several_calls``); groups that span ranks.

    A batch with a single value per channel has a defined answer once the window is in use; in the burn-in it is
    torch's error.

    Reference: Yao et al. 2021, "Cross-Iteration Batch Normalization" (arXiv 2002.05712), equations 3-8. Choices: eps
    inside the root (the authors' code adds it to the root); biased variance in the burn-in too; the bias of the
    convolution is compensated for like its weight; iterations weigh alike, whatever their number of rows.
    """

    window_forwards: Tensor
    window_mean: Tensor
    window_var: Tensor
    window_patch: Tensor | None
    window_slope: Tensor | None
    window_anchor: Tensor | None
    window_scatter: Tensor | None
    window_weight: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 4,
        burn_in: int = 58_640,
        rho: float = 1.0,
        guard: str = "max",
        moments: str = "taylor",
        ramp: str = "two_stage",
        several_calls: bool = False,
        dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        if window < 1:
            raise ValueError(f"window must be at least 1 iteration, got {window}")
        if rho < 0:
            raise ValueError(f"rho must be at least 0, got {rho}")
        for option, value, valid in (
            ("guard", guard, ("max", "drop")),
            ("moments", moments, ("taylor", "exact")),
            ("ramp", ramp, ("two_stage", "linear")),
        ):
            if value not in valid:
                raise ValueError(f"{option} must be {valid[0]!r} or {valid[1]!r}, got {value!r}")
        if not self.track_running_stats:
            raise ValueError("CBN counts its burn-in in num_batches_tracked: track_running_stats must be True")
        self.window = window
        self.burn_in = burn_in
        self.rho = rho
        self.guard = guard
        self.moments = moments
        self.ramp = ramp
        self.several_calls = several_calls
        self._past = Past(type(self).__name__)
        self._tap: Tap | None = None
        self._last: weakref.ref[_Graph] | None = None  # the last training forward, until its graph is gone
        self._done, self._pushed = _Count(), _Count()
        tables = {name: torch.zeros(window - 1, num_features, dtype=torch.float64) for name in _TABLES}
        tables["window_forwards"] = torch.zeros((), dtype=torch.int64)
        for name in _WINDOW:
            self.register_buffer(name, tables.get(name))

    def extra_repr(self) -> str:
        own = ("window", "burn_in", "rho", "guard", "moments", "ramp")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)!r}" for name in own)])

    @property
    def burn_in(self) -> int:
        return self._burn_in

    @burn_in.setter
    def burn_in(self, forwards: int) -> None:
        if forwards != int(forwards) or forwards < 0:
            raise ValueError(f"burn_in must be a number of forwards, at least 0, got {forwards}")
        self._burn_in = int(forwards)

    @property
    def _is_plain(self) -> bool:
        return False

    # ------------------------------------------------------------------------------- the convolution

    @property
    def needs_convolution(self) -> bool:
        return self.window > 1 and self.rho > 0

    @property
    def convolution(self) -> nn.Module | None:
        """The convolution attached."""
        return None if self._tap is None else self._tap.conv

    @property
    def listens(self) -> bool:
        """Whether the next forward needs what the convolution saw."""
        return self.needs_convolution and self.training and not self.frozen and not self._measured

    def why_not(self, conv: nn.Module) -> str | None:
        """What keeps the norm from being attached to ``conv``; None if nothing does."""
        reason = why_unsupported(conv)
        if reason is None and conv.out_channels != self.num_features:
            return f"the convolution has {conv.out_channels} output channels, the norm {self.num_features}"
        return reason

    def attach(self, conv: nn.Module) -> None:
        """Tell the norm which convolution makes its input; ``nn.Conv1d``, ``2d`` or ``3d``, grouped or not.

        The convolution stays where it is in the model: it is no submodule of the norm. Several norms may be attached
        to one. A copy of the model is attached within itself. The window starts empty, unless it was loaded into a
        norm that was not attached yet.

        Raises:
            ConfigError: no plain convolution, or one with another number of output channels.
        """
        reason = self.why_not(conv)
        if reason is not None:
            raise ConfigError(f"{self._name}: cannot be attached to {conv}: {reason}")
        if not self.needs_convolution or (self._tap is not None and self._tap.conv is conv):
            return
        assert isinstance(conv, CONVOLUTIONS)
        moved = self._tap is not None
        if self._tap is not None:
            self._tap.leave(self)
        self._tap = Tap.of(conv, self)
        past, width = self.window - 1, conv.weight[0].numel()
        shapes: dict[str, tuple[int, ...]] = {
            "window_patch": (past, conv.groups, width),
            "window_slope": (past * self.num_features, *conv.weight.flatten(2).shape[1:]),
            "window_anchor": (past, 2, self.num_features),
        }
        if self.moments == "exact":
            shapes["window_scatter"] = (past, conv.groups * width, width)
            shapes["window_weight"] = (past, self.num_features, width)
        held = {name: None if (table := getattr(self, name)) is None else tuple(table.shape) for name in shapes}
        if moved or held != shapes:
            dtype = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
            for name, shape in shapes.items():
                kind = torch.float64 if name == "window_anchor" else dtype
                setattr(self, name, torch.zeros(shape, dtype=kind, device=conv.weight.device))
            self.reset_window()
        self._match_layout()

    def _match_layout(self) -> None:
        """Lay ``window_slope`` out in memory as the weight is, so that they are read together without a copy."""
        if self._tap is not None and self.window_slope is not None:
            last = _is_last(self._tap.conv.weight.flatten(2))
            if last != _is_last(self.window_slope):
                ordered = self.window_slope.transpose(1, 2) if last else self.window_slope
                self.window_slope = ordered.contiguous().transpose(1, 2) if last else ordered.contiguous()

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({self.num_features})"

    # ------------------------------------------------------------------------------- the window

    @torch.no_grad()
    def reset_window(self) -> None:
        """Forget the past iterations; for weights that were changed by other means than training."""
        for name in _WINDOW:
            table = getattr(self, name)
            if table is not None:
                table.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        window = [getattr(self, name) for name in _WINDOW]

        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrowed = moved.dtype.itemsize < tensor.dtype.itemsize and any(tensor is table for table in window)
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_precision, recurse)
        self._match_layout()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in (*_SLOPES, *_EXACT):  # not attached yet: the shapes are the checkpoint's
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None and self.needs_convolution and self._tap is None:
                setattr(self, name, torch.empty_like(saved, device=self.running_mean.device))  # type: ignore[union-attr]
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*arguments)
        absent = {prefix + name for name in _WINDOW if getattr(self, name) is not None} - state_dict.keys()
        if absent:
            missing_keys[:] = [key for key in missing_keys if key not in absent]
            self.reset_window()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a copy has no graph

    def _past_wanted(self, done: int) -> int:
        """Past iterations in the forward after ``done`` others."""
        if self.ramp == "linear" and self.burn_in:
            return min(self.window - 1, (self.window - 1) * (done + 1) // self.burn_in)
        return self.window - 1 if done >= self.burn_in else 0

    # ------------------------------------------------------------------------------- the forward

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        if self.window == 1 or not self.training or self._measured:
            return super()._normalize(x, partition, tracked)
        if partition.synchronized:
            raise LeakfreeError(
                f"{self._name}: the groups of this scope span ranks, but the window is each rank's own; let groups end "
                "where ranks do (images per rank a multiple of the images per group)"
            )
        call = None if self._tap is None else self._tap.take()
        if not x.numel():
            return super()._normalize(x, partition, tracked)
        if not tracked:  # recomputed: the window has moved on
            past = self._past.again(x)
            plain = past[0].ndim < 2
            return (
                super()._normalize(x, partition, False) if plain else self._averaged(BatchMoments(x, partition), past)
            )
        self._refuse_second_call()
        conv = self._source(call, x) if self.needs_convolution else None
        assert self.num_batches_tracked is not None
        done = self._done.read(self.num_batches_tracked)
        wanted = self._past_wanted(done)
        past = (self.window_mean.new_zeros(0),) * 3  # the mark of a plain batch norm
        if wanted:
            batch = BatchMoments(x, partition)
            count, mean, var = Moments(batch.count, batch.mean.detach(), batch.var.detach()).pooled()
            past = self._compensated(wanted, conv)
            self._push(x, mean, var, conv, None if call is None else call.input)
            self._update_running(count, mean, var)
            y = self._averaged(batch, past)
        else:
            y = super()._normalize(x, partition, tracked)
            if self._pushed.read(self.window_forwards):
                self.reset_window()  # what is in it will be too old when the burn-in ends
        self._done.know(self.num_batches_tracked, done + 1)
        graph = _Graph()
        if y.requires_grad:
            y.register_hook(graph)
            self._last = weakref.ref(graph)
        self._past.keep(x, past, graph)
        return y

    def _refuse_second_call(self) -> None:
        last = None if self._last is None else self._last()
        if last is not None and last.waits and not self.several_calls:
            raise LeakfreeError(
                f"{self._name}: a second training forward before the backward of the last one. A layer that runs over "
                "several inputs in an iteration, such as the levels of a pyramid, would mix them in its window: give "
                "each a CBN of its own, attached to the shared convolution. If they are of one kind (views of a "
                "batch), pass several_calls=True"
            )

    def _source(self, call: Call | None, x: Tensor) -> _Present:
        """The convolution that made ``x`` in its last ``call``."""
        if self._tap is None:
            raise LeakfreeError(
                f"{self._name}: does not know the convolution before it, whose weights it compensates for; call "
                "leakfree.norms.attach_convolutions(model) or attach(conv) before training, or take rho=0"
            )
        if call is None:
            raise LeakfreeError(
                f"{self._name}: the convolution that it is attached to has not run since the layer's last forward; "
                "attach the one that makes its input, by attach(conv) or leakfree.norms.attach_convolutions(model)"
            )
        if not call.made(x):
            raise LeakfreeError(
                f"{self._name}: its input is not the last output of the convolution that it is attached to: it was "
                "changed in between, or comes from elsewhere; attach the convolution right before the layer"
            )
        return _Present.of(self._tap.conv)

    def _averaged(self, batch: BatchMoments, past: tuple[Tensor, ...]) -> Tensor:
        """The batch normalized with its own moments averaged with those of the past."""
        share, past_mean, past_var = past
        total = 1 + share.sum(0)
        mean = (batch.mean + (share * past_mean).sum(0)) / total
        # The average of nu less the squared mean, without its cancellation.
        spread = past_var[:, None] + (past_mean[:, None] - mean).square()  # (iterations, groups of rows, C)
        var = (batch.var + (batch.mean - mean).square() + (share[:, None] * spread).sum(0)) / total
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -mean * scale
        return batch.affine(scale, shift if self.bias is None else shift + self.bias.double())

    @torch.no_grad()
    def _compensated(self, wanted: int, conv: _Present | None) -> tuple[Tensor, ...]:
        """(share, mean, var) of up to ``wanted`` past iterations at the present weights, float64 (iterations, C) each.

        ``share`` is 0 or 1.
        """
        mean, var = self.window_mean.clone(), self.window_var
        if conv is not None:
            patches, slopes, anchors = self._derivatives
            mean_step, slope_step = (torch.stack([conv.linear(patches), conv.products(slopes)], 1) - anchors).unbind(1)
            change = 2 * slope_step
            if self.window_scatter is not None and self.window_weight is not None:
                change += conv.remainder(self.window_weight, self.window_scatter) + mean_step.square()
            # nu' - mean'^2 with nu' = nu + rho * (change + 2 mean * mean_step), mean' = mean + rho * mean_step
            var = var + self.rho * change - (self.rho * mean_step).square()
            mean += self.rho * mean_step
        share = (var >= 0).double() if self.guard == "drop" else torch.ones_like(var)
        past = (share, mean, var.clamp(min=0))
        pushed, size = self._pushed.read(self.window_forwards), len(mean)
        slots = [(pushed - 1 - age) % size for age in range(min(pushed, wanted))]
        if len(slots) == size:
            return past  # all, in any order
        return tuple(torch.stack([table[slot] for slot in slots]) if slots else table[:0] for table in past)

    @torch.no_grad()
    def _push(self, y: Tensor, mean: Tensor, var: Tensor, conv: _Present | None, seen: Tensor | None) -> None:
        """Put a batch in the place of the oldest.

        Args:
            y: the batch; mean, var: its moments, float64 (C,).
            seen: the input of which ``conv`` made ``y``.
        """
        pushed = self._pushed.read(self.window_forwards)
        place = pushed % len(self.window_mean)
        self.window_mean[place], self.window_var[place] = mean, var
        if conv is not None:
            assert seen is not None
            patches, slopes, anchors = self._derivatives
            patches[place] = patch_mean(seen, conv.conv)
            slope = slopes[place * len(mean) : (place + 1) * len(mean)]
            output_covariance(seen, y, mean, var, conv.conv, out=slope)
            anchors[place] = torch.cat([conv.linear(patches[place : place + 1]), conv.products(slope)])
            if self.window_scatter is not None and self.window_weight is not None:
                self.window_scatter[place] = patch_covariance(seen, conv.conv).flatten(0, 1)
                self.window_weight[place] = conv.weight.flatten(1)
        self.window_forwards.add_(1)
        self._pushed.know(self.window_forwards, pushed + 1)

    @property
    def _derivatives(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.window_patch is not None
        assert self.window_slope is not None
        assert self.window_anchor is not None
        return self.window_patch, self.window_slope, self.window_anchor


class _Count:
    """A counter on a device, for which the host waits only where others have changed it."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, int] | None = None  # the counter, its version, its value

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": None}  # a copy counts by itself

    def read(self, counter: Tensor) -> int:
        if counter.is_inference():  # has no version
            return int(counter)
        if self._known is None or self._known[0] is not counter or self._known[1] != counter._version:
            self.know(counter, int(counter))
        assert self._known is not None
        return self._known[2]

    def know(self, counter: Tensor, value: int) -> None:
        """Take note that the counter is now at ``value``."""
        self._known = None if counter.is_inference() else (counter, counter._version, value)


def _is_last(table: Tensor) -> bool:
    """Whether channels come last in the memory of ``table`` (rows, channels, positions)."""
    return not table.is_contiguous() and table.transpose(1, 2).is_contiguous()


@dataclass(frozen=True)
class _Present:
    """A convolution with its present weight, (C, input channels of a group, kernel positions); constants.

    What :meth:`linear` and :meth:`products` are under other weights is compared, so that few of their digits remain.
    So they are no matrix products in what a GPU may take for float32 (TF32).
    """

    conv: Convolution
    weight: Tensor  # at least float32

    @staticmethod
    def of(conv: Convolution) -> _Present:
        weight = conv.weight.detach().flatten(2)
        return _Present(conv, weight if weight.dtype == torch.float64 else weight.float())

    @staticmethod
    def _flat(table: Tensor, last: bool) -> Tensor:
        """(rows, input channels, kernel positions) -> (rows, P), the order of P being that of the weight's memory."""
        return (table.transpose(1, 2) if last else table).flatten(1)

    def linear(self, patches: Tensor) -> Tensor:
        """``<E[p], W> + b`` for each of ``patches`` (K, G, P): float64 (K, C)."""
        last, groups = _is_last(self.weight), self.conv.groups
        wide = torch.float64 if patches.device.type != "cpu" else self.weight.dtype
        columns = self._flat(patches.reshape(-1, *self.weight.shape[1:]), last).view(patches.shape).transpose(0, 1)
        weight = self._flat(self.weight, last).unflatten(0, (groups, -1))
        with torch.autocast(patches.device.type, enabled=False):
            sums = columns.to(wide) @ weight.to(wide).transpose(1, 2)  # (G, K, C / G)
        sums = sums.transpose(0, 1).flatten(1).double()
        return sums if self.conv.bias is None else sums + self.conv.bias.detach().double()

    def products(self, slopes: Tensor) -> Tensor:
        """``<S, W>`` for the S of ``slopes``, (K * C, input channels, kernel positions): float64 (K, C)."""
        last = _is_last(slopes)
        weight = self._flat(self.weight, last)
        table = self._flat(slopes, last).to(weight.dtype).unflatten(0, (-1, len(weight)))
        if slopes.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return (weight[:, None] @ table.permute(1, 2, 0))[:, 0].t().double()
        rows = Rows.of(weight[None])
        return torch.cat([product_sums(rows.match(each[None]), rows, None)[1] for each in table]).double()

    def remainder(self, before: Tensor, scatter: Tensor) -> Tensor:
        """``dW^T Cov(p, p) dW``, of second order, float64 (K - 1, C).

        Args:
            before: W of past iterations, (K - 1, C, P).
            scatter: their Cov(p, p), (K - 1, G * P, P).
        """
        groups = (self.conv.groups, -1)
        step = (self.weight.flatten(1) - before).unflatten(1, groups)
        with torch.autocast(scatter.device.type, enabled=False):
            return ((step @ scatter.unflatten(1, groups)) * step).sum(-1).flatten(1).double()


class _Graph:
    """A hook on a forward's result: it lives as long as the graph, and is told of the backward."""

    def __init__(self) -> None:
        self.waits = True

    def __call__(self, gradient: Tensor) -> None:
        self.waits = False


# ------------------------------------------------------------------------------- finding the convolutions


def attach_convolutions(model: nn.Module) -> dict[str, str]:
    """Attach every CBN of ``model`` that needs a convolution to the one that makes its input.

    Which that is tells ``torch.fx``, where it can follow the model, or the largest parts of it that it can. In what
    remains, a norm belongs to the convolution that stands right before it in the same module. Norms that are attached
    to a convolution of this model keep it.

    Returns:
        the path of each norm -> the path of its convolution.

    Raises:
        ConfigError: the model has no CBN; or a norm whose convolution cannot be told, or is none that a norm can be
            attached to; names its path. Nothing is attached then.

    Example:
        >>> model = convert_norms(resnet18(), "CBN", burn_in=1000)    # doctest: +SKIP
        >>> attach_convolutions(model)["layer1.0.bn1"]                # doctest: +SKIP
        'layer1.0.conv1'
    """
    paths = {module: path for path, module in model.named_modules()}
    if not any(isinstance(module, CrossIterationBatchNorm) for module in paths):
        raise ConfigError("attach_convolutions: the model has no CBN; build or convert its norms first")
    wanting = [norm for norm in paths if isinstance(norm, CrossIterationBatchNorm) and norm.needs_convolution]
    new = [norm for norm in wanting if norm.convolution not in paths]
    sources: dict[nn.Module, set[nn.Module | str]] = {}
    for module, source in _sources(model) if new else ():
        sources.setdefault(module, set()).add(source)
    for norm, source in _standing_before(model):
        sources.setdefault(norm, {source})
    pairs = {norm: _only_source(norm, paths[norm], sources[norm]) for norm in new}
    for norm, conv in pairs.items():
        norm.attach(conv)
    return {paths[norm]: paths[norm.convolution] for norm in wanting if norm.convolution is not None}


def _only_source(norm: CrossIterationBatchNorm, path: str, sources: set[nn.Module | str]) -> nn.Module:
    """The one convolution among the ``sources`` of a norm's input; a ConfigError if there is not just that."""
    problem = f"its input comes from {len(sources)} different places"
    if len(sources) == 1:
        (source,) = sources
        if isinstance(source, nn.Module):
            reason = norm.why_not(source)
            if reason is None:
                return source
            problem = f"the module before it cannot be attached: {reason}"
        else:
            problem = f"its input comes from {source}, not from a convolution"
    raise ConfigError(
        f"attach_convolutions: {path or 'model'}: {problem}; attach a convolution yourself (the norm's attach(conv)), "
        "keep another norm there, or take rho=0"
    )


def _is_cbn(module: nn.Module) -> bool:
    return isinstance(module, CrossIterationBatchNorm)


def _is_leaf(module: nn.Module) -> bool:
    return _is_cbn(module) or next(module.children(), None) is None  # what one without children does is not asked


def _sources(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | str]]:
    """(norm, the module or a word for what makes its input) for each call of a CBN that can be followed."""
    for part, graph in trace_parts(model, _is_cbn, [_is_leaf])[0]:
        calls = called_modules(part, graph)
        for node in (node for node, module in calls.items() if _is_cbn(module)):
            source: Any = node.args[0] if node.args else node.kwargs["input"]
            while isinstance(calls.get(source), nn.Identity):
                source = source.args[0]
            if source.op != "placeholder":
                yield calls[node], calls.get(source) or name_of(source)


def _standing_before(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | str]]:
    """(norm, the module registered before it in the same parent, or a word for nothing) for each CBN."""
    for parent in model.modules():
        before: nn.Module | str = "outside of its module"
        for child in parent.children():
            if isinstance(child, CrossIterationBatchNorm):
                yield child, before
            before = child
    if isinstance(model, CrossIterationBatchNorm):
        yield model, "outside of its module"
