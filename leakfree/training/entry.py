"""What a checkpoint of a training tells beside the weights: the "leakfree" entry, checked before it is trusted."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor

from leakfree.errors import CheckpointError

__all__ = ["FORMAT", "training_entry"]

FORMAT = 1


def training_entry(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry of a checkpoint that a training wrote, None of other weights.

    Raises:
        CheckpointError: a newer leakfree wrote it, or something in it is another thing than a training writes.
    """
    entry = checkpoint.get("leakfree")
    if "leakfree" not in checkpoint:
        return None
    if not isinstance(entry, dict):
        raise CheckpointError(f"its entry leakfree is a {type(entry).__name__}, not what a training writes")
    written = entry.get("format")
    if not _is_whole(written) or written > FORMAT:
        raise CheckpointError(f"it is of format {written!r:.40}, and this leakfree reads {FORMAT}: use a newer one")
    frozen = entry.get("freeze_bn")
    sound = {
        "step": _is_whole(entry.get("step")),
        "seconds": _is_time(entry.get("seconds")),
        "world_size": _is_whole(entry.get("world_size")) and entry["world_size"] > 0,
        "config": isinstance(entry.get("config"), dict),
        "freeze_bn": isinstance(frozen, dict) and _is_freezing(frozen),
        "rank_buffers": isinstance(entry.get("rank_buffers"), list)
        and _is_whole(entry.get("world_size"))
        and len(entry["rank_buffers"]) == entry["world_size"]
        and all(map(_are_buffers, entry["rank_buffers"])),
    }
    for key, whether in sound.items():
        if not whether:
            raise CheckpointError(f"its entry leakfree.{key} is missing, or not what a training writes")
    return entry


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


def _is_freezing(state: dict[str, Any]) -> bool:
    at, layers = state.get("frozen_at", ""), state.get("layers")
    return (at is None or _is_whole(at)) and isinstance(layers, list) and all(isinstance(item, str) for item in layers)


def _are_buffers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items()
    )
