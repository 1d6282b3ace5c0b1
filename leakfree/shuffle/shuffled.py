"""``Shuffled(module)``: the un-shuffle one cannot forget."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.distributed import Group, all_gather_ints
from leakfree.partition import Partition, current_scope, normalization_scope
from leakfree.shuffle.exchange import batch_unshuffle, draw_groups, make_ticket, move
from leakfree.shuffle.plan import GroupDraw

__all__ = ["Shuffled"]


def _map_tensors(value: Any, change: Callable[[Tensor, str], Tensor], path: str) -> Any:
    """Apply ``change(tensor, path)`` to every tensor of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value, path)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = {name: _map_tensors(getattr(value, name), change, f"{path}.{name}") for name in value._fields}
        return type(value)(**items)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict):
        return type(value)((key, _map_tensors(item, change, f"{path}[{key!r}]")) for key, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"Shuffled: cannot shuffle {path} of type {type(value).__name__}; use tensors, tuples, lists, dicts"
    )


class Shuffled(nn.Module):
    """Run ``module`` on random companions: shuffle its rows over all ranks, run, restore.

    In training, the rows of all ranks are dealt into ``num_groups`` balanced random groups; each group
    meets on one rank, and a batch norm inside normalizes each group by itself. Every tensor of the
    nested output goes back to the rank and place of its row. In eval nothing moves.
    In one process rows stay where they are and only the groups are drawn, so k virtual groups equal
    k ranks with one group each. It equals ShuffleBN with the same seed, for any module inside that
    treats rows one by one except for its batch norms; use it where ShuffleBN cannot go.

    Across ranks: every rank must run it equally often, with any number of rows (zero too), and use
    its output in the loss. State: ``num_draws`` counts the draws and is saved with the checkpoint;
    the draw is a function of (seed, num_draws).

    Args:
        module: takes tensors (nested in tuples, lists, dicts) whose first dimension is the rows, and
            returns such tensors.
        num_groups: over all ranks; by default that of the enclosing :func:`normalization_scope`
            (one per image group), else the world size, at least 2.
        seed: the same on every rank; heads that must not share their draw take different seeds.

    Raises:
        ValueError: inputs with different numbers of rows; an output that is not per row, by name; a
            torch batch norm inside, which cannot see virtual groups, by name.
        TypeError: a value that is neither a tensor nor a nest of them.

    Example:
        >>> head = Shuffled(nn.Sequential(nn.Conv2d(8, 8, 3), build_norm("BN", 8)), num_groups=4)
        >>> head(torch.randn(32, 8, 7, 7)).shape
        torch.Size([32, 8, 5, 5])
    """

    num_draws: Tensor

    def __init__(self, module: nn.Module, num_groups: int | None = None, *, seed: int = 0, group: Group = None) -> None:
        super().__init__()
        if num_groups is not None and num_groups < 1:
            raise ValueError(f"Shuffled: num_groups must be at least 1, got {num_groups}")
        self.module = module
        self.num_groups = num_groups
        self.seed = seed
        self.group = group
        self._warned = False
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, seed={self.seed}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.module(*args, **kwargs)
        num_rows, device = self._rows((args, kwargs))
        scope = current_scope()
        base_groups = scope.base_groups() if scope is not None else None
        draw = draw_groups(
            num_rows,
            self.num_groups,
            seed=self.seed,
            index=int(self.num_draws),
            base_groups=base_groups,
            group=self.group,
        )
        if draw.total:
            self.num_draws += 1
        self._check_effect(draw)
        if draw.world_size == 1:  # rows may stay: only their companions change
            with normalization_scope(_local_partition(torch.from_numpy(draw.groups).to(device), draw.num_groups)):
                output = self.module(*args, **kwargs)
            self._check_rows(output, num_rows)
            return output
        ticket = make_ticket(draw, device, self.group)
        args, kwargs = _map_tensors((args, kwargs), lambda tensor, _: move(tensor, ticket), "input")
        with normalization_scope(_local_partition(ticket.groups, ticket.num_groups)):
            output = self.module(*args, **kwargs)
        self._check_rows(output, len(ticket.arrival_order))
        return _map_tensors(output, lambda tensor, _: batch_unshuffle(tensor, ticket), "output")

    def _check_rows(self, output: Any, num_rows: int) -> None:
        """Refuse what cannot be restored, on every rank at once: the sizes may fit by chance on some."""
        faults: list[str] = []

        def look(tensor: Tensor, path: str) -> Tensor:
            if tensor.ndim == 0 or len(tensor) != num_rows:
                faults.append(f"{path} has shape {tuple(tensor.shape)}, but {num_rows} rows went in")
            return tensor

        _map_tensors(output, look, "output")
        anywhere = [count for (count,) in all_gather_ints([len(faults)], self.group)]
        if any(anywhere):
            told = faults[0] if faults else f"an output of rank {next(r for r, n in enumerate(anywhere) if n)}"
            raise ValueError(
                f"Shuffled: {told}: it is not one result per row and cannot be restored; "
                "return it from outside the shuffled module"
            )

    def _check_effect(self, draw: GroupDraw) -> None:
        if draw.num_groups == 1 and not self._warned:
            self._warned = True
            warnings.warn("Shuffled: with a single group the shuffle has no effect; set num_groups >= 2", stacklevel=3)
        if draw.num_groups > draw.world_size:  # alike on every rank
            for path, inner in self.module.named_modules():
                # leakfree's batch norms look for groups; torch's own would pool all of them.
                if isinstance(inner, nn.modules.batchnorm._BatchNorm) and not hasattr(inner, "partition"):
                    raise ValueError(
                        f"Shuffled: {path or 'module'} is a torch {type(inner).__name__}, which cannot normalize "
                        f"several groups on one rank ({draw.num_groups} groups, {draw.world_size} ranks); "
                        'convert_norms(module, "BN") first'
                    )

    @staticmethod
    def _rows(inputs: Any) -> tuple[int, torch.device]:
        found: list[tuple[str, Tensor]] = []

        def note(tensor: Tensor, path: str) -> Tensor:
            found.append((path, tensor))
            return tensor

        _map_tensors(inputs, note, "input")
        if not found:
            raise ValueError("Shuffled: no tensor among the inputs")
        sizes = {path: len(tensor) if tensor.ndim else 0 for path, tensor in found}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"Shuffled: inputs must have the same number of rows, got {sizes}")
        return sizes[found[0][0]], found[0][1].device


def _local_partition(groups: Tensor, num_groups: int) -> Partition:
    return Partition(groups, num_groups) if num_groups > 1 else Partition()
