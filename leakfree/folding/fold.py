"""Folding the norms of a model into the layers beside them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from leakfree.errors import LeakfreeError, choices
from leakfree.folding.arithmetic import (
    NormMap,
    Unfoldable,
    is_layer,
    is_norm,
    map_input,
    map_output,
    norm_map,
    set_weights,
)
from leakfree.folding.calls import Calls

__all__ = ["Fold", "FoldReport", "fold_norms"]


@dataclass(frozen=True)
class Fold:
    """A norm that became part of layers.

    Attributes:
        norm: its path.
        layers: the paths of the layers.
        side: where these are, "before" the norm or "after" it.
    """

    norm: str
    layers: tuple[str, ...]
    side: str


@dataclass(frozen=True)
class FoldReport:
    """What :func:`fold_norms` did; ``print`` shows it as a table.

    Attributes:
        folded: one for each norm that is gone.
        cached: path -> why no layer takes its map, for each ProxyNorm whose proxy statistics became constants.
        left: path -> reason, for the norms that are still there.
        untraced: path -> error, for the modules whose forward could not be traced; where norms in them were
            called cannot be seen, except for what their own children call.
    """

    folded: tuple[Fold, ...]
    left: dict[str, str]
    untraced: dict[str, str]
    cached: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(fold.norm, f"into {', '.join(fold.layers)}, {fold.side} it") for fold in self.folded]
        rows += [(path, f"cached: {reason}") for path, reason in self.cached.items()]
        rows += [(path, f"left: {reason}") for path, reason in self.left.items()]
        rows += [(path or "model", f"not traced: {error}") for path, error in self.untraced.items()]
        width = max((len(path) for path, _ in rows), default=0)
        lines = [f"{path.ljust(width)}  {text}" for path, text in rows]
        total = len(self.folded) + len(self.cached) + len(self.left)
        cached = f", {len(self.cached)} cached" if self.cached else ""
        return "\n".join([f"{len(self.folded)} of {total} norms folded{cached}", *lines])


def fold_norms(
    model: nn.Module,
    where: str | None = None,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, FoldReport]:
    """Fold the batch norms of a model in eval mode into the convolutions and linear maps beside them.

    A batch norm that uses its running statistics is ``y = s * x + t`` per channel, with
    ``s = weight / sqrt(running_var + eps)`` and ``t = bias - running_mean * s``. Into the layer before it goes
    ``W' = s W, b' = s b + t`` for each output channel, exact for any padding. Where that is not possible, into
    the layer after it goes ``W' = W s`` for each input channel and ``b' = b + sum(W t)``, exact without zero
    padding, and refused with it. Outputs change by rounding only: sums are those of float64, rounded once.

    Norms: torch's, leakfree's (any that in eval is the map above; a run on a small input checks it), timm's with
    a fused activation, which stays under its state dict keys, and torchvision's and detectron2's frozen ones.
    Layers: torch's own Conv, ConvTranspose and Linear, and timm's Conv2dSame; subclasses that change their
    weight (weight standardization) are left. A Linear is taken to map (N, C).

    A ProxyNorm is constant behind its activation, so it goes into the layer after it; norm and activation stay.
    Where no layer takes it (zeros padded behind it, a pooling, a sum), its proxy statistics become constants in
    its place: the same function for any layer behind it, without the quadrature. Behind an activation that it
    shares with others (see :func:`leakfree.norms.replace_norm_activation_pairs`) it is folded too.

    Which layer feeds which norm is found by ``torch.fx``: a layer is folded only if all its calls feed this
    norm, and nothing else, so that a shared layer is folded once, or not at all. The trace is that of eval
    with default arguments: a forward that other arguments lead elsewhere, and layers that are called from outside
    the module that was traced, are not seen. Compare outputs, or name the ``pairs`` yourself.

    The result is a module of the same kind with the same paths; a folded norm is an ``nn.Identity`` there (or
    its activation). It is for inference: its layers can train, but what was a norm is gone. ``torch.export`` and
    ``torch.onnx.export(..., dynamo=True)`` take it where they take the model.

    Args:
        where: a regular expression searched in the paths of norms; None takes all.
        pairs: (layer path, norm path), or (norm path, layer path) for a layer after the norm; only these are
            folded, without a trace: for models that cannot be traced. You answer for it that the second gets
            what the first gives, and nothing else does.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The folded model, and what was folded, what cached, what not, and why. The model given is unchanged unless
        ``inplace``.

    Raises:
        LeakfreeError: a model in training mode; ``where`` without a match; a pair that does not exist or cannot be
            folded. Then ``model`` is unchanged.

    Reference: Wu & Johnson 2021, section 4.3 (the frozen form); Labatie et al. 2021 on padding after the norm.
    """
    if model.training:
        raise LeakfreeError("the model is in training mode, where norms are not constant; call model.eval() first")
    if inplace and pairs is not None:
        fold_norms(model, where, pairs=pairs)  # a copy first: if one pair is refused, none is folded
    model = model if inplace else copy.deepcopy(model)
    paths = {module: path for path, module in model.named_modules()}
    norms = [module for module in paths if is_norm(module)]
    if where is not None:
        names = [paths[norm] for norm in norms]
        norms = [norm for norm in norms if re.search(where, paths[norm])]
        if not norms:
            raise LeakfreeError(f"where={where!r} matches no batch norm; there are {', '.join(names) or 'none'}")
    if pairs is not None:
        folds = _fold_pairs(model, paths, _by_norm(model, pairs, norms))
        done = {fold.norm for fold in folds}
        left = {paths[norm]: "not among the pairs" for norm in norms if paths[norm] not in done}
        return model, FoldReport(tuple(folds), left, {})
    calls = Calls(model)
    folds, left = _fold_all(model, norms, calls, paths)
    cached = _cache(model, [norm for norm in norms if paths[norm] in left], paths)
    reasons = {path: left.pop(path) for path in cached}
    return model, FoldReport(tuple(folds), left, calls.untraced, reasons)


def _cache(model: nn.Module, norms: list[nn.Module], paths: dict[nn.Module, str]) -> list[str]:
    """Put what computes the same with less work in the place of those ``norms`` that have such a thing."""
    done = []
    for norm in norms:
        try:
            cached = norm_map(norm).cached
        except Unfoldable:
            continue  # the report has its reason
        if cached is not None:
            _replace(model, norm, cached)
            done.append(paths[norm])
    return done


def _fold_all(
    model: nn.Module, norms: list[nn.Module], calls: Calls, paths: dict[nn.Module, str]
) -> tuple[list[Fold], dict[str, str]]:
    folds: list[Fold] = []
    left: dict[str, str] = {}
    for norm in norms:
        try:
            fold, stays = _fold(norm, calls, paths)
        except Unfoldable as error:
            left[paths[norm]] = str(error)
        else:
            folds.append(fold)
            if isinstance(stays, nn.Identity):
                calls.pass_on(norm)
            _replace(model, norm, stays)
    if folds and left:  # a norm that is gone may have stood between another one and its layer
        more, left = _fold_all(model, [norm for norm in norms if paths[norm] in left], calls, paths)
        folds += more
    return folds, left


def _fold(norm: nn.Module, calls: Calls, paths: dict[nn.Module, str]) -> tuple[Fold, nn.Module]:
    """Fold ``norm`` on the first side where it goes; what stays of it is still to be put in its place."""
    constant = norm_map(norm)
    if norm not in calls:
        around = [path for path in calls.untraced if not path or paths[norm].startswith(f"{path}.")]
        if around:
            raise Unfoldable(f"its calls are not known ({around[-1] or 'the model'} cannot be traced); use `pairs`")
        raise Unfoldable("the forward does not call it")
    if calls.is_used_otherwise(norm):
        raise Unfoldable("its parameters are also used without calling it")
    reasons = []
    for side, neighbours, back in (
        ("before", calls.feeders, calls.consumers),
        ("after", calls.consumers, calls.feeders),
    ):
        try:
            layers = _layers(norm, neighbours(norm), back, calls)
            _apply(constant, side, layers, paths)
        except Unfoldable as error:
            reasons.append(f"{side} it: {error}")
        else:
            return Fold(paths[norm], tuple(paths[layer] for layer in layers), side), constant.stays
    raise Unfoldable("; ".join(reasons))


def _layers(
    norm: nn.Module,
    neighbours: Iterable[nn.Module | str],
    back: Callable[[nn.Module], list[nn.Module | str]],
    calls: Calls,
) -> list[nn.Module]:
    """The neighbours of ``norm``, if all are layers that have no other neighbour on that side."""
    layers = []
    for layer in neighbours:
        if isinstance(layer, str) or not is_layer(layer):
            raise Unfoldable(layer if isinstance(layer, str) else type(layer).__name__)
        if back(layer) != [norm] or calls.is_used_otherwise(layer):
            raise Unfoldable(f"a {type(layer).__name__} that is used elsewhere, too")
        layers.append(layer)
    if not layers:
        raise Unfoldable("nothing")
    return layers


def _apply(constant: NormMap, side: str, layers: list[nn.Module], paths: dict[nn.Module, str]) -> None:
    """Give all the layers their new weights, or, where one refuses, none."""
    if side in constant.refused:
        raise Unfoldable(constant.refused[side])
    weights = []
    for layer in layers:
        try:
            weights.append((map_output if side == "before" else map_input)(layer, constant))
        except Unfoldable as error:
            raise Unfoldable(f"{paths[layer]}: {error}") from error
    for layer, new in zip(layers, weights, strict=True):
        set_weights(layer, new)


def _replace(model: nn.Module, norm: nn.Module, stays: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = stays


def _by_norm(
    model: nn.Module, pairs: Sequence[tuple[str, str]], norms: list[nn.Module]
) -> dict[nn.Module, tuple[str, list[nn.Module]]]:
    """norm -> (side, its layers), after a check of what the user named."""
    by_path = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, tuple[str, list[nn.Module]]] = {}
    taken: dict[tuple[nn.Module, str], nn.Module] = {}
    for pair in pairs:
        for path in pair:
            if path not in by_path:
                wanted = [name for name, module in by_path.items() if is_layer(module) or is_norm(module)]
                raise LeakfreeError(f"pair {pair}: there is no module {path!r}; choose from {choices(path, wanted)}")
        first, second = (by_path[path] for path in pair)
        side = "after" if is_norm(first) else "before"
        norm, layer = (first, second) if side == "after" else (second, first)
        if norm not in norms or not is_layer(layer):
            raise LeakfreeError(f"pair {pair}: expected a layer and a batch norm that `where` matches, in either order")
        if taken.setdefault((layer, side), norm) is not norm:
            raise LeakfreeError(f"pair {pair}: the layer is in a pair with another norm on that side, too")
        if found.setdefault(norm, (side, []))[0] != side:
            raise LeakfreeError(f"pair {pair}: the norm has pairs on both sides; it can be folded only once")
        if layer not in found[norm][1]:
            found[norm][1].append(layer)
    return found


def _fold_pairs(
    model: nn.Module, paths: dict[nn.Module, str], by_norm: dict[nn.Module, tuple[str, list[nn.Module]]]
) -> list[Fold]:
    folds = []
    for norm, (side, layers) in by_norm.items():
        try:
            constant = norm_map(norm)
            _apply(constant, side, layers, paths)
        except Unfoldable as error:
            raise LeakfreeError(f"{paths[norm]} cannot be folded: {error}") from error
        _replace(model, norm, constant.stays)
        folds.append(Fold(paths[norm], tuple(paths[layer] for layer in layers), side))
    return folds
