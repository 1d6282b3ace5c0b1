"""Who feeds whom: the calls of norms and layers in a model's forward, found by tracing it with torch.fx.

A trace is of one path through the Python code: that of eval mode, with default arguments. A module that cannot
be traced is left to its children, each by itself; what passes between these is then not known.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from leakfree.folding.arithmetic import is_layer, is_norm
from leakfree.norms.calls import called_modules, name_of, only_argument, trace_parts
from leakfree.norms.proxied_activation import HasActivated, ProxiedActivation

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
        self._nodes: dict[nn.Module, list[fx.Node]] = {}
        self._called: dict[fx.Node, nn.Module] = {}
        self._used_otherwise: set[nn.Module] = set()
        self._pass_on: set[nn.Module] = set()
        self._passing: set[fx.Node] = set()  # calls of modules that elsewhere do something
        # First see through modules without norms, whose layers may be followed by one; these need not be traceable.
        graphs, self.untraced = trace_parts(model, is_norm, (_is_leaf, _is_leaf_or_without_norm), constants=True)
        for part, graph in graphs:
            self._read(part, graph)

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
        before = only_argument(node)
        if before is None:
            return "a call with several arguments"
        module = self._called.get(before)
        if module is None:
            return _name(before)
        return self._feeder(before) if self._passes(before) else module

    def _consumers(self, node: fx.Node) -> Iterator[nn.Module | str]:
        for user in node.users:
            module = self._called.get(user)
            if self._passes(user):
                yield from self._consumers(user)
            elif not _asks_for_metadata(user):
                yield module if module is not None else _name(user)

    def _passes(self, node: fx.Node) -> bool:
        return self._called.get(node) in self._pass_on or node in self._passing

    def _read(self, part: nn.Module, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                self._used_otherwise.add(part.get_submodule(str(node.target).rpartition(".")[0]))
        for node, module in called_modules(part, graph).items():
            self._called[node] = module
            self._nodes.setdefault(module, []).append(node)
            self._used_otherwise.update(inner for inner in module.modules() if inner is not module)
            kind = type(module)
            if kind is nn.Identity or (
                not module.training and (kind in _PASS_ON_IN_EVAL or kind.__name__ in _PASS_ON_BY_NAME)
            ):
                self._pass_on.add(module)
            if isinstance(module, ProxiedActivation):
                before = only_argument(node)
                source = None if before is None else self._called.get(before)
                if isinstance(source, HasActivated) and source.tells:
                    self._passing.add(node)


def _is_leaf(module: nn.Module) -> bool:
    return is_norm(module) or is_layer(module) or not any(is_norm(m) or is_layer(m) for m in module.modules())


def _is_leaf_or_without_norm(module: nn.Module) -> bool:
    return is_norm(module) or is_layer(module) or not any(map(is_norm, module.modules()))


def _asks_for_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA


def _name(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "the module's " + {"placeholder": "input", "output": "output"}[node.op]
    return name_of(node)
