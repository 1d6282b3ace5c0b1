"""Changing the norms of a model in place, and saying beforehand what that would do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms.foreign import examine, is_batch_norm
from leakfree.norms.fused import ACTIVATION_MODULES, activation_name, fuse_activation
from leakfree.norms.handover import carry_over, kept_and_lost, place
from leakfree.norms.options import accepted_options
from leakfree.norms.per_domain import DomainBatchNorm
from leakfree.norms.registry import NORMS, build_norm

__all__ = ["ConversionReport", "LayerConversion", "convert_norms", "plan_conversion"]

_SETTINGS = ("eps", "momentum", "affine", "track_running_stats", "process_group")
_INDEPENDENT = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class LayerConversion:
    """What a conversion does to one layer.

    Attributes:
        path: where it is; several paths of one shared layer are joined by " = ".
        source: its class, channels and fused activation.
        target: the name of the norm that takes its place; None for a layer that is left as it is.
        kept: the tensors, settings and hooks that the new layer has from the old one.
        lost: those that it does not have.
        note: why a layer is left.
    """

    path: str
    source: str
    target: str | None
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_norms` would do with the same arguments; ``print`` shows it as a table.

    Attributes:
        name, options: of the new norm.
        converted: one row for each layer that is replaced, in the order of the model.
        left: the other norms, with the reason.
    """

    name: str
    options: dict[str, Any]
    converted: tuple[LayerConversion, ...]
    left: tuple[LayerConversion, ...]

    def __str__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        rows = [("layer", "from", "to", "kept", "lost")]
        for row in self.converted:
            kept = ", ".join(row.kept) if row.lost else "all"
            rows.append((row.path, row.source, row.target or "", kept, ", ".join(row.lost) or "-"))
        rows += [(row.path, row.source, "(left)", row.note, "") for row in self.left]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{len(self.converted)} layers to {self.name}{options}", *lines])


@dataclass(frozen=True)
class _Step:
    """One replacement, with nothing done yet: ``source`` is ``old``, or what a DomainBN is in the chosen domain."""

    old: nn.Module
    source: nn.Module
    new: nn.Module
    row: LayerConversion


def plan_conversion(
    model: nn.Module, name: str, where: str | None = None, *, domain: int | str | None = None, **options: Any
) -> ConversionReport:
    """Say what :func:`convert_norms` would do with these arguments. Nothing of ``model`` changes.

    Raises:
        ConfigError: as :func:`convert_norms` would.
    """
    steps = _plan(model, name, where, domain, options)
    return ConversionReport(name, options, tuple(step.row for step in steps), tuple(_left(model, steps)))


def convert_norms(
    model: nn.Module, name: str, where: str | None = None, *, domain: int | str | None = None, **options: Any
) -> nn.Module:
    """Replace the batch norms of ``model`` by the norm ``name``, in place: all of them, or, on an error, none.

    Converts torch's BatchNorm1d/2d/3d and SyncBatchNorm, leakfree's own, the FrozenBatchNorm2d of
    torchvision and detectron2, and timm's BatchNormAct2d, SyncBatchNormAct and FrozenBatchNormAct2d; their
    ``drop`` and ``act`` modules go to the new norm (a ProxyNorm takes the activation as its own).
    :func:`plan_conversion` says beforehand what would happen.

    Kept are the parameters (the same objects), buffers, devices, dtypes, eps, momentum, train/eval mode,
    frozenness, state dict keys, and one layer at several paths. Eval outputs do not change between batch norms,
    except where a norm is meant to differ in eval: IEBN by its gate, BGN by pooling channels, BatchStatBN.
    Forward, pre-forward and backward hooks go along, and their handles still remove them; they
    are called with the new layer. Hooks on the state dict stay behind: they belong to the old class.

    To go back, convert to "BN": leakfree's batch norm, equal to torch's, with the dimensions that the first
    norm had. torch's SyncBatchNorm takes any, so its way back does as well. From FrozenBN, weight and bias
    become trainable again if they were (where that is not known, as with torchvision's, they do). A norm without
    running statistics (GN) takes over only weight and bias, and there is no way back from it.
    In a DomainBN every domain starts from the statistics of the old norm, and from copies of its weight
    and bias if those are separate; the way back is for one ``domain``.

    What a model keeps outside its modules, such as a norm in a plain list, cannot be found and stays. Converters
    of others (``nn.SyncBatchNorm.convert_sync_batchnorm``) drop fused activations, ours too: convert to "SyncBN".

    Args:
        where: a regular expression searched in module paths; None converts all. A layer at several
            paths is converted at all if it matches at one.
        domain: the domain to keep where a DomainBN is converted, by index or name.
        options: passed to :func:`build_norm` for each layer.

    Returns:
        ``model``, or its replacement when the model itself is a norm.

    Raises:
        ConfigError: unknown name or option; a batch norm subclass that may do more than normalize, a lazy
            one, one without running statistics to freeze, a tensor for which the new norm has no room, or a
            DomainBN that ``domain`` must choose from, by module path; no batch norm, or none that ``where``
            matches; a ``domain``, but no DomainBN.
    """
    replaced = {}
    for step in _plan(model, name, where, domain, options):
        carry_over(step.old, step.source, step.new)
        replaced[step.old] = step.new
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[child_name] = replaced[child]
    return replaced.get(model, model)


# ------------------------------------------------------------------------------- what is to be done


