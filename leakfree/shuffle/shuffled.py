"""``Shuffled(module)``: the un-shuffle one cannot forget."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.distributed import Group, all_gather_ints
from leakfree.partition import Partition, current_scope, normalization_scope
from leakfree.recomputation import Replay, recomputing
from leakfree.shuffle.exchange import (
    Ticket,
    agree,
    count_rows,
    draw_groups,
    facts_of,
    make_ticket,
    shuffle_nest,
    unshuffle_nest,
)
from leakfree.shuffle.nest import tensors_of
from leakfree.shuffle.plan import GroupDraw

__all__ = ["Shuffled"]


class Shuffled(nn.Module):
    """Run ``module`` on random companions: shuffle its rows over all ranks, run, restore.

    In training, the rows of all ranks are dealt into ``num_groups`` random groups; each group
    meets on one rank, and a batch norm inside normalizes each group by itself. Every tensor of the
    nested output goes back to the rank and place of its row. In eval nothing moves.
    In one process rows stay where they are and only the groups are drawn, so k virtual groups equal
    k ranks with one group each. It equals ShuffleBN with the same seed, for any module inside that
    treats rows one by one except for its batch norms; use it where ShuffleBN cannot go.

    Across ranks: every rank must run it equally often, with any number of rows (zero too), and use
    its output in the loss. Each row crosses the wire at most once each way, all tensors together.
    State: ``num_draws`` counts the draws and is saved with the checkpoint; the draw is a function of
    (seed, num_draws). Activation checkpointing around it repeats the draw of the first forward.

    Args:
        module: takes tensors (nested in tuples, lists, dicts) whose first dimension is the rows, and
            returns such tensors.
        num_groups: over all ranks; by default that of the enclosing :func:`normalization_scope`
            (one per image group), else the world size, at least 2.
        seed: the same on every rank; heads that must not share their draw take different seeds.
        group: the ranks to shuffle over; "node" keeps rows on their machine. Where that is a single
            rank, virtual groups do the work.
        balance: groups differ by at most one row. Otherwise each rank works on as many rows as it has,
            which takes at least as many groups as ranks.

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

    def __init__(
        self,
        module: nn.Module,
        num_groups: int | None = None,
        *,
        seed: int = 0,
        group: Group = None,
        balance: bool = True,
    ) -> None:
        super().__init__()
        if num_groups is not None and num_groups < 1:
            raise ValueError(f"Shuffled: num_groups must be at least 1, got {num_groups}")
        self.module = module
        self.num_groups = num_groups
        self.seed = seed
        self.group = group
        self.balance = balance
        self._warned = False
        self._known_outputs: set[int] = set()
        self._replay: Replay[tuple[GroupDraw, Ticket]] = Replay("Shuffled", _same_draw)
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, seed={self.seed}" + ("" if self.balance else ", balance=False")

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.module(*args, **kwargs)
        found = tensors_of((args, kwargs), "input")
        num_rows = count_rows(found)
        draw, ticket = self._draw(found, num_rows)
        if draw.world_size == 1:  # rows may stay: only their companions change
            groups = torch.from_numpy(draw.groups).to(found[0][1].device)
            with normalization_scope(_local_partition(groups, draw.num_groups)):
                output = self.module(*args, **kwargs)
            self._check_rows(output, num_rows, draw)
            return output
        (args, kwargs), ticket = shuffle_nest((args, kwargs), ticket)
        with normalization_scope(_local_partition(ticket.groups, ticket.num_groups)):
            output = self.module(*args, **kwargs)
        self._check_rows(output, ticket.num_rows, draw)
        return unshuffle_nest(output, ticket)

    @torch.compiler.disable
    def _draw(self, found: list[tuple[str, Tensor]], num_rows: int) -> tuple[GroupDraw, Ticket]:
        first = found[0][1]
        if recomputing():
            return self._draw_again(first)
        scope = current_scope()
        draw, facts = draw_groups(
            num_rows,
            self.num_groups,
            seed=self.seed,
            index=int(self.num_draws),
            base_groups=scope.base_groups() if scope is not None else None,
            balance=self.balance,
            facts=facts_of(found, any(parameter.requires_grad for parameter in self.module.parameters())),
            group=self.group,
        )
        channels_last, differentiable = agree(facts, found)
        ticket = make_ticket(draw, first.device, self.group, channels_last=channels_last, differentiable=differentiable)
        if draw.total:
            self.num_draws += 1
        self._check_effect(draw)
        self._replay.remember(first, (draw, ticket))
        return draw, ticket

    def _draw_again(self, first: Tensor) -> tuple[GroupDraw, Ticket]:
        """The draw of the forward that is recomputed; ranks without rows are told which one by the others."""
        mine, fault = None, None
        try:
            mine = self._replay.recall(first) if len(first) else None
        except RuntimeError as error:  # raised below, when the other ranks know
            fault = error
        mine_or_why = mine[0].index if mine is not None else -2 if len(first) else -1
        known = [index for (index,) in all_gather_ints([mine_or_why], self.group)]
        if fault is not None:
            raise fault
        index = max(known)  # -1: no rank has rows, and such a forward does not count as a draw
        again = mine or self._replay.find(lambda value: value[0].total == 0 if index < 0 else _is_draw(value[0], index))
        if again is None or any(other not in (-1, again[0].index) for other in known):
            raise RuntimeError(
                "Shuffled: this forward runs inside a backward, but its input is that of no recent forward, so "
                "its random groups cannot be found again; keep it out of the checkpointed part"
            )
        return again

    @torch.compiler.disable
    def _check_rows(self, output: Any, num_rows: int, draw: GroupDraw) -> None:
        """Refuse what cannot be restored; outputs of a new kind on every rank at once, as sizes may fit by chance."""
        found = tensors_of(output, "output")
        faults = [
            f"{path} has shape {tuple(tensor.shape)}, but {num_rows} rows went in"
            for path, tensor in found
            if tensor.ndim == 0 or len(tensor) != num_rows
        ]
        mine = [facts_of(found, False)[0], len(faults)]
        everyone = [mine]
        # A rank without rows may take another path through the module than those that taught us their outputs.
        if mine[0] not in self._known_outputs or draw.leaves_ranks_empty:
            everyone = all_gather_ints(mine, self.group)
        if any(count for _, count in everyone) or faults:
            told = faults[0] if faults else f"an output of rank {next(r for r, (_, n) in enumerate(everyone) if n)}"
            raise ValueError(
                f"Shuffled: {told}: it is not one result per row and cannot be restored; "
                "return it from outside the shuffled module"
            )
        if any(kind != mine[0] for kind, _ in everyone):
            here = ", ".join(f"{path} {tuple(tensor.shape)} {tensor.dtype}" for path, tensor in found)
            raise ValueError(f"Shuffled: outputs differ between ranks in names, dtypes or row shapes; here: {here}")
        self._known_outputs.add(mine[0])

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


def _is_draw(draw: GroupDraw, index: int) -> bool:
    return draw.total > 0 and draw.index == index


def _local_partition(groups: Tensor, num_groups: int) -> Partition:
    return Partition(groups, num_groups) if num_groups > 1 else Partition()


def _same_draw(a: tuple[GroupDraw, Ticket], b: tuple[GroupDraw, Ticket]) -> bool:
    return a[0].key == b[0].key
