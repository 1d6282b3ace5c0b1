"""Tracing a forward with torch.fx, to see who calls which module with what; nothing is computed.

A trace is of one path through the Python code: that of the mode that each module is in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

from torch import fx, nn

__all__ = ["called_modules", "name_of", "only_argument", "trace", "trace_parts"]


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool], *, constants: bool = False) -> fx.Graph:
    """The graph of a forward. One that stores what it computes stores symbols in ``module``.

    Args:
        is_leaf: which modules, besides torch's own, are not looked into.
        constants: take arguments that have a default as it, and the shapes of parameters as they are.

    Raises:
        Exception: of any kind, since the model's own code runs, on symbols.
    """
    arguments = inspect.signature(module.forward).parameters.values() if constants else ()
    defaults = {item.name: item.default for item in arguments if item.default is not item.empty}
    return _Tracer(is_leaf, constants).trace(module, defaults if constants else None)


def trace_parts(
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    leaves: Sequence[Callable[[nn.Module], bool]],
    *,
    constants: bool = False,
) -> tuple[list[tuple[nn.Module, fx.Graph]], dict[str, str]]:
    """Trace ``model``, or the largest parts of it that can be; what passes between these is then not known.

    Args:
        model: stays as it is.
        wanted: modules whose calls are looked for; what holds none is not traced.
        leaves: for ``is_leaf`` of :func:`trace`, tried in their order on each part.
        constants: as in :func:`trace`.

    Returns:
        The parts and their graphs, and path -> error for the modules that cannot be traced.
    """
    graphs: list[tuple[nn.Module, fx.Graph]] = []
    untraced: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module) -> None:
        if module in seen or wanted(module) or not any(map(wanted, module.modules())):
            return
        seen.add(module)
        if type(module).forward is not nn.Module.forward:
            for is_leaf in leaves:
                try:
                    # A forward may store what it computes: a copy, of the same tensors, keeps the symbols out.
                    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
                    graphs.append((module, trace(copy.deepcopy(module, tensors), is_leaf, constants=constants)))
                except Exception as error:  # whatever a forward raises when it is given symbols
                    untraced[path] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
                else:
                    untraced.pop(path, None)
                    return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return graphs, untraced


def called_modules(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, nn.Module]:
    """Each call of a leaf in the ``graph`` of ``module``, and the leaf."""
    return {node: module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}


def only_argument(call: fx.Node) -> fx.Node | None:
    """What ``call`` takes, if that is one value of the forward, by position, and nothing else."""
    alone = len(call.args) == 1 and not call.kwargs
    return call.args[0] if alone and isinstance(call.args[0], fx.Node) else None


def name_of(node: fx.Node) -> str:
    """The operation, for messages."""
    return f"`{getattr(node.target, '__name__', node.target)}`"


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool], constants: bool) -> None:
        super().__init__(param_shapes_constant=constants)
        self._is_leaf = is_leaf

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return self._is_leaf(module) or super().is_leaf_module(module, path)
