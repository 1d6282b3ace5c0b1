"""Layers that a symbolic trace (torch.fx) takes as one call, as it takes torch's own layers."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["traced_call"]


def traced_call(layer: nn.Module, input: fx.Proxy) -> Any:
    """What the forward of ``layer`` returns for an ``input`` that stands for a tensor: one ``call_module``.

    What the forward decides by its input (shapes, groups, dtypes) is then decided when the graph runs. Tools that
    trace (torchvision's ``create_feature_extractor``, quantization) would else stop there. Call it first in the
    forward; not a decorator, whose code all layers would share and ``torch.compile`` would compile again for each.
    """
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
