"""An activation that several layers share, some of which have applied it already, and how these say so."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from leakfree.norms.traced import traced_call

__all__ = ["HasActivated", "ProxiedActivation"]


class HasActivated(nn.Module):
    """A layer that applies an activation itself, and can tell the :class:`ProxiedActivation` behind it.

    Attributes:
        tells: whether results are marked; after all hooks, so that it holds for what a hook has put in their place.
    """

    tells: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        if self.tells and isinstance(y, Tensor):
            # On the tensor, not in a module: copies of the model, its replicas and threads stay apart.
            y._is_activated = True  # type: ignore[attr-defined]
        return y


class ProxiedActivation(nn.Module):
    """An activation that several layers share, some of them a ProxyNorm, which has applied it already.

    What comes from such a ProxyNorm passes as it is, everything else (a residual sum) is activated.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        if getattr(input, "_is_activated", False):
            input._is_activated = False  # type: ignore[attr-defined]  # for this activation only
            return input
        y: Tensor = self.activation(input)
        return y
