"""The arithmetic of folding: a norm as ``y = scale * x + shift``, and that map inside the weights of a layer.

Everything is computed in float64 and rounded once to the dtype of the weights.

Legend: C channels, G groups of a convolution, O and I output and input channels of a group.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakfree.errors import LeakfreeError
from leakfree.norms.batch_group import BatchGroupNorm
from leakfree.norms.cached_proxy import CachedProxyNorm
from leakfree.norms.foreign import examine, is_batch_norm
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.fused import FusedActivation
from leakfree.norms.partitioned import PartitionedBatchNorm
from leakfree.norms.proxy import ProxyNorm

__all__ = ["NormMap", "Unfoldable", "is_layer", "is_norm", "map_input", "map_output", "norm_map", "set_weights"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PADDED_BY_THEMSELVES = ("Conv2dSame",)  # timm's "same" padding of TensorFlow: zeros, then the convolution
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; for lower precision 0.05


class Unfoldable(LeakfreeError):
    """Why a norm cannot be folded."""


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution or linear map, perhaps one that :func:`map_output` refuses."""
    return isinstance(module, (*_CONVS, *_TRANSPOSED, nn.Linear))


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm that may have a constant map: a batch norm, or a ProxyNorm."""
    return is_batch_norm(module) or isinstance(module, ProxyNorm)


@dataclass(frozen=True)
class NormMap:
    """The constant part of a norm in eval: ``y = scale * x + shift`` for each channel.

    Attributes:
        scale, shift: (C,), float64.
        dim: 1, 2 or 3 where the norm says of what inputs it is.
        stays: the rest of the norm, which takes its place, under the same state dict keys.
        refused: side of a layer ("before" or "after" the norm) -> why the map cannot go there.
        cached: what computes the same as the norm with less work, for its place where no layer takes the map.
    """

    scale: Tensor
    shift: Tensor
    dim: int | None
    stays: nn.Module
    refused: dict[str, str]
    cached: nn.Module | None = None


def norm_map(norm: nn.Module) -> NormMap:
    """The constant map of a norm.

    leakfree's own batch norms, and those that users derive from them, are run on a small input to see that
    they are that map and nothing else (a gate, say).

    Raises:
        Unfoldable: the norm's map depends on the batch, on the domain or on the sample; it is in training
            mode; it is a subclass that may do more than normalize; it has hooks, which would not be called.
    """
    if any(getattr(norm, registry) for registry in _HOOKS):
        raise Unfoldable("it has hooks, which would not be called any more")
    if isinstance(norm, ProxyNorm):
        return _proxy_map(norm)
    try:
        facts = examine(norm)
    except LeakfreeError as error:
        raise Unfoldable(str(error)) from error
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or var is None:
        raise Unfoldable("it has no running statistics: it normalizes with those of the batch")
    if isinstance(norm, PartitionedBatchNorm):
        if norm._takes_batch_statistics:
            raise Unfoldable("it normalizes with the statistics of the batch" + " (training mode)" * norm.training)
    elif isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
        raise Unfoldable("it is in training mode")
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if any(tensor is not None and tensor.shape != (facts.num_features,) for tensor in (mean, var, weight, bias)):
        raise Unfoldable("its map depends on more than the channel; convert it to a BN first (of one `domain`)")
    mean, var = mean.detach(), var.detach()
    if isinstance(norm, BatchGroupNorm):
        mean, var = (pooled.to(mean.dtype) for pooled in norm.pool_channels(mean, var))
    scale = torch.rsqrt(var.double() + float(vars(norm)["eps"]))
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    if isinstance(norm, (PartitionedBatchNorm, FrozenBatchNorm)):
        _probe(norm, facts.dim, mean, var, scale, shift)
    fused = [(name, module) for name, module in (("drop", facts.drop), ("act", facts.act)) if module is not None]
    if all(isinstance(module, nn.Identity) for _, module in fused):
        return NormMap(scale, shift, facts.dim, nn.Identity(), {})
    stays = nn.Sequential(OrderedDict(fused))
    stays.training = norm.training
    return NormMap(scale, shift, facts.dim, stays, {"after": "its activation comes between"})


def _proxy_map(norm: ProxyNorm) -> NormMap:
    """``(z - E) / sqrt(Var + eps)`` of the activated z; what comes before, GN and the activation, stays."""
    if type(norm).forward is not ProxyNorm.forward:
        raise Unfoldable(f"{type(norm).__name__} overrides ProxyNorm.forward, so it may do more")
    mean, var = (moment.double() for moment in norm.proxy_moments())
    scale = torch.rsqrt(var + norm.eps)
    stays = CachedProxyNorm(norm, standardizes=False)
    refused = {"before": "its map is constant only behind its activation"}
    return NormMap(scale, -mean * scale, None, stays, refused, CachedProxyNorm(norm))


@torch.no_grad()
def _probe(norm: nn.Module, dim: int | None, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor) -> None:
    shape = (5, -1, *[1] * (dim or 2))
    steps = torch.linspace(-1, 1, 5, dtype=torch.float64, device=mean.device).view(5, 1)
    x = (mean.double() + steps * (var.double() + 1).sqrt()).to(mean.dtype)
    x = x.view(shape).expand(*shape[:1], len(mean), *[3] * (dim or 2))
    y = norm.normalize(x) if isinstance(norm, FusedActivation) else norm.forward(x)
    columns = (1, -1, *[1] * (dim or 2))
    expected = x.double() * scale.view(columns) + shift.view(columns)
    size = expected.abs().amax() + shift.abs().amax()
    if not bool((y.double() - expected).abs().amax() <= _PROBE_TOLERANCE.get(mean.dtype, 0.05) * size):
        raise Unfoldable(f"{type(norm).__name__} does more in eval than to scale and shift channels")


Weights = tuple[Tensor, Tensor | None]


def map_output(layer: nn.Module, norm: NormMap) -> Weights:
    """The weight and bias with which ``layer`` gives what ``norm`` made of its output. Exact for any padding.

    Raises:
        Unfoldable: a layer that may do more with its weights than its kind does, with hooks on its output,
            or of another number of channels.
    """
    weight, bias = _weights(layer, norm)
    scale, shift = norm.scale.to(weight.device), norm.shift.to(weight.device)
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise Unfoldable("it has hooks, which would see another output")
    groups = _groups(layer)
    _check_channels(weight.shape[1] * groups if _is_transposed(layer) else len(weight), scale)
    if _is_transposed(layer):  # (G I, O, ...)
        per_output = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        new = (weight.view(groups, -1, *weight.shape[1:]) * per_output).view(weight.shape)
    else:
        new = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return new, shift if bias is None else bias * scale + shift


def map_input(layer: nn.Module, norm: NormMap) -> Weights:
    """The weight and bias with which ``layer`` makes of a norm's input what it made of its output.

    Raises:
        Unfoldable: as :func:`map_output`; and where the map is not the same at every position: zeros padded
            behind the norm would have to be ``-shift / scale`` before it, and a transposed convolution
            reaches positions by different parts of its kernel.
    """
    weight, bias = _weights(layer, norm)
    scale, shift = norm.scale.to(weight.device), norm.shift.to(weight.device)
    if any(getattr(layer, registry) for registry in _HOOKS):
        raise Unfoldable("it has hooks, which would see another input")
    groups = _groups(layer)
    if _is_transposed(layer):
        raise Unfoldable("it is a transposed convolution, to whose positions a shift contributes unequally")
    _check_channels(weight.shape[1] * groups, scale)
    if bool(shift.any()) and _pads_zeros(layer):
        raise Unfoldable("it pads with zeros, which the norm does not see")
    grouped = weight.view(groups, -1, *weight.shape[1:])  # (G, O, I, ...)
    ones = [1] * (weight.ndim - 2)
    new = grouped * scale.view(groups, 1, -1, *ones)
    moved = (grouped * shift.view(groups, 1, -1, *ones)).flatten(2).sum(2).flatten()
    return new.view(weight.shape), moved if bias is None else bias + moved


def set_weights(layer: nn.Module, weights: Weights) -> None:
    """Give ``layer`` new Parameters of its dtype, also where another layer has the same ones."""
    old = layer.weight
    assert isinstance(old, nn.Parameter)
    for name, value in zip(("weight", "bias"), weights, strict=True):
        if value is not None:
            new = torch.empty_like(old if name == "weight" else value, dtype=old.dtype).copy_(value)
            layer.register_parameter(name, nn.Parameter(new, old.requires_grad))


def _weights(layer: nn.Module, norm: NormMap) -> tuple[Tensor, Tensor | None]:
    known = type(layer) in (*_CONVS, *_TRANSPOSED, nn.Linear) or type(layer).__name__ in _PADDED_BY_THEMSELVES
    if not known or not {"weight", "bias"} == layer._parameters.keys():
        raise Unfoldable(f"it is a {type(layer).__name__}, which may do more with its weight than its kind does")
    if isinstance(layer, nn.Linear) and norm.dim not in (None, 1):
        raise Unfoldable("it is a linear map of the last dimension, not of the channels")
    bias = layer.bias
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().double(), bias.detach().double() if isinstance(bias, Tensor) else None


def _check_channels(channels: int, scale: Tensor) -> None:
    if channels != len(scale):
        raise Unfoldable(f"it has {channels} channels, the norm {len(scale)}")


def _groups(layer: nn.Module) -> int:
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return groups


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, _TRANSPOSED)


def _pads_zeros(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    if type(layer).__name__ in _PADDED_BY_THEMSELVES or layer.padding == "same":
        return any(size != 1 for size in layer.kernel_size)  # type: ignore[union-attr]
    return layer.padding != "valid" and any(layer.padding)  # type: ignore[arg-type]
