"""Functions of training progress: the learning rate, and the moment batch norms freeze.

Usable from Lightning, from detectron2 hooks, from a plain loop: nothing here knows a trainer.
A step is one optimizer update; "at step s" means that s updates are done.
What the frozen statistics are (moving average, precise) is the caller's choice: see ``before`` of
:meth:`FreezeBN.step` and ``leakfree.population``.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from leakfree.errors import CheckpointError, ConfigError, LeakfreeError, choices

__all__ = ["FreezeBN", "freeze_step", "lr_factor"]

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


def freeze_step(at: float, max_steps: int) -> int | None:
    """The step from which batch norms are frozen, or None when the run ends before.

    Args:
        at: a float is a share of the run in [0, 1] (1.0 = never), rounded to a step; an int is a
            number of steps.
        max_steps: updates of the whole run.

    Raises:
        ConfigError: a share outside [0, 1], or a negative number of steps.
    """
    if isinstance(at, bool) or not isinstance(at, (int, float)):
        raise ConfigError(f"freeze at: expected a share (float) or a number of steps (int), got {at!r}")
    if isinstance(at, float) and not 0.0 <= at <= 1.0:
        raise ConfigError(f"freeze at: a share of the run must be in [0, 1], got {at} (write an int for steps)")
    if at < 0:
        raise ConfigError(f"freeze at: a number of steps must be at least 0, got {at}")
    step = round(at * max_steps) if isinstance(at, float) else at
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

    def __init__(self, at: float, *, where: str | None = None, affine_trainable: bool = True) -> None:
        freeze_step(at, 1)  # a bad value is told now, not at the end of training
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
        before: Callable[[nn.Module], object] | None = None,
    ) -> bool:
        """Freeze ``model`` if ``step`` is at or past the freeze point; return True when it happens now.

        Args:
            step: updates done so far.
            max_steps: updates of the whole run.
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
        point = freeze_step(self.at, max_steps)
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
