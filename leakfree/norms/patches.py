"""What a convolution sees: moments of its input patches, without ever writing a patch out.

A convolution is ``y_c = <W_c, p> + b_c`` at each position, ``p`` being the patch of the input under the kernel,
padding included. So what the moments of ``y`` become under other weights follows from those of ``p``. They are
sums over shifted windows of the input, or weight gradients of the convolution for some gradient of its output.

Legend: N rows, C output channels, G groups of the convolution, P numbers in a patch (input channels of a group
times kernel positions, in the order of ``weight.flatten(1)``). E is the mean over rows and positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakfree.norms.blocked import Rows, affine

__all__ = [
    "CONVOLUTIONS",
    "Call",
    "Convolution",
    "Listener",
    "Tap",
    "output_covariance",
    "patch_covariance",
    "patch_mean",
    "why_unsupported",
]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_unsupported(module: nn.Module) -> str | None:
    """What keeps ``module`` from being a convolution whose patches are known; None if nothing does."""
    kind = type(module).__name__
    plain = next((cls for cls in CONVOLUTIONS if isinstance(module, cls)), None)
    if plain is None:
        return f"{kind} is no nn.Conv1d, nn.Conv2d or nn.Conv3d"
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method) is not getattr(plain, method):
            return f"{kind} overrides {plain.__name__}.{method}, so its patches or weights may be others"
    return None


def _sides(conv: Convolution) -> list[tuple[int, int]]:
    """Padding before and after, of each dimension in space."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(size), int(size)) for size in conv.padding]


def _pad(x: Tensor, sides: list[tuple[int, int]], mode: str = "zeros") -> Tensor:
    amounts = list(chain.from_iterable(reversed(sides)))
    return F.pad(x, amounts, mode="constant" if mode == "zeros" else mode) if any(amounts) else x


def _prepared(x: Tensor, conv: Convolution) -> tuple[Tensor, list[int]]:
    """The input with the padding that a convolution kernel cannot add by itself, and the one that it adds."""
    sides = _sides(conv)
    if conv.padding_mode == "zeros" and all(before == after for before, after in sides):
        return x, [before for before, _ in sides]
    return _pad(x, sides, conv.padding_mode), [0] * len(sides)


def _windows(length: int, kernel: int, stride: int, dilation: int) -> list[slice]:
    """For each kernel position, where along a padded dimension it lies as the kernel moves."""
    moves = (length - dilation * (kernel - 1) - 1) // stride
    return [slice(start := step * dilation, start + moves * stride + 1, stride) for step in range(kernel)]


def _all_windows(space: torch.Size, conv: Convolution) -> list[list[slice]]:
    return [_windows(*each) for each in zip(space, conv.kernel_size, conv.stride, conv.dilation, strict=True)]


def patch_mean(x: Tensor, conv: Convolution) -> Tensor:
    """``E[p]``, float64 (G, P), for the input ``x`` (N, C_in, *).

    It is also the derivative of the mean of each output channel of the group by its weights.
    """
    x, padding = _prepared(x.detach(), conv)
    ordered = last if (last := x.movedim(1, -1)).is_contiguous() else x  # torch sums over rows fast in memory's order
    total = ordered.sum(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).double()
    total = total.movedim(-1, 0) if ordered is last else total
    total = _pad(total, [(size, size) for size in padding])
    windows = _all_windows(total.shape[1:], conv)
    count = len(x)
    for along in windows:  # sums over the first dimension in space; the kernel's goes last
        count *= len(range(*along[0].indices(total.shape[1])))
        total = torch.stack([total[:, where].sum(1) for where in along], -1)
    return total.reshape(conv.groups, -1) / max(count, 1)


def _weight_gradient(x: Tensor, gradient: Tensor, conv: Convolution) -> Tensor:
    """Sum over rows and positions of ``gradient_c * p``, in the dtype of ``gradient`` and the shape of a weight for it.

    ``gradient`` is like an output of ``conv``, with any number of channels that its groups divide.
    """
    x, padding = _prepared(x.detach().to(gradient.dtype), conv)
    weight = gradient.new_empty(1).expand(gradient.shape[1], x.shape[1] // conv.groups, *conv.kernel_size)
    settings = (list(conv.stride), padding, list(conv.dilation), False, [0] * len(padding), conv.groups)
    _, sums, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *settings, [False, True, False])
    return sums


