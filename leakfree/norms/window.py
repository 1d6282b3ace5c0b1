"""The window of a Cross-Iteration BN: moments of past iterations, taken to the present weights of a convolution.

Legend: C channels, K - 1 past iterations, and of the convolution before: G groups, P numbers in a patch, W (C, P),
b (C,). E is the mean over rows and positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leakfree.errors import ConfigError
from leakfree.norms.partitioned import BatchNorm
from leakfree.norms.patches import (
    CONVOLUTIONS,
    Tap,
    output_covariance,
    patch_covariance,
    patch_mean,
    why_unsupported,
)
from leakfree.norms.present_weights import PresentWeight, channels_lie_last

__all__ = ["Counter", "WindowedBatchNorm"]

_TABLES = ("window_mean", "window_var")
_SLOPES = ("window_patch", "window_slope", "window_anchor")
_EXACT = ("window_scatter", "window_weight")
_WINDOW = ("window_forwards", *_TABLES, *_SLOPES, *_EXACT)


class WindowedBatchNorm(BatchNorm):
    """A batch norm with a window of past moments, and the convolution whose weights these depend on.

    It keeps, moves, loads, and compensates; when a batch is put in and what is made of the past, a subclass says.
    See :class:`~leakfree.norms.CrossIterationBatchNorm` for the options and the buffers.
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
        window: int,
        rho: float,
        guard: str,
        moments: str,
        dim: int | None,
        **options: object,
    ) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        if window < 1:
            raise ValueError(f"window must be at least 1 iteration, got {window}")
        if rho < 0:
            raise ValueError(f"rho must be at least 0, got {rho}")
        self._choose("guard", guard, ("max", "drop"))
        self._choose("moments", moments, ("taylor", "exact"))
        self.window = window
        self.rho = rho
        self.guard = guard
        self.moments = moments
        self._tap: Tap | None = None
        self._pushed = Counter()
        tables = {name: torch.zeros(window - 1, num_features, dtype=torch.float64) for name in _TABLES}
        tables["window_forwards"] = torch.zeros((), dtype=torch.int64)
        for name in _WINDOW:
            self.register_buffer(name, tables.get(name))

    @staticmethod
    def _choose(option: str, value: str, valid: tuple[str, str]) -> None:
        if value not in valid:
            raise ValueError(f"{option} must be {valid[0]!r} or {valid[1]!r}, got {value!r}")

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
            last = channels_lie_last(self._tap.conv.weight.flatten(2))
            if last != channels_lie_last(self.window_slope):
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

    @torch.no_grad()
    def _compensated(self, wanted: int, conv: PresentWeight | None) -> tuple[Tensor, ...]:
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
    def _push(self, y: Tensor, mean: Tensor, var: Tensor, conv: PresentWeight | None, seen: Tensor | None) -> None:
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


class Counter:
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
