"""Cross-sample influence: how much of a sample's output is made by its batch-mates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leakfree.distributed import all_gather_ints, get_rank, is_distributed
from leakfree.state import buffers_kept

__all__ = ["InfluenceResult", "cross_sample_influence"]


@dataclass(frozen=True)
class InfluenceResult:
    """Shares of the input-gradient energy of a sample's output that lie on other samples.

    Attributes:
        total: on any other sample, of any rank; 0.0 certifies a batch-independent forward.
        within: on other samples of the same group; None without groups.
        between: on samples of other groups; None without groups.
        num_probes: outputs followed.
    """

    total: float
    within: float | None
    between: float | None
    num_probes: int


def cross_sample_influence(
    model: nn.Module | Callable[[Tensor], Tensor],
    batch: Tensor,
    *,
    num_probes: int = 8,
    groups: Tensor | None = None,
    seed: int = 0,
) -> InfluenceResult:
    """Measure how far the outputs of ``model`` depend on other samples of the batch.

    For a sample i and a random direction v: g = d(v . f_i(x)) / dx over the whole batch, and
    influence = sum_{j != i} |g_j|^2 / sum_j |g_j|^2, averaged over the probes. It is taken in the mode
    the model is in: call ``model.train()`` to measure training. Buffers of a module are put back afterwards
    (those a plain callable hides are not), and no parameter receives a gradient. A path that is cut off
    from the gradient (a detached batch mean) is not seen.

    Across ranks: all ranks call it, each with its batch (not empty everywhere); probes walk over the
    ranks' samples and energies are summed over ranks, so statistics shared between ranks count.

    Args:
        model: maps (N, *) to per-sample outputs (N, *).
        batch: (N, *) floating point.
        num_probes: samples whose output is followed, over all ranks.
        groups: (N,) integers: the image (or class) of each sample, numbered over all ranks.
        seed: of the probes; the same on every rank.

    Returns:
        The shares, averaged over the probes.

    Raises:
        ValueError: the output has another number of rows than the batch, or no sample on any rank.

    Example:
        >>> x = torch.randn(16, 4)
        >>> cross_sample_influence(nn.Linear(4, 3), x).total
        0.0
    """
    sizes = [count for (count,) in all_gather_ints([len(batch)])]
    if not sum(sizes):
        raise ValueError("cross_sample_influence: the batch is empty on every rank")
    offset = sum(sizes[: get_rank()])
    x = batch.detach().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(sum(sizes), generator=generator)[:num_probes].tolist()
    energies = torch.zeros(len(chosen), 3, dtype=torch.float64)  # own, same group, other groups
    module = model if isinstance(model, nn.Module) else nn.Module()
    with buffers_kept(module), torch.enable_grad():
        output = model(x)
        if len(output) != len(batch):
            raise ValueError(f"cross_sample_influence: {len(batch)} samples went in, {len(output)} outputs came out")
        for probe, number in enumerate(chosen):
            row = number - offset
            mine = 0 <= row < len(batch)
            direction = torch.zeros_like(output)
            # drawn on every rank, so that the result does not depend on which rank holds the sample
            values = torch.randn(output.shape[1:], generator=generator, dtype=torch.float64)
            if mine:
                direction[row] = values.to(output)
            (gradient,) = torch.autograd.grad(output, x, direction, retain_graph=True)
            energy = gradient.detach().double().flatten(1).square().sum(1).cpu()
            home = _group_of(groups, row if mine else None, number, sizes)
            same = torch.zeros(len(batch), dtype=torch.bool) if groups is None else groups.cpu() == home
            if mine:
                energies[probe, 0] = energy[row]
                same[row] = False
                energy[row] = 0.0
            energies[probe, 1] = energy[same].sum()
            energies[probe, 2] = energy[~same].sum()
    if is_distributed():
        energies = _sum_over_ranks(energies, batch.device)
    shares = energies / energies.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    _, within, between = shares.mean(0).tolist()
    total = within + between
    return InfluenceResult(
        total, within if groups is not None else None, between if groups is not None else None, len(chosen)
    )


def _group_of(groups: Tensor | None, row: int | None, number: int, sizes: list[int]) -> int:
    """The group of sample ``number``, told to all ranks by the one that holds it."""
    mine = int(groups[row]) if groups is not None and row is not None else 0
    gathered = all_gather_ints([mine])
    owner = 0
    while number >= sum(sizes[: owner + 1]):
        owner += 1
    return gathered[owner][0]


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    shared = values.to(device)
    dist.all_reduce(shared)
    return shared.cpu()