def _paths(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, list[str]]:
    """The modules that are ``wanted``, each with all its paths."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            found.setdefault(module, []).append(path)
    return found


def _plan(
    model: nn.Module, name: str, where: str | None, domain: int | str | None, options: dict[str, Any]
) -> list[_Step]:
    found = _paths(model, is_batch_norm)
    if not found:
        others = Counter(type(module).__name__ for module in model.modules() if isinstance(module, _INDEPENDENT))
        raise ConfigError(
            (f"where={where!r} matches no batch norm; there are none" if where else "there is no batch norm to convert")
            + f"; the model's norms are {', '.join(f'{count} {kind}' for kind, count in others.items())}" * bool(others)
        )
    chosen = {
        module: paths
        for module, paths in found.items()
        if where is None or any(re.search(where, path) for path in paths)
    }
    if not chosen:
        raise ConfigError(
            f"where={where!r} matches no batch norm; there are {', '.join(paths[0] for paths in found.values())}"
        )
    if domain is not None and not any(isinstance(module, DomainBatchNorm) for module in chosen):
        raise ConfigError(f"domain={domain!r}: there is no DomainBN to convert")
    steps: list[_Step] = []
    problems: dict[str, list[str]] = {}
    for module, paths in chosen.items():
        try:
            steps.append(_step(module, paths, name, domain, options))
        except LeakfreeError as error:
            problems.setdefault(str(error), []).append(paths[0] or "model")
    if problems:
        raise ConfigError("; ".join(f"{_some(paths)}: {problem}" for problem, paths in problems.items()))
    return steps


def _some(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _step(old: nn.Module, paths: list[str], name: str, domain: int | str | None, options: dict[str, Any]) -> _Step:
    facts = examine(old)
    drop, act = facts.drop, facts.act
    if name == "FrozenBN" and getattr(old, "running_mean", None) is None:
        raise ConfigError("has no running statistics to freeze (track_running_stats=False)")
    inherited, drop, act = _inherited(old, name), facts.drop, facts.act
    if act is not None and drop is not None and "activation" in _options(name):  # it takes the place of both
        inherited["activation"], drop, act = _activation(drop, act, name), None, None
    elif "activation" in _options(name) and "activation" not in options:
        raise ConfigError(
            f"{name} takes the place of a norm and of the activation behind it, which would act twice: use "
            f"replace_norm_activation_pairs(model), or say activation=... and take the model's own out yourself"
        )
    new = build_norm(name, facts.num_features, dim=facts.dim, **{**inherited, **options})  # type: ignore[arg-type]
    source = _one_domain(old, new, domain)
    place(new, like=source)
    new.train(old.training)
    if act is not None and drop is not None:
        fuse_activation(new, drop, act)  # last: these are the old layer's, and stay in their mode
    kept, lost = kept_and_lost(old, source, new)
    row = LayerConversion(" = ".join(path or "model" for path in paths), _describe(old), name, kept, lost)
    return _Step(old, source, new, row)


def _activation(drop: nn.Module, act: nn.Module, norm: str) -> str:
    name = activation_name(act)
    if name is None or not isinstance(drop, nn.Identity):
        fused = type(act if isinstance(drop, nn.Identity) else drop).__name__
        raise ConfigError(
            f"has {fused} fused behind it, but {norm} takes an activation by name, one of "
            f"{', '.join(ACTIVATION_MODULES)}, and nothing else; exclude the layer with `where`"
        )
    return name


def _inherited(old: nn.Module, name: str) -> dict[str, Any]:
    """Settings of ``old`` that the new norm takes as well."""
    accepted = _options(name)
    settings = {key: getattr(old, key) for key in _SETTINGS if key in accepted and hasattr(old, key)}
    if "norm_eps" in accepted and "eps" in settings:  # ProxyNorm: its own eps is that of the proxy
        settings["norm_eps"] = settings.pop("eps")
    return settings


def _options(name: str) -> set[str]:
    return (accepted_options(NORMS.get(name)) if name in NORMS else None) or set()


def _one_domain(old: nn.Module, new: nn.Module, domain: int | str | None) -> nn.Module:
    """``old``, or what a DomainBN is in ``domain`` if that is asked for or if ``new`` has no room for all."""
    if not isinstance(old, DomainBatchNorm):
        return old
    if domain is not None:
        return old.single(domain)
    for name, tensor in (*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)):
        target = getattr(new, name, None)
        if target is None:
            has_room = tensor.ndim < 2 or not isinstance(tensor, nn.Parameter)  # statistics may be dropped
        else:
            has_room = tensor.ndim < target.ndim or tensor.shape == target.shape
        if not has_room:
            raise ConfigError(
                f"is a DomainBN with a {name} for each of {old.num_domains} domains, for which the new norm "
                f"has no room; choose one with `domain`, among {', '.join(map(old.label_of, range(old.num_domains)))}"
            )
    return old


def _describe(module: nn.Module) -> str:
    if not is_batch_norm(module):
        return type(module).__name__
    try:
        facts = examine(module)
    except ConfigError:
        return type(module).__name__
    act = f" + {type(facts.act).__name__}" if facts.act is not None else ""
    return f"{type(module).__name__.removesuffix('WithActivation')}({facts.num_features}){act}"


def _left(model: nn.Module, steps: Iterable[_Step]) -> Iterator[LayerConversion]:
    taken = {step.old for step in steps}
    for module, paths in _paths(model, lambda module: module not in taken).items():
        if is_batch_norm(module):
            note = "not matched by `where`"
        elif isinstance(module, _INDEPENDENT):
            note = "shares nothing between samples"
        elif {"running_mean", "running_var"} & module._buffers.keys():
            note = "has running statistics, but is no batch norm known here"
        else:
            continue
        yield LayerConversion(" = ".join(path or "model" for path in paths), _describe(module), None, note=note)
