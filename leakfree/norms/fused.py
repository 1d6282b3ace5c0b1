"""Activations fused into norms, as in timm's ``BatchNormAct2d``: ``y = act(drop(norm(x)))`` in one module.

A norm that replaces such a layer must have the same state dict keys (``weight``, ``act.weight``, not
``norm.weight``) and still be the norm that other tools look for. So its class becomes a subclass of the
norm's own, made at run time, that applies the two modules behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from leakfree.errors import ConfigError

__all__ = ["ACTIVATION_MODULES", "FusedActivation", "activation_name", "fuse_activation"]

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}
"""The activations that norms know by name (see :data:`leakfree.norms.proxy.ACTIVATIONS`), with torch's defaults."""


class FusedActivation(nn.Module):
    """What a norm with a fused activation is an instance of, beside its norm class; see :func:`fuse_activation`."""

    drop: nn.Module
    act: nn.Module
    _norm_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.normalize(*args, **kwargs)
        if isinstance(y, Mapping):  # the levels of a DomainBN
            return {key: self.act(self.drop(level)) for key, level in y.items()}
        return self.act(self.drop(y))

    def normalize(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's own forward, without what is fused."""
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[type[nn.Module]], Any]:
        # No module has the class by name, so that pickle and deepcopy must make it again from the norm's.
        return _blank, (self._norm_class,), self.__getstate__()


def activation_name(act: nn.Module) -> str | None:
    """The name of an activation in :data:`ACTIVATION_MODULES`; None for others, and for other parameters."""
    for name, make in ACTIVATION_MODULES.items():
        default = make()
        if type(act) is type(default):
            settings = {key: value for key, value in vars(act).items() if key not in ("inplace", "training")}
            same = all(vars(default).get(key) == value for key, value in settings.items())
            return name if same else None
    return None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(norm_class: type[nn.Module]) -> type[nn.Module]:
    if norm_class not in _CLASSES:
        name, doc = f"{norm_class.__name__}WithActivation", f"{norm_class.__name__}, then drop and act."
        body = {"_norm_class": norm_class, "__module__": __name__, "__doc__": doc}
        _CLASSES[norm_class] = type(name, (FusedActivation, norm_class), body)
    return _CLASSES[norm_class]


def _blank(norm_class: type[nn.Module]) -> nn.Module:
    fused = _fused_class(norm_class)
    return fused.__new__(fused)


def fuse_activation(norm: nn.Module, drop: nn.Module, act: nn.Module) -> nn.Module:
    """Make ``norm`` apply ``drop`` and then ``act`` to its result; in place.

    Its class becomes a subclass of the one it had and of :class:`FusedActivation`; the two modules become
    its children ``drop`` and ``act``, with their own train/eval mode. It pickles and deep-copies.

    Returns:
        ``norm``.

    Raises:
        ConfigError: ``norm`` has a ``drop`` or ``act`` of its own.
    """
    for name in ("drop", "act"):
        if hasattr(norm, name):
            raise ConfigError(
                f"{type(norm).__name__} has a {name!r} of its own, so that no activation can be fused to it"
            )
    norm.__class__ = _fused_class(type(norm))
    norm.drop, norm.act = drop, act
    return norm
