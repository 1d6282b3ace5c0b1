"""Finding a norm and the activation behind it in a model, and putting a ProxyNorm in the place of both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from leakfree.errors import ConfigError
from leakfree.keeping import attributes_kept
from leakfree.norms.calls import called_modules, only_argument, trace
from leakfree.norms.foreign import examine, is_batch_norm
from leakfree.norms.fused import activation_name
from leakfree.norms.handover import carry_over, kept_and_lost, place
from leakfree.norms.proxied_activation import ProxiedActivation
from leakfree.norms.proxy import ProxyNorm
from leakfree.norms.registry import build_norm

__all__ = ["ProxiedActivation", "replace_norm_activation_pairs"]


def replace_norm_activation_pairs(model: nn.Module, where: str | None = None, **options: Any) -> dict[str, str]:
    """Put a ProxyNorm in the place of every batch norm that an activation follows directly; in place, all or none.

    A pair is a batch norm whose result goes, in training and in eval, to one activation module of
    :data:`leakfree.norms.proxy.ACTIVATIONS` with torch's default parameters, and nowhere else. The model's forward is
    traced symbolically to see that (``torch.fx``; nothing is computed). The norm becomes a ProxyNorm with that
    activation; it has the same weight and bias, device, dtype, mode and hooks, but running statistics no more. The
    activation becomes ``nn.Identity``; one with other uses (``self.relu`` of a ResNet block, also behind the residual
    sum) becomes a :class:`ProxiedActivation`, which leaves out what is done already. timm's norms with a fused
    activation are pairs by themselves.

    Left as they are: norms without an activation behind them (projections, the last norm of a residual branch), and
    those followed by a function (``F.relu``) or by an activation that ProxyNorm does not have. What the model
    computes changes: train it.

    Args:
        model: on any device; a norm that it does not call in its forward is left.
        where: a regular expression searched in the norms' paths; None takes all.
        options: of :class:`ProxyNorm`, for each layer: ``norm``, ``num_groups``, ``num_points``, ``eps``, ``norm_eps``.

    Returns:
        From the paths of the norms that were replaced to those of their activations ("" for fused ones).

    Raises:
        ConfigError: the forward cannot be traced; there is no such pair, or ``where`` matches none; an option that
            ProxyNorm does not take, or that does not fit a layer, by path.
    """
    if "activation" in options:
        raise ConfigError("activation: each pair has its own, so that none can be chosen")
    try:
        pattern = re.compile(where or "")
    except (re.error, TypeError) as error:
        raise ConfigError(f"where: {where!r} is no regular expression: {error}") from None
    calls = [_calls(model, training) for training in (True, False)]
    pairs = _find_pairs(calls)
    chosen = [pair for pair in pairs if pattern.search(pair.norm_path)]
    if not chosen:
        none = "none has an activation module right behind the norm (a function, as F.relu, cannot be taken out)"
        there = ", ".join(pair.norm_path for pair in pairs) or none
        asked = "there is no pair of batch norm and activation" if where is None else f"where={where!r} matches no pair"
        raise ConfigError(f"{asked}; the pairs of the model: {there}")
    proxies = {pair.norm: _proxy_for(pair, options) for pair in chosen}
    replaced: dict[nn.Module, nn.Module] = {**proxies}
    for pair in chosen:
        carry_over(pair.norm, pair.norm, proxies[pair.norm])
        if pair.activation is None:
            continue
        uses = [call.source for mode in calls for call in mode if call.module is pair.activation]
        if all(source in proxies for source in uses):
            replaced[pair.activation] = nn.Identity()
            continue
        proxies[pair.norm].tells = True
        if not isinstance(pair.activation, ProxiedActivation) and pair.activation not in replaced:
            replaced[pair.activation] = ProxiedActivation(pair.activation)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[name] = replaced[child]
    return {pair.norm_path: pair.activation_path for pair in chosen}


@dataclass(frozen=True)
class _Call:
    """A call of a module in a forward: by whose result alone, and by whom alone its own result is used."""

    path: str
    module: nn.Module
    source: nn.Module | None  # whose result is its only argument
    user: _User | None  # None: none, or several, or not a module that takes nothing else


@dataclass(frozen=True)
class _User:
    path: str
    module: nn.Module


@dataclass(frozen=True)
class _Pair:
    """A norm and the activation behind each of its calls; None if that is fused to the norm."""

    norm_path: str
    norm: nn.Module
    activation_path: str
    activation: nn.Module | None
    name: str


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (ProxyNorm, ProxiedActivation)) or is_batch_norm(module)


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    modules = list(model.modules())
    with attributes_kept(modules, "training"):
        for module in modules:  # not by train(), which models redefine
            module.training = training
        yield


def _calls(model: nn.Module, training: bool) -> list[_Call]:
    """The calls of leaf modules in a forward of ``model``."""
    with _in_mode(model, training):
        try:
            graph = trace(model, _is_leaf)
        except Exception as error:  # of whatever kind: the model's own code runs here, on symbols
            raise ConfigError(
                f"the forward of {type(model).__name__} cannot be traced ({type(error).__name__}: {error}), so that "
                "nothing is known of what follows its norms; convert parts of it that can be traced, or build them "
                "with ProxyNorm"
            ) from error
    called = called_modules(model, graph)
    calls = []
    for node, module in called.items():
        behind = next(iter(node.users)) if len(node.users) == 1 else None
        user = None
        if behind is not None and behind in called and only_argument(behind) is node:
            user = _User(str(behind.target), called[behind])
        source = only_argument(node)
        calls.append(_Call(str(node.target), module, None if source is None else called.get(source), user))
    return calls


def _find_pairs(modes: list[list[_Call]]) -> list[_Pair]:
    """Norms that an activation follows in each of their calls, in the order of the forward."""
    followers: dict[nn.Module, tuple[str, set[_User | None]]] = {}
    for call in (call for mode in modes for call in mode if is_batch_norm(call.module)):
        followers.setdefault(call.module, (call.path, set()))[1].add(call.user)
    pairs = []
    for norm, (path, users) in followers.items():
        fused = getattr(norm, "act", None)
        if isinstance(fused, nn.Module) and not isinstance(fused, nn.Identity):
            name = _activation_name(fused) if isinstance(getattr(norm, "drop", None), nn.Identity) else None
            if name is not None:
                pairs.append(_Pair(path, norm, "", None, name))
            continue
        (user,) = users if len(users) == 1 else (None,)
        name = None if user is None else _activation_name(user.module)
        if user is not None and name is not None:
            pairs.append(_Pair(path, norm, user.path, user.module, name))
    return pairs


def _activation_name(module: nn.Module) -> str | None:
    """Its name in ``ACTIVATIONS``; None for another module, or parameters that are not torch's defaults."""
    return activation_name(module.activation if isinstance(module, ProxiedActivation) else module)


def _proxy_for(pair: _Pair, options: dict[str, Any]) -> ProxyNorm:
    try:
        facts = examine(pair.norm)
        proxy = build_norm("ProxyNorm", facts.num_features, activation=pair.name, **options)
        assert isinstance(proxy, ProxyNorm)
        kept_and_lost(pair.norm, pair.norm, proxy)  # refuses tensors of other shapes before anything is done
    except ConfigError as error:
        raise ConfigError(f"{pair.norm_path}: {error}") from error
    place(proxy, pair.norm)
    return proxy.train(pair.norm.training)
