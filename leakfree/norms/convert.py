"""Changing the norms of a model in place."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.partitioned import PartitionedBatchNorm
from leakfree.norms.per_domain import DomainBatchNorm
from leakfree.norms.registry import NORMS, accepted_options, build_norm

__all__ = ["convert_norms"]

_TORCH_DIMS: dict[type, int | None] = {
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.SyncBatchNorm: None,
}


def _is_batch_norm(module: nn.Module) -> bool:
    # torchvision's and detectron2's frozen norms are told by name: importing either here would be heavy.
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm)) or (
        type(module).__name__ == "FrozenBatchNorm2d"
    )


def _source_dim(module: nn.Module, path: str) -> int | None:
    if isinstance(module, (PartitionedBatchNorm, FrozenBatchNorm)):
        return module.dim
    if type(module).__name__ == "FrozenBatchNorm2d":
        return 2
    if type(module) in _TORCH_DIMS:
        return _TORCH_DIMS[type(module)]
    raise ConfigError(
        f"{path}: cannot convert {type(module).__module__}.{type(module).__name__}: it may do more than normalize "
        "(a fused activation, say); exclude it with `where`, or replace it by a plain BatchNorm first"
    )


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the state of ``old``: the same Parameter objects, copies of the buffers, mode, frozenness."""
    for name in ("weight", "bias"):
        source, target = getattr(old, name, None), getattr(new, name, None)
        if source is None:
            if target is not None and getattr(old, "weight", None) is not None:  # torch's bias=False
                setattr(new, name, None)
        elif isinstance(source, nn.Parameter) and (target is None or target.shape == source.shape):
            setattr(new, name, source)
        elif target is not None:  # the buffers of torchvision's and detectron2's frozen norms, or one map per domain
            target.data.copy_(source)
            if isinstance(source, nn.Parameter):
                target.requires_grad_(source.requires_grad)
        parameter = getattr(new, name, None)
        if isinstance(new, FrozenBatchNorm) and parameter is not None:
            parameter.requires_grad_(new.affine_trainable)
        elif isinstance(old, FrozenBatchNorm) and parameter is not None:
            parameter.requires_grad_(True)
    with torch.no_grad():
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            source, target = getattr(old, name, None), getattr(new, name, None)
            if source is not None and target is not None:
                target.copy_(source)
    if getattr(old, "frozen", False) and isinstance(new, PartitionedBatchNorm):
        new.frozen = True
    new.train(old.training)


def _one_domain(old: nn.Module, new: nn.Module, domain: int | str | None, path: str) -> nn.Module:
    """``old``, or what a DomainBN is in ``domain`` if that is asked for or if ``new`` has no room for all."""
    if not isinstance(old, DomainBatchNorm):
        return old
    if domain is not None:
        try:
            return old.single(domain)
        except LeakfreeError as error:
            raise ConfigError(f"{path}: {error}") from error
    for name, tensor in (*old.named_parameters(), *old.named_buffers()):
        target = getattr(new, name, None)
        if target is None:
            has_room = tensor.ndim < 2 or not isinstance(tensor, nn.Parameter)  # statistics may be dropped
        else:
            has_room = tensor.ndim < target.ndim or tensor.shape == target.shape
        if not has_room:
            raise ConfigError(
                f"{path}: is a DomainBN with a {name} for each of {old.num_domains} domains, for which the new norm "
                f"has no room; choose one with `domain`, among {', '.join(map(old.label_of, range(old.num_domains)))}"
            )
    return old


def convert_norms(
    model: nn.Module, name: str, where: str | None = None, *, domain: int | str | None = None, **options: Any
) -> nn.Module:
    """Replace the batch norms of ``model`` by the norm ``name``, in place.

    Converts torch's BatchNorm1d/2d/3d and SyncBatchNorm, leakfree's own, and the FrozenBatchNorm2d of
    torchvision and detectron2. Parameters (the same objects), buffers, device, dtype, eps, momentum,
    train/eval mode and frozenness are kept; eval outputs do not change between batch norms of any kind.
    To go back, convert to "BN": from FrozenBN that makes weight and bias trainable. A norm without
    running statistics (GN) takes over only weight and bias, and there is no way back from it.
    In a DomainBN every domain starts from the statistics of the old norm, and from copies of its weight
    and bias if those are separate; the way back is for one ``domain``.
    Hooks registered on a replaced norm are not carried over.

    Args:
        where: a regular expression searched in module paths; None converts all.
        domain: the domain to keep where a DomainBN is converted, by index or name.
        options: passed to :func:`build_norm` for each layer.

    Returns:
        ``model``, or its replacement when the model itself is a norm.

    Raises:
        ConfigError: unknown name or option; a batch norm subclass that may do more than normalize, or
            one without running statistics to freeze, or a DomainBN that ``domain`` must choose from, by module
            path; ``where`` matches no batch norm; a ``domain``, but no DomainBN.
    """
    found = [(path, module) for path, module in model.named_modules() if _is_batch_norm(module)]
    chosen = [(path, module) for path, module in found if where is None or re.search(where, path)]
    if where is not None and not chosen:
        raise ConfigError(
            f"where={where!r} matches no batch norm; there are {', '.join(p for p, _ in found) or 'none'}"
        )
    if domain is not None and not any(isinstance(module, DomainBatchNorm) for _, module in chosen):
        raise ConfigError(f"domain={domain!r}: there is no DomainBN to convert")
    replaced: dict[nn.Module, nn.Module] = {}
    for path, old in chosen:
        dim = _source_dim(old, path or "model")
        if name == "FrozenBN" and getattr(old, "running_mean", None) is None:
            raise ConfigError(f"{path or 'model'}: has no running statistics to freeze (track_running_stats=False)")
        device, dtype = _placement(old)
        settings = _inherited(old, name)
        new = build_norm(name, _num_features(old), dim=dim, **{**settings, **options})  # type: ignore[arg-type]
        new = new.to(device=device, dtype=dtype)
        _carry_over(_one_domain(old, new, domain, path or "model"), new)
        replaced[old] = new
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[child_name] = replaced[child]
    return replaced.get(model, model)


def _num_features(module: nn.Module) -> int:
    features = getattr(module, "num_features", None)
    return int(features) if features is not None else int(module.get_buffer("running_mean").numel())


def _placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _inherited(old: nn.Module, name: str) -> dict[str, Any]:
    """Settings of ``old`` that the new norm takes as well."""
    known = ("eps", "momentum", "affine", "track_running_stats", "process_group")
    accepted = accepted_options(NORMS.get(name)) if name in NORMS else None
    return {key: getattr(old, key) for key in known if key in (accepted or ()) and hasattr(old, key)}
