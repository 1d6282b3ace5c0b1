"""What a norm has from the one whose place it takes: the same parameters, copies of the buffers, hooks.

Of three modules: ``old``, which leaves; ``source``, which has its state (``old`` itself, or what a DomainBN is
in one domain); and ``new``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakfree.errors import ConfigError
from leakfree.norms.foreign import STATE
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.fused import FusedActivation
from leakfree.norms.partitioned import PartitionedBatchNorm

__all__ = ["carry_over", "kept_and_lost", "place"]

# Module keeps hooks in these; the handles that the user holds refer to the very dictionaries.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def kept_and_lost(old: nn.Module, source: nn.Module, new: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What :func:`carry_over` gives to ``new``, and what it cannot.

    Raises:
        ConfigError: a tensor of another shape than that of the new norm.
    """
    kept: list[str] = []
    lost: list[str] = []
    for key in STATE:
        tensor = getattr(source, key, None)
        if tensor is not None:
            (lost if _room(key, tensor, new) is None else kept).append(key)
    for key in sorted({*source._parameters, *source._buffers} - {*STATE}):
        lost.append(key)
    for key in ("eps", "momentum", "process_group"):
        value = getattr(old, key, None)
        if value is not None:
            same = value in (getattr(new, key, None), getattr(new, f"norm_{key}", None))
            (kept if same else lost).append(key)
    if isinstance(new, FusedActivation):
        kept.append(f"activation {type(new.act).__name__}")
    if getattr(old, "frozen", False):
        (kept if isinstance(new, PartitionedBatchNorm) else lost).append("frozen")
    for registries, column in ((_HOOKS, kept), (_STATE_HOOKS, lost)):
        count = sum(len(getattr(old, registry)) for registry in registries)
        if count:
            column.append(f"{count} {'hooks' if registries is _HOOKS else 'state dict hooks'}")
    return tuple(kept), tuple(lost)


def _room(key: str, tensor: Tensor, new: nn.Module) -> Tensor | None:
    """Where ``new`` keeps what ``tensor`` is in the old norm; None if it has no such thing."""
    target = getattr(new, key, None)
    if target is None:
        return None
    try:
        fits = torch.broadcast_shapes(tensor.shape, target.shape) == target.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ConfigError(f"its {key} {tuple(tensor.shape)} does not fit that of the new norm, {tuple(target.shape)}")
    return target


def place(new: nn.Module, like: nn.Module) -> None:
    """Move ``new`` to the device and the dtype of ``like``; what a norm keeps in a dtype of its choice stays in it."""
    device, dtype, default = torch.device("cpu"), torch.get_default_dtype(), torch.get_default_dtype()
    for tensor in (*like.parameters(recurse=False), *like.buffers(recurse=False)):
        if tensor.is_floating_point():
            device, dtype = tensor.device, tensor.dtype
            break
    new._apply(lambda tensor: tensor.to(device, dtype if tensor.dtype == default else tensor.dtype))


def carry_over(old: nn.Module, source: nn.Module, new: nn.Module) -> None:
    """Give the new norm the state of the old one: the same Parameter objects, copies of the buffers, hooks."""
    for key in STATE:
        tensor = getattr(source, key, None)
        if tensor is None:
            if key == "bias" and getattr(source, "weight", None) is not None and getattr(new, key, None) is not None:
                new.register_parameter("bias", None)  # torch's bias=False
            continue
        target = _room(key, tensor, new)
        if target is None:
            continue
        if isinstance(tensor, nn.Parameter) and isinstance(target, nn.Parameter) and tensor.shape == target.shape:
            setattr(new, key, tensor)
        elif isinstance(target, nn.Parameter):  # from the buffers of others' frozen norms, or to one map per domain
            target.data = tensor.detach().expand(target.shape).clone()
            if isinstance(tensor, nn.Parameter):
                target.requires_grad_(tensor.requires_grad)
        else:
            new._buffers[key] = tensor.detach().expand(target.shape).clone()
    _carry_trainability(old, new)
    if getattr(old, "frozen", False) and isinstance(new, PartitionedBatchNorm):
        new.frozen = True
    for registry in _HOOKS:
        hooks = getattr(old, registry)
        hooks.update(getattr(new, registry))
        setattr(new, registry, hooks)
    for registry in _HOOK_FLAGS:
        getattr(old, registry).update(getattr(new, registry))
        setattr(new, registry, getattr(old, registry))
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _carry_trainability(old: nn.Module, new: nn.Module) -> None:
    """FrozenBN decides whether weight and bias train; on the way back they do as before."""
    parameters = {
        key: value for key in ("weight", "bias") if isinstance(value := getattr(new, key, None), nn.Parameter)
    }
    if isinstance(new, FrozenBatchNorm):
        new.trained_before = (
            dict(old.trained_before)
            if isinstance(old, FrozenBatchNorm)
            else {
                key: value.requires_grad
                for key in parameters
                if isinstance(value := getattr(old, key, None), nn.Parameter)
            }
        )
        for parameter in parameters.values():
            parameter.requires_grad_(new.affine_trainable)
    elif isinstance(old, FrozenBatchNorm):
        for key, parameter in parameters.items():
            parameter.requires_grad_(old.trained_before.get(key, True))
