"""What is a batch norm: torch's, leakfree's own, and those of other libraries, told without importing them.

torchvision's and detectron2's ``FrozenBatchNorm2d`` and timm's norms with a fused activation are told by
class name and by what they hold: importing the libraries here would be heavy, and they may not be installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.fused import FusedActivation
from leakfree.norms.partitioned import PartitionedBatchNorm

__all__ = ["STATE", "BatchNormFacts", "examine", "is_batch_norm"]

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_BatchNorm = nn.modules.batchnorm._BatchNorm
_TORCH_DIMS: dict[type, int | None] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # not derived from torch's batch norm
_FUSED = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")  # timm.layers.norm_act


@dataclass(frozen=True)
class BatchNormFacts:
    """A batch norm, whoever's it is.

    Attributes:
        num_features: C.
        dim: 1, 2, 3, or None for any (torch's SyncBatchNorm does not say).
        drop, act: what is fused behind the norm, or None.
    """

    num_features: int
    dim: int | None
    drop: nn.Module | None = None
    act: nn.Module | None = None


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is some batch norm, perhaps one that :func:`examine` refuses."""
    return isinstance(module, (_BatchNorm, FrozenBatchNorm)) or type(module).__name__ in _FROZEN


def examine(module: nn.Module) -> BatchNormFacts:
    """The facts about a batch norm.

    Raises:
        ConfigError: a lazy one, or a subclass that may do more than normalize; the message does not name the path.
    """
    if isinstance(module, (PartitionedBatchNorm, FrozenBatchNorm)):
        fused = (module.drop, module.act) if isinstance(module, FusedActivation) else (None, None)
        return BatchNormFacts(module.num_features, module.dim, *fused)
    kind, name = type(module), type(module).__name__
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ConfigError(f"is a {name} that does not know its channels yet; run one forward first")
    children = dict(module.named_children())
    more = sorted({*module._parameters, *module._buffers, *children} - {*STATE, "drop", "act"})
    is_fused = name in _FUSED and {"drop", "act"} <= children.keys()
    is_plain = (kind in _TORCH_DIMS or name in _FROZEN or name == "SyncBatchNormAct") and not children
    if more or not (is_fused or is_plain):
        raise ConfigError(
            f"cannot convert {kind.__module__}.{name}: it may do more than normalize "
            f"({'it also has ' + ', '.join(more) if more else 'a fused activation, say'}); "
            "exclude it with `where`, or replace it by a plain BatchNorm first"
        )
    num_features = getattr(module, "num_features", None) or module.get_buffer("running_mean").numel()
    dim = _TORCH_DIMS.get(kind, 2)
    return BatchNormFacts(int(num_features), dim, children.get("drop"), children.get("act"))
