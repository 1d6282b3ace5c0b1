"""XBN: one norm of each residual block normalizes each sample by itself, the others stay batch norms.

That blocks the way on which the difference between running and true statistics accumulates from layer to layer.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms.convert import convert_norms, plan_conversion
from leakfree.norms.foreign import examine, is_batch_norm

__all__ = ["substitute_block_norms"]

_RELEASED_GROUPS = 64


def substitute_block_norms(
    model: nn.Module, name: str = "GN", position: int = 2, *, basic_position: int = 1, **options: Any
) -> list[str]:
    """Replace one batch norm in each residual block of ``model`` by the norm ``name``; in place, all or none.

    A block is a module with convolutions ``conv1``, ``conv2`` and norms ``bn1``, ``bn2`` (basic), or three of each
    (bottleneck), as in the ResNets of torchvision and timm. Stem and projections stay as they are. What a block
    keeps is said at :func:`leakfree.norms.convert_norms`.

    Args:
        name: a norm of :data:`leakfree.norms.NORMS`; the paper's are batch independent: GN, LN, IN.
        position: the norm of a bottleneck to replace, 1 to 3; 2 ("P2", behind the 3x3 convolution) is the paper's.
        basic_position: the norm of a basic block, 1 or 2; 1 is the authors'.
        options: of the norm. GN's ``num_groups`` is 64 unless given, and never more than the channels, as in the
            released script for ResNet-50; it must divide them.

    Returns:
        The paths of the norms that were replaced, in the order of the model.

    Raises:
        ConfigError: no such block, or none with a batch norm at the position; another position; a norm or options that
            do not fit, by path.

    Reference: Huang et al. 2022 (arXiv 2203.10778), section 4, and the authors' code.
    """
    for key, value, last in (("position", position, 3), ("basic_position", basic_position, 2)):
        if value not in range(1, last + 1):
            raise ConfigError(f"{key}: a block has norms 1 to {last}, got {value!r}")
    blocks = {path: block for path, block in model.named_modules() if _is_block(block)}
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no residual block (a module with conv1, bn1, conv2, bn2, and perhaps conv3, "
            "bn3); name the norms of its blocks with convert_norms(model, name, where=...)"
        )
    chosen: dict[str, nn.Module] = {}
    for path, block in blocks.items():
        child = f"bn{position if hasattr(block, 'conv3') else basic_position}"
        norm = getattr(block, child)
        if is_batch_norm(norm) and norm not in chosen.values():
            chosen[f"{path}.{child}" if path else child] = norm
    if not chosen:
        raise ConfigError(
            f"the norms at the position are no batch norms in all {len(blocks)} blocks: nothing to replace"
        )
    settings = {path: _settings(path, norm, name, options) for path, norm in chosen.items()}
    for convert in (plan_conversion, convert_norms):  # to replace all or none
        for path, its_options in settings.items():
            convert(model, name, where=f"^{re.escape(path)}$", **its_options)
    return list(chosen)


def _is_block(module: nn.Module) -> bool:
    children = module._modules
    numbers = (1, 2, 3) if "conv3" in children or "bn3" in children else (1, 2)
    return all(children.get(f"{kind}{number}") is not None for kind in ("conv", "bn") for number in numbers)


def _settings(path: str, norm: nn.Module, name: str, options: dict[str, Any]) -> dict[str, Any]:
    if name != "GN":
        return options
    try:
        channels = examine(norm).num_features
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return {**options, "num_groups": min(options.get("num_groups", _RELEASED_GROUPS), channels)}
