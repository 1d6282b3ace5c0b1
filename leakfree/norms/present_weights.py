"""What moments of past iterations, and their derivatives by a convolution's weight, are under its present weight.

Legend: C channels, K iterations, and of the convolution: G groups, P numbers in a patch, W (C, P), b (C,). E is the
mean over rows and positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakfree.norms.blocked import Rows, product_sums
from leakfree.norms.patches import Convolution

__all__ = ["PresentWeight", "channels_lie_last"]


def channels_lie_last(table: Tensor) -> bool:
    """Whether channels come last in the memory of ``table`` (rows, channels, positions)."""
    return not table.is_contiguous() and table.transpose(1, 2).is_contiguous()


@dataclass(frozen=True)
class PresentWeight:
    """A convolution with its present weight, (C, input channels of a group, kernel positions); constants.

    What :meth:`linear` and :meth:`products` are under other weights is compared, so that few of their digits remain.
    So they are no matrix products in what a GPU may take for float32 (TF32).
    """

    conv: Convolution
    weight: Tensor  # at least float32

    @staticmethod
    def of(conv: Convolution) -> PresentWeight:
        weight = conv.weight.detach().flatten(2)
        return PresentWeight(conv, weight if weight.dtype == torch.float64 else weight.float())

    @staticmethod
    def _flat(table: Tensor, last: bool) -> Tensor:
        """(rows, input channels, kernel positions) -> (rows, P), the order of P being that of the weight's memory."""
        return (table.transpose(1, 2) if last else table).flatten(1)

    def linear(self, patches: Tensor) -> Tensor:
        """``<E[p], W> + b`` for each of ``patches`` (K, G, P): float64 (K, C)."""
        last, groups = channels_lie_last(self.weight), self.conv.groups
        wide = torch.float64 if patches.device.type != "cpu" else self.weight.dtype
        columns = self._flat(patches.reshape(-1, *self.weight.shape[1:]), last).view(patches.shape).transpose(0, 1)
        weight = self._flat(self.weight, last).unflatten(0, (groups, -1))
        with torch.autocast(patches.device.type, enabled=False):
            sums = columns.to(wide) @ weight.to(wide).transpose(1, 2)  # (G, K, C / G)
        sums = sums.transpose(0, 1).flatten(1).double()
        return sums if self.conv.bias is None else sums + self.conv.bias.detach().double()

    def products(self, slopes: Tensor) -> Tensor:
        """``<S, W>`` for the S of ``slopes``, (K * C, input channels, kernel positions): float64 (K, C)."""
        last = channels_lie_last(slopes)
        weight = self._flat(self.weight, last)
        table = self._flat(slopes, last).to(weight.dtype).unflatten(0, (-1, len(weight)))
        if slopes.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return (weight[:, None] @ table.permute(1, 2, 0))[:, 0].t().double()
        rows = Rows.of(weight[None])
        return torch.cat([product_sums(rows.match(each[None]), rows, None)[1] for each in table]).double()

    def remainder(self, before: Tensor, scatter: Tensor) -> Tensor:
        """``dW^T Cov(p, p) dW``, of second order, float64 (K - 1, C).

        Args:
            before: W of past iterations, (K - 1, C, P).
            scatter: their Cov(p, p), (K - 1, G * P, P).
        """
        groups = (self.conv.groups, -1)
        step = (self.weight.flatten(1) - before).unflatten(1, groups)
        with torch.autocast(scatter.device.type, enabled=False):
            return ((step @ scatter.unflatten(1, groups)) * step).sum(-1).flatten(1).double()
