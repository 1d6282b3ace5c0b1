"""Who feeds whom: the calls of norms and layers in a model's forward, found by tracing it with torch.fx.

A trace is of one path through the Python code: that of eval mode, with default arguments. A module that cannot
be traced is left to its children, each by itself; what passes between these is then not known.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

from torch import fx, nn

from leakfree.folding.arithmetic import is_layer, is_norm

__all__ = ["Calls"]

_PASS_ON_IN_EVAL = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PASS_ON_BY_NAME = ("DropPath", "StochasticDepth")  # timm's and torchvision's
_METADATA = {"shape", "ndim", "dtype", "device", "size", "dim"}


class Calls:
    """The calls of every norm and layer in ``model``.

    Attributes:
        untraced: path -> error, for the modules that cannot be traced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.untraced: dict[str, str] = {}
        self._nodes: dict[nn.Module, list[fx.Node]] = {}
        self._called: dict[fx.Node, nn.Module] = {}
        self._used_otherwise: set[nn.Module] = set()
        self._pass_on: set[nn.Module] = set()
        self._seen: set[nn.Module] = set()
        # A forward may store what it computes: a copy, of the same tensors, keeps the proxies out of the model.
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        traced = copy.deepcopy(model, tensors)
        self._original = dict(zip(traced.modules(), model.modules(), strict=True))
        self._trace("", traced)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._nodes

    def pass_on(self, module: nn.Module) -> None:
        """From now on ``module`` counts as one that gives what it gets."""
        self._pass_on.add(module)

    def is_used_otherwise(self, module: nn.Module) -> bool:
        """Whether something but calls of ``module`` may use its parameters."""
        return module in self._used_otherwise

    def feeders(self, module: nn.Module) -> list[nn.Module | str]:
        """What the input of ``module`` is, over all its calls: each module, or the name of another operation, once."""
        return list(dict.fromkeys(self._feeder(node) for node in self._nodes[module]))

    def consumers(self, module: nn.Module) -> list[nn.Module | str]:
        """What takes the output of ``module``, over all its calls, each once."""
        return list(dict.fromkeys(found for node in self._nodes[module] for found in self._consumers(node)))

    def _feeder(self, node: fx.Node) -> nn.Module | str:
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return "a call with several arguments"
        before = node.args[0]
        module = self._called.get(before)
        if module is None:
            return _name(before)
        return self._feeder(before) if module in self._pass_on else module

    def _consumers(self, node: fx.Node) -> Iterator[nn.Module | str]:
        for user in node.users:
            module = self._called.get(user)
            if module is not None and module in self._pass_on:
                yield from self._consumers(user)
            elif not _asks_for_metadata(user):
                yield module if module is not None else _name(user)

    def _trace(self, path: str, module: nn.Module) -> None:
        if module in self._seen or is_norm(module) or not any(map(is_norm, module.modules())):
            return
        self._seen.add(module)
        if type(module).forward is not nn.Module.forward:
            # First see through modules without norms, whose layers may be followed by one; these need not be traceable.
            for through in (True, False):
                try:
                    self._read(module, _Tracer(through).trace(module, _defaults(module)))
                except Exception as error:  # whatever a forward raises when it is given proxies
                    self.untraced[path] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]
                else:
                    self.untraced.pop(path, None)
                    return
        for name, child in module.named_children():
            self._trace(f"{path}.{name}" if path else name, child)

    def _read(self, root: nn.Module, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                self._used_otherwise.add(self._original[root.get_submodule(str(node.target).rpartition(".")[0])])
            if node.op != "call_module":
                continue
            called = root.get_submodule(str(node.target))
            module = self._original[called]
            self._called[node] = module
            self._nodes.setdefault(module, []).append(node)
            self._used_otherwise.update(self._original[inner] for inner in called.modules() if inner is not called)
            kind = type(module)
            if kind is nn.Identity or (
                not module.training and (kind in _PASS_ON_IN_EVAL or kind.__name__ in _PASS_ON_BY_NAME)
            ):
                self._pass_on.add(module)


class _Tracer(fx.Tracer):
    """Norms and layers are leaves, and so is what holds none of them (``through``: what holds no norm)."""

    def __init__(self, through: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self._through = through

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if is_norm(module) or is_layer(module) or super().is_leaf_module(module, qualified_name):
            return True
        return not any(is_norm(inner) or (self._through and is_layer(inner)) for inner in module.modules())


def _defaults(module: nn.Module) -> dict[str, object]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def _asks_for_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA


def _name(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "the module's " + {"placeholder": "input", "output": "output"}[node.op]
    return f"`{getattr(node.target, '__name__', node.target)}`"