def output_covariance(
    x: Tensor, y: Tensor, mean: Tensor, var: Tensor, conv: Convolution, *, out: Tensor | None = None
) -> Tensor:
    """``Cov(y_c, p) = E[y_c p] - E[y_c] E[p]``, (C, P), at least float32: half the derivative of Var(y_c) by ``W_c``.

    One weight gradient of the convolution, in the dtype of ``y``.

    Args:
        x, y: input and output of ``conv``.
        mean, var: float64 (C,), of ``y``; var biased.
        out: where to write the result.
    """
    rows = Rows.of(y.detach())
    size = (var * (y.numel() / y.shape[1])).sqrt()  # half precision could not hold the sums of unscaled values
    scale = torch.where(size > 0, 1 / size, 0.0).to(rows.wide)[None]
    shift = (-mean * scale).to(rows.wide)
    deviations = rows.tensor(affine(rows, None, scale, shift, rows.room()))
    sums = _weight_gradient(x, deviations, conv)
    factor = torch.where(size > 0, var / size, 0.0).to(rows.wide)
    out = torch.empty(sums.shape, dtype=rows.wide, device=sums.device) if out is None else out.view(sums.shape)
    return torch.mul(sums, factor.view(-1, *[1] * (sums.ndim - 1)), out=out).flatten(1)


def patch_covariance(x: Tensor, conv: Convolution) -> Tensor:
    """``Cov(p, p) = E[p p^T] - E[p] E[p]^T``, (G, P, P), at least float32.

    A weight gradient to ``C_in`` channels for each kernel position: as costly as ``P / C`` convolutions.
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    full = _pad(x, _sides(conv), conv.padding_mode)
    rows = []
    for where in product(*_all_windows(full.shape[2:], conv)):
        seen = full[(slice(None), slice(None), *where)]  # by this kernel position: (N, C_in, *)
        deviations = seen - seen.mean((0, *range(2, x.ndim)), keepdim=True)
        rows.append(_weight_gradient(x, deviations, conv).flatten(1) / (seen.numel() / seen.shape[1]))
    size = x.shape[1] // conv.groups * len(rows)
    return torch.stack(rows, 1).view(conv.groups, size, size)


class Listener(Protocol):
    """Who may be behind a :class:`Tap`."""

    @property
    def listens(self) -> bool:
        """Whether the next forward needs what the convolution saw."""
        ...


@dataclass(frozen=True)
class Call:
    """A forward of a convolution; both tensors are detached."""

    input: Tensor
    output: Tensor
    version: int | None  # of the output when it was made; None where nobody knows

    def made(self, y: Tensor) -> bool:
        """Whether ``y`` is its output, unchanged."""
        if self.output.data_ptr() != y.data_ptr() or self.output.shape != y.shape:
            return False
        return self.version is None or y.is_inference() or y._version == self.version


class Tap:
    """The forward hook of a convolution that lends its last input to the layers behind it.

    One for each convolution: :meth:`of` finds it. Tensors are held until the layer behind has run.
    A copy or a pickle of a model has taps of its own, between its own layers.
    """

    def __init__(self, conv: Convolution) -> None:
        self.conv = conv
        self._listeners: list[weakref.ref[Any]] = []
        self._call: Call | None = None

    @staticmethod
    def of(conv: Convolution, listener: Listener) -> Tap:
        """The tap of ``conv``, with ``listener`` among those behind it."""
        tap = next((hook for hook in conv._forward_hooks.values() if isinstance(hook, Tap)), None)
        if tap is None:
            tap = Tap(conv)
            conv.register_forward_hook(tap, with_kwargs=True)
        if not any(reference() is listener for reference in tap._listeners):
            tap._listeners.append(weakref.ref(listener))
        return tap

    def leave(self, listener: Listener) -> None:
        """Take ``listener`` off."""
        self._listeners = [item for item in self._listeners if item() is not None and item() is not listener]

    def _alive(self) -> Iterator[Any]:
        for reference in self._listeners:
            listener = reference()
            if listener is not None:
                yield listener

    def __getstate__(self) -> dict[str, Any]:
        return {"conv": self.conv, "listeners": list(self._alive())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.conv = state["conv"]
        self._listeners = [weakref.ref(listener) for listener in state["listeners"]]
        self._call = None

    def __call__(self, conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        for reference in self._listeners:
            listener = reference()
            if listener is not None and listener.listens:
                x = args[0] if args else kwargs["input"]
                version = None if torch.compiler.is_compiling() or output.is_inference() else output._version
                self._call = Call(x.detach(), output.detach(), version)
                return

    def take(self) -> Call | None:
        """The last forward of the convolution, of which nothing is held any more."""
        call, self._call = self._call, None
        return call
