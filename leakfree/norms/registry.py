"""Norms by name: the registry, and the constructor every config goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fvcore.common.registry import Registry
from torch import nn

from leakfree.errors import ConfigError, choices
from leakfree.norms.batch_group import BatchGroupNorm
from leakfree.norms.cross_iteration import CrossIterationBatchNorm
from leakfree.norms.enhanced import InstanceEnhancementBatchNorm
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.independent import GroupNorm, InstanceNorm, LayerNorm, PositionalNorm
from leakfree.norms.memorized import MemorizedBatchNorm
from leakfree.norms.options import accepted_options, option_problems
from leakfree.norms.partitioned import (
    BatchNorm,
    BatchStatBatchNorm,
    GhostBatchNorm,
    ShuffleBatchNorm,
    SyncBatchNorm,
)
from leakfree.norms.per_domain import DomainBatchNorm
from leakfree.norms.proxy import ProxyNorm
from leakfree.norms.renorm import BatchRenorm

__all__ = ["NORMS", "build_norm", "check_options", "norm_layer"]

NORMS = Registry("NORMS")
NORMS.__doc__ = """
Norm layers by name. A registered object is called as ``obj(num_features, dim=dim, **options)`` and
returns a module for inputs (N, num_features, *). Register your own with ``@NORMS.register()`` or
``NORMS._do_register(name, obj)``.
"""


for _name, _norm in {
    "BN": BatchNorm,
    "SyncBN": SyncBatchNorm,
    "GhostBN": GhostBatchNorm,
    "ShuffleBN": ShuffleBatchNorm,
    "FrozenBN": FrozenBatchNorm,
    "BatchStatBN": BatchStatBatchNorm,
    "BatchRenorm": BatchRenorm,
    "CBN": CrossIterationBatchNorm,
    "BGN": BatchGroupNorm,
    "IEBN": InstanceEnhancementBatchNorm,
    "MBN": MemorizedBatchNorm,
    "DomainBN": DomainBatchNorm,
    "GN": GroupNorm,
    "LN": LayerNorm,
    "IN": InstanceNorm,
    "PN": PositionalNorm,
    "ProxyNorm": ProxyNorm,
}.items():
    NORMS._do_register(_name, _norm)


def build_norm(name: str, num_features: int, *, dim: int = 2, **options: Any) -> nn.Module:
    """Build the norm ``name`` of :data:`NORMS` for inputs (N, num_features, *).

    Args:
        name: BN, SyncBN, GhostBN, ShuffleBN, FrozenBN, BatchStatBN, BatchRenorm, BGN, IEBN, MBN, DomainBN, GN, or a
            name of yours.
        dim: 1 for (N, C) and (N, C, L), 2 for (N, C, H, W), 3 for (N, C, D, H, W).
        options: the norm's own, e.g. ``group_size`` (GhostBN), ``num_groups`` (ShuffleBN, BGN, GN),
            ``num_domains`` (DomainBN).

    Raises:
        ConfigError: an unknown name or option (the valid ones are listed, nearest first), an option of another type,
            or a required option missing.
    """
    if name not in NORMS:
        raise ConfigError(f"unknown norm {name!r}; choose from {choices(name, [key for key, _ in NORMS])}")
    norm = NORMS.get(name)
    valid = accepted_options(norm)
    for option in options:
        if valid is not None and option not in valid:
            raise ConfigError(f"norm {name} has no option {option!r}; it takes {choices(option, valid) or 'none'}")
    for option, problem in option_problems(norm, options):
        raise ConfigError(f"norm {name}: {option} {problem}")
    try:
        return norm(num_features, dim=dim, **options)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"norm {name} with options {options}: {error}") from error


def check_options(name: str, options: dict[str, Any], key: str) -> None:
    """See that ``options`` have the types that a norm of :data:`NORMS` takes.

    Args:
        key: the config section that holds ``norm_options``, for messages.

    Raises:
        ConfigError: an option of another type, or an argument that is none; names its key.
    """
    for option in ("name", "num_features", "dim"):
        if option in options:
            raise ConfigError(f"{key}.norm_options.{option}: is no option: the model says it to each norm")
    for option, problem in option_problems(NORMS.get(name), options):
        raise ConfigError(f"{key}.norm_options.{option}: {problem} (norm {name})")


def norm_layer(name: str, options: dict[str, Any], key: str) -> Callable[[int], nn.Module] | None:
    """torchvision's ``norm_layer`` argument for a norm of :data:`NORMS` (2d); None for "none".

    Args:
        key: the config section that holds ``norm`` and ``norm_options``, for messages.

    Raises:
        ConfigError: an unknown norm, or an option of another type, at once; an unknown option, or one that does not
            fit, when a layer is built.
    """
    if name == "none":
        return None
    if name not in NORMS:
        valid = choices(name, ["none", *(known for known, _ in NORMS)])
        raise ConfigError(f"{key}.norm: unknown norm {name!r}; choose from {valid}")
    check_options(name, options, key)

    def build(num_features: int) -> nn.Module:
        try:
            return build_norm(name, num_features, **options)
        except ConfigError as error:
            raise ConfigError(f"{key}.norm_options: {error}") from None

    return build
