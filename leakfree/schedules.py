"""Functions of training progress: the learning rate, the moment batch norms freeze, ramps of their rules.

Usable from Lightning (``leakfree.training.callbacks``), from detectron2 hooks, from a plain loop: nothing here
knows a trainer. A step is one optimizer update; "at step s" means that s updates are done. A point of a training
is a share of it (float), a number of steps (int) or of epochs (:class:`Epochs`).
What the frozen statistics are (moving average, precise) is the caller's choice: see ``before`` of
:meth:`FreezeBN.step` and ``leakfree.population``.
"""

from __future__ import annotations

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leakfree.errors import CheckpointError, ConfigError, LeakfreeError, choices

__all__ = [
    "BurnInSchedule",
    "Epochs",
    "FreezeBN",
    "Point",
    "RenormSchedule",
    "burn_in_steps",
    "freeze_step",
    "lr_factor",
    "renorm_ramp",
]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def lr_factor(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
    decay: str = "step",
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """The learning rate at ``step`` as a share of the base rate: warm-up times decay.

    Warm-up: ``warmup_factor * (1 - a) + a`` with ``a = min(step / warmup_steps, 1)``.
    Decay: ``step``: gamma to the power of the milestones passed (a milestone m acts from step
    ``round(m * max_steps)`` on). ``cosine``: ``(1 + cos(pi * step / max_steps)) / 2``, zero after the
    end. ``constant``: 1. The two multiply, as in detectron2.

    Args:
        step: updates done, from 0.
        max_steps: updates of the whole run, at least 1.
        milestones: shares of ``max_steps``, for ``step``.

    Raises:
        ConfigError: an unknown decay.
    """
    progress = min(step / max_steps, 1.0)
    if decay == "step":
        factor = gamma ** sum(step >= round(milestone * max_steps) for milestone in milestones)
    elif decay == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif decay == "constant":
        factor = 1.0
    else:
        raise ConfigError(f"schedule.decay: unknown {decay!r}; choose from {choices(decay, _DECAYS)}")
    if step < warmup_steps:
        alpha = step / warmup_steps
        factor *= warmup_factor * (1.0 - alpha) + alpha
    return factor


_DECAYS = ("step", "cosine", "constant")


@dataclass(frozen=True)
class Epochs:
    """A point of a training, in epochs from its start: ``FreezeBN(at=Epochs(80))``."""

    number: float


Point = float | Epochs  # a share of the run (float), steps (int), or epochs


def _step_at(what: str, at: Point, max_steps: int, steps_per_epoch: float | None) -> int:
    """The step at a point; ``what`` names it in messages."""
    if isinstance(at, Epochs):
        if steps_per_epoch is None:
            raise ConfigError(
                f"{what}: {at.number} epochs are how many steps? Give steps_per_epoch, or a share or steps"
            )
        number, kind = at.number * steps_per_epoch, "epochs"
    elif isinstance(at, bool) or not isinstance(at, (int, float)):
        raise ConfigError(f"{what}: expected a share (float), a number of steps (int) or Epochs, got {at!r}")
    elif isinstance(at, float):
        if not 0.0 <= at <= 1.0:
            raise ConfigError(f"{what}: a share of the run must be in [0, 1], got {at} (write an int for steps)")
        number, kind = at * max_steps, "share"
    else:
        number, kind = at, "steps"
    if not 0 <= number < math.inf:
        raise ConfigError(f"{what}: a number of {kind} must be at least 0, got {at}")
    return round(number)


def freeze_step(at: Point, max_steps: int, steps_per_epoch: float | None = None) -> int | None:
    """The step from which batch norms are frozen, or None when the run ends before.

    Args:
        at: a float is a share of the run in [0, 1] (1.0 = never), rounded to a step; an int is a
            number of steps; ``Epochs(n)`` is the end of n epochs.
        max_steps: updates of the whole run.
        steps_per_epoch: updates of an epoch, not necessarily whole; needed for ``Epochs`` only.

    Raises:
        ConfigError: a share outside [0, 1], a negative number, or epochs of unknown length.
    """
    step = _step_at("freeze at", at, max_steps, steps_per_epoch)
    return step if step < max_steps else None


def _keep_eval(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a frozen torch batch norm: ``model.train()`` may not wake it."""
    module.training = False


def _freeze_layer(module: nn.Module, affine_trainable: bool) -> None:
    """Make ``module`` use its stored statistics for good; a second call changes nothing."""
    if not getattr(module, "frozen", False):
        if not hasattr(module, "frozen"):  # torch's own: the layers of leakfree.norms obey the flag by themselves
            module.register_forward_pre_hook(_keep_eval)
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # code compiled before would not see the hook
            module.training = False
        module.frozen = True  # type: ignore[assignment]
    if not affine_trainable:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
            parameter.grad = None  # else an optimizer would still apply the last one


def _is_initial(module: nn.Module) -> bool:
    counter: Any = module.num_batches_tracked
    mean: Any = module.running_mean
    var: Any = module.running_var
    initial = (mean == 0).all(-1) & (var == 1).all(-1)  # of each domain, where a layer has several
    return bool((initial if counter is None else initial & (counter == 0)).any())


class FreezeBN:
    """Freezes the batch norms of a model at a point of training, and keeps them frozen.

    From then on every batch norm normalizes with its stored statistics in training mode too, and
    never updates them, whatever ``model.train()`` does. Weights, buffers and state dict keys stay as
    they are, so checkpoints of before and after load into the same model.
    The layers of ``leakfree.norms`` are switched by their ``frozen`` attribute; torch's own batch
    norms are put into eval mode by a forward pre-hook (and marked with the same attribute).

    Call :meth:`step` before each update. Save :meth:`state_dict` with the checkpoint; after
    :meth:`load_state_dict` the next :meth:`step` freezes the same layers with the checkpoint's
    statistics. Every rank calls it alike; nothing is communicated.

    Args:
        at: when, see :func:`freeze_step`.
        where: a regular expression searched in module paths; None = every batch norm.
        affine_trainable: False also stops the gradient of weight and bias. Under DDP that changes
            which parameters take part after the model was wrapped: DDP then needs
            ``find_unused_parameters=True``.

    Reference: Wu & Johnson 2021, section 4.3 (the last 20 of 100 epochs).

    Example:
        >>> freeze = FreezeBN(at=0.75)
        >>> for step in range(max_steps):                                   # doctest: +SKIP
        ...     freeze.step(model, step, max_steps, before=lambda m: precise_bn(m, loader))
        ...     train_one_step(model)
    """

    def __init__(self, at: Point, *, where: str | None = None, affine_trainable: bool = True) -> None:
        freeze_step(at, 1, 1)  # a bad value is told now, not at the end of training
        self.at = at
        self.where = where
        self.affine_trainable = affine_trainable
        self.frozen_at: int | None = None
        self._layers: list[str] = []  # paths of the layers frozen by this schedule

    @property
    def frozen(self) -> bool:
        """Whether the switch has happened."""
        return self.frozen_at is not None

    def step(
        self,
        model: nn.Module,
        step: int,
        max_steps: int,
        *,
        steps_per_epoch: float | None = None,
        before: Callable[[nn.Module], object] | None = None,
    ) -> bool:
        """Freeze ``model`` if ``step`` is at or past the freeze point; return True when it happens now.

        Args:
            step: updates done so far.
            max_steps: updates of the whole run.
            steps_per_epoch: updates of an epoch, where ``at`` is in epochs.
            before: called with the model just before it is frozen, once in a run: the place to
                estimate precise statistics.

        Raises:
            LeakfreeError: nothing to freeze, a layer without running statistics, or statistics
                still at their initial values (mean 0, variance 1, counter 0). Nothing is frozen then.
            CheckpointError: a layer that the loaded state names is not in the model.
        """
        if self.frozen_at is not None:
            self._freeze_named(model)
            return False
        point = freeze_step(self.at, max_steps, steps_per_epoch)
        if point is None or step < point:
            return False
        if before is not None:
            before(model)
        layers = dict(self._select(model))
        self._check(layers)
        for module in layers.values():
            _freeze_layer(module, self.affine_trainable)
        self._layers = list(layers)
        self.frozen_at = step
        return True

    def _select(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (self.where is None or re.search(self.where, path)):
                yield path, module

    def _check(self, layers: dict[str, nn.Module]) -> None:
        if not layers:
            among = f" whose path matches {self.where!r}" if self.where is not None else ""
            raise LeakfreeError(f"FreezeBN: the model has no batch norm{among}, so there is nothing to freeze")
        for path, module in layers.items():
            if module.running_mean is None:
                raise LeakfreeError(f"FreezeBN: {path or 'model'} keeps no running statistics, so it cannot be frozen")
        initial = [path or "model" for path, module in layers.items() if _is_initial(module)]
        if initial:
            raise LeakfreeError(
                f"FreezeBN: the statistics of {initial[0]} (and {len(initial) - 1} more) are still at their initial "
                "values (mean 0, variance 1): train, load a checkpoint or run precise_bn first, or leave the layer "
                "out with `where`"
            )

    def _freeze_named(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for path in self._layers:
            if path not in modules:
                raise CheckpointError(f"FreezeBN: the checkpoint froze layer {path!r}, which this model does not have")
            _freeze_layer(modules[path], self.affine_trainable)

    def state_dict(self) -> dict[str, Any]:
        """``frozen_at`` (step or None) and ``layers`` (paths): plain values for a checkpoint."""
        return {"frozen_at": self.frozen_at, "layers": list(self._layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the layers are frozen at the next :meth:`step`."""
        self.frozen_at = state["frozen_at"]
        self._layers = list(state["layers"])


# ------------------------------------------------------------------------------- ramps of a norm's own rule

RENORM_STEPS = 160_000  # of the run that the marks of Batch Renormalization are for: recalled, not stated in the paper
_RENORM_MARKS = (5_000, 25_000, 40_000)
_BURN_IN = 2 / 3


def renorm_ramp(max_steps: int, *, original_steps: int = RENORM_STEPS) -> tuple[int, int, int]:
    """The marks of BatchRenorm's ramp for a run of ``max_steps``: (start, end of d, end of r).

    The paper's 5,000, 25,000 and 40,000 times ``max_steps / original_steps``: plain BN until the first, then
    d_max and r_max grow linearly to their limits at the second and the third. At least one step each.

    Args:
        max_steps: steps of the whole run, at least 1.
        original_steps: of the run that the paper's marks are for. Its length is not stated; 160,000 is the choice here.

    Raises:
        ConfigError: a number below 1.

    Reference: Ioffe 2017, section 4.1.
    """
    if max_steps < 1 or original_steps < 1:
        raise ConfigError(f"renorm ramp: steps must be at least 1, got {max_steps} of {original_steps}")
    start, end_d, end_r = (round(mark * max_steps / original_steps) for mark in _RENORM_MARKS)
    return start, max(end_d, start + 1), max(end_r, start + 1)


def burn_in_steps(max_steps: int, at: Point = _BURN_IN, steps_per_epoch: float | None = None) -> int:
    """The steps in which CBN is plain BN, before it looks back at earlier iterations.

    Args:
        max_steps: steps of the whole run.
        at: a share of the run (default two thirds: 8 of the 12 epochs of the released configs), steps, or ``Epochs``.
        steps_per_epoch: needed for ``Epochs`` only.

    Raises:
        ConfigError: a share outside [0, 1], a negative number, or epochs of unknown length.

    Reference: Yao et al. 2021, "Cross-Iteration Batch Normalization"; the share is that of its detection schedule.
    """
    return _step_at("burn-in", at, max_steps, steps_per_epoch)


class _RampSchedule(ABC):
    """Sets the length of a ramp in layers that count it in training forwards (``num_batches_tracked``).

    The count goes on from where a layer was when the run began: a model with trained statistics gets the whole ramp.
    """

    _layer: str  # for messages
    _attribute: str  # what is set
    _marks: tuple[str, ...] = ()  # attributes that tell the layer from others with that one

    def __init__(self, *, where: str | None = None, forwards_per_step: int = 1) -> None:
        if forwards_per_step < 1:
            raise ConfigError(f"{type(self).__name__}: forwards_per_step must be at least 1, got {forwards_per_step}")
        self.where = where
        self.forwards_per_step = forwards_per_step
        self._starts: dict[str, int] = {}  # path of a layer -> its count when the run began

    @abstractmethod
    def _length(self, start: int, max_steps: int, steps_per_epoch: float | None) -> object:
        """The value of the attribute for a layer whose count was ``start`` when the run began."""

    def step(self, model: nn.Module, step: int, max_steps: int, *, steps_per_epoch: float | None = None) -> None:
        """Set the ramps of ``model``; call it before each update, or once before the first.

        Args:
            step: updates done so far.
            max_steps: updates of the whole run.
            steps_per_epoch: updates of an epoch, where something is given in epochs.

        Raises:
            LeakfreeError: the model has no such layer.
        """
        layers = dict(self._select(model))
        if not layers:
            among = f" whose path matches {self.where!r}" if self.where is not None else ""
            raise LeakfreeError(
                f"{type(self).__name__}: the model has no {self._layer}{among}, so there is nothing to set"
            )
        for path, layer in layers.items():
            if path not in self._starts:
                counter: Any = layer.num_batches_tracked
                self._starts[path] = max(0, int(counter) - step * self.forwards_per_step)
            value = self._length(self._starts[path], max_steps, steps_per_epoch)
            if getattr(layer, self._attribute) != value:
                setattr(layer, self._attribute, value)

    def _select(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for path, module in model.named_modules():
            known = (self._attribute, *self._marks, "num_batches_tracked")
            if all(hasattr(module, name) for name in known) and (self.where is None or re.search(self.where, path)):
                yield path, module

    def state_dict(self) -> dict[str, Any]:
        """``starts``: what each layer had counted when the run began; plain values for a checkpoint."""
        return {"starts": dict(self._starts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the ramps are set at the next :meth:`step`."""
        self._starts = dict(state["starts"])


class RenormSchedule(_RampSchedule):
    """Scales the ramp of every BatchRenorm to the run, see :func:`renorm_ramp`.

    Every rank calls it alike; nothing is communicated. Save :meth:`state_dict` with the checkpoint.

    Args:
        original_steps: see :func:`renorm_ramp`.
        where: a regular expression searched in module paths; None = every BatchRenorm.
        forwards_per_step: training forwards of a layer in one update: with accumulated gradients, more than one.

    Example:
        >>> schedule = RenormSchedule()
        >>> for step in range(max_steps):                                   # doctest: +SKIP
        ...     schedule.step(model, step, max_steps)
        ...     train_one_step(model)
    """

    _layer, _attribute = "BatchRenorm", "ramp"
    _marks = ("r_max", "d_max")

    def __init__(
        self, *, original_steps: int = RENORM_STEPS, where: str | None = None, forwards_per_step: int = 1
    ) -> None:
        super().__init__(where=where, forwards_per_step=forwards_per_step)
        renorm_ramp(1, original_steps=original_steps)
        self.original_steps = original_steps

    def _length(self, start: int, max_steps: int, steps_per_epoch: float | None) -> tuple[int, ...]:
        ramp = renorm_ramp(max_steps, original_steps=self.original_steps)
        return tuple(start + mark * self.forwards_per_step for mark in ramp)


class BurnInSchedule(_RampSchedule):
    """Scales the burn-in of every CBN to the run, see :func:`burn_in_steps`.

    Every rank calls it alike; nothing is communicated. Save :meth:`state_dict` with the checkpoint.

    Args:
        at: the end of the burn-in: a share of the run, steps, or ``Epochs``.
        where, forwards_per_step: as in :class:`RenormSchedule`.
    """

    _layer, _attribute = "CBN", "burn_in"

    def __init__(self, at: Point = _BURN_IN, *, where: str | None = None, forwards_per_step: int = 1) -> None:
        super().__init__(where=where, forwards_per_step=forwards_per_step)
        burn_in_steps(1, at, 1)
        self.at = at

    def _length(self, start: int, max_steps: int, steps_per_epoch: float | None) -> int:
        return start + burn_in_steps(max_steps, self.at, steps_per_epoch) * self.forwards_per_step
