"""Forwards that activation checkpointing runs a second time, and what they must repeat.

A recomputed forward must take the random decisions of the first one again and must not count as
another step. That it runs inside a backward tells it; which of the earlier forwards it repeats, only
its input can tell. So a layer remembers, for its last forwards, a few numbers of the input and what it
decided.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Replay", "recomputing"]

T = TypeVar("T")
_SAMPLE = 512


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing recomputes it.

    Covers ``torch.utils.checkpoint`` in both of its modes. Compiled code answers False: there the
    compiler recomputes, and it repeats no side effect.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass
class _Forward(Generic[T]):
    kind: tuple[Any, ...]  # shape, dtype and device of the input
    sample: Tensor
    value: T
    graph: weakref.ref[Any] | None  # dead when the graph of this forward is gone; None if none is watched
    replayed: bool = False

    @property
    def waits(self) -> bool:
        return not self.replayed and (self.graph is None or self.graph() is not None)


class Replay(Generic[T]):
    """What the last forwards of a layer decided, to be found again by their input.

    Args:
        owner: name of the layer in error messages.
        same: whether two decisions are the same.
        size: forwards to remember; more may not wait for their backward at a time.
    """

    def __init__(self, owner: str, same: Callable[[T, T], bool], size: int = 32) -> None:
        self._owner = owner
        self._same = same
        self._forwards: deque[_Forward[T]] = deque(maxlen=size)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the layer has no graph that could run again.
        return {**self.__dict__, "_forwards": deque(maxlen=self._forwards.maxlen)}

    def remember(self, x: Tensor, value: T, graph: object | None = None) -> None:
        """Note the decision of a forward on ``x``; ``graph`` is an object that lives as long as its graph."""
        if not torch.is_grad_enabled():  # it may be the first forward of a reentrant checkpoint, which makes no graph
            graph = None
        self._forwards.append(_Forward(_kind(x), _sample(x), value, None if graph is None else weakref.ref(graph)))

    def recall(self, x: Tensor) -> T | None:
        """The decision of the forward on ``x`` that is being recomputed; None if none had this input.

        Raises:
            RuntimeError: several forwards with this input wait for their backward and decided differently.
        """
        kind = _kind(x)
        alike = [forward for forward in reversed(self._forwards) if forward.kind == kind]
        sample = _sample(x) if alike else None
        found = [forward for forward in alike if sample is not None and _equal(forward.sample, sample)]
        waiting = [forward for forward in found if forward.waits]
        # A checkpoint that saves by hooks made a graph in its first forward, a reentrant one made none.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        waiting = [forward for forward in waiting if (forward.graph is not None) == hooked] or waiting
        if any(not self._same(forward.value, waiting[0].value) for forward in waiting[1:]):
            raise RuntimeError(
                f"{self._owner}: several forwards with the same input wait for their recomputation, so that what they "
                "decided cannot be told apart; keep the layer out of the checkpointed part"
            )
        if not found:
            return None
        chosen = (waiting or found)[0]
        chosen.replayed = True
        return chosen.value

    def find(self, matches: Callable[[T], bool]) -> T | None:
        """The latest decision that matches, for a forward whose input tells nothing (no rows)."""
        return next((forward.value for forward in reversed(self._forwards) if matches(forward.value)), None)


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


def _sample(x: Tensor) -> Tensor:
    """Up to 512 values of ``x`` from all over its memory."""
    x = x.detach()
    if not (x.is_contiguous() or (x.ndim > 1 and x.movedim(1, -1).is_contiguous())):
        x = x.contiguous()
    size = min(x.numel(), _SAMPLE)
    step = x.numel() // max(size, 1)
    step -= step % 2 == 0 and step > 1  # an odd step meets all of a power of two: rows, channels and positions
    return x.as_strided((size,), (step,), x.storage_offset()).clone()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bitwise, for all that matters: NaN equals NaN."""
    if a.device != b.device or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
