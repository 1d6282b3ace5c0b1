"""Which convolution makes the input of which Cross-Iteration BN in a model, and telling the norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms.calls import called_modules, name_of, trace_parts
from leakfree.norms.cross_iteration import CrossIterationBatchNorm

__all__ = ["attach_convolutions"]


def attach_convolutions(model: nn.Module) -> dict[str, str]:
    """Attach every CBN of ``model`` that needs a convolution to the one that makes its input.

    Which that is tells ``torch.fx``, where it can follow the model, or the largest parts of it that it can. In what
    remains, a norm belongs to the convolution that stands right before it in the same module. Norms that are attached
    to a convolution of this model keep it.

    Returns:
        the path of each norm -> the path of its convolution.

    Raises:
        ConfigError: the model has no CBN; or a norm whose convolution cannot be told, or is none that a norm can be
            attached to; names its path. Nothing is attached then.

    Example:
        >>> model = convert_norms(resnet18(), "CBN", burn_in=1000)    # doctest: +SKIP
        >>> attach_convolutions(model)["layer1.0.bn1"]                # doctest: +SKIP
        'layer1.0.conv1'
    """
    paths = {module: path for path, module in model.named_modules()}
    if not any(isinstance(module, CrossIterationBatchNorm) for module in paths):
        raise ConfigError("attach_convolutions: the model has no CBN; build or convert its norms first")
    wanting = [norm for norm in paths if isinstance(norm, CrossIterationBatchNorm) and norm.needs_convolution]
    new = [norm for norm in wanting if norm.convolution not in paths]
    sources: dict[nn.Module, set[nn.Module | str]] = {}
    for module, source in _sources(model) if new else ():
        sources.setdefault(module, set()).add(source)
    for norm, source in _standing_before(model):
        sources.setdefault(norm, {source})
    pairs = {norm: _only_source(norm, paths[norm], sources[norm]) for norm in new}
    for norm, conv in pairs.items():
        norm.attach(conv)
    return {paths[norm]: paths[norm.convolution] for norm in wanting if norm.convolution is not None}


def _only_source(norm: CrossIterationBatchNorm, path: str, sources: set[nn.Module | str]) -> nn.Module:
    """The one convolution among the ``sources`` of a norm's input; a ConfigError if there is not just that."""
    problem = f"its input comes from {len(sources)} different places"
    if len(sources) == 1:
        (source,) = sources
        if isinstance(source, nn.Module):
            reason = norm.why_not(source)
            if reason is None:
                return source
            problem = f"the module before it cannot be attached: {reason}"
        else:
            problem = f"its input comes from {source}, not from a convolution"
    raise ConfigError(
        f"attach_convolutions: {path or 'model'}: {problem}; attach a convolution yourself (the norm's attach(conv)), "
        "keep another norm there, or take rho=0"
    )


def _is_cbn(module: nn.Module) -> bool:
    return isinstance(module, CrossIterationBatchNorm)


def _is_leaf(module: nn.Module) -> bool:
    return _is_cbn(module) or next(module.children(), None) is None  # what one without children does is not asked


def _sources(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | str]]:
    """(norm, the module or a word for what makes its input) for each call of a CBN that can be followed."""
    for part, graph in trace_parts(model, _is_cbn, [_is_leaf])[0]:
        calls = called_modules(part, graph)
        for node in (node for node, module in calls.items() if _is_cbn(module)):
            source: Any = node.args[0] if node.args else node.kwargs["input"]
            while isinstance(calls.get(source), nn.Identity):
                source = source.args[0]
            if source.op != "placeholder":
                yield calls[node], calls.get(source) or name_of(source)


def _standing_before(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | str]]:
    """(norm, the module registered before it in the same parent, or a word for nothing) for each CBN."""
    for parent in model.modules():
        before: nn.Module | str = "outside of its module"
        for child in parent.children():
            if isinstance(child, CrossIterationBatchNorm):
                yield child, before
            before = child
    if isinstance(model, CrossIterationBatchNorm):
        yield model, "outside of its module"
