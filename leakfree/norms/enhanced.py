"""Instance Enhancement Batch Normalization: a batch norm whose scale each sample sets for itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakfree.errors import LeakfreeError
from leakfree.norms.moments import BatchMoments
from leakfree.norms.partitioned import BatchNorm
from leakfree.norms.statistics import spread_groups
from leakfree.partition import Partition

__all__ = ["InstanceEnhancementBatchNorm"]


class InstanceEnhancementBatchNorm(BatchNorm):
    """IEBN: ``y = weight * delta * xhat + bias`` with the gate ``delta = sigmoid(gate_weight * a + gate_bias)``.

    ``a`` (N, C) is the mean over the positions of the raw input, before it is normalized, so each sample has a gate
    for each channel. ``xhat`` is BN's, with BN's running statistics in eval; the gate is the sample's own in both
    modes. The bias is not gated. Batch statistics are shared as in BN, and leak as those do.
    Initially every gate is sigmoid(-1) = 0.2689: the layer is a BN with its weight scaled by that.

    ``convert_norms`` to IEBN keeps weight, bias and buffers, and starts with the initial gate; the way back drops the
    gate, so it changes outputs. The layer cannot be folded into a convolution.

    Args:
        num_features, dim, eps, momentum, affine, track_running_stats: as for the other batch norms; the gate is
            there without ``affine`` too.

    Attributes:
        gate_weight, gate_bias: Parameters (C,), initially 0 and -1.

    Reference: Liang et al. 2020, "Instance Enhancement Batch Normalization" (arXiv 1908.04008); where and how the gate
    is applied as in the authors' code.
    """

    def __init__(self, num_features: int, *, dim: int | None = None, **options: object) -> None:
        super().__init__(num_features, dim=dim, **options)  # type: ignore[arg-type]
        self.gate_weight = nn.Parameter(torch.empty(num_features))
        self.gate_bias = nn.Parameter(torch.empty(num_features))
        self._reset_gate()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "gate_bias" in self._parameters:  # torch's constructor calls this first
            self._reset_gate()

    def _reset_gate(self) -> None:
        nn.init.zeros_(self.gate_weight)
        nn.init.constant_(self.gate_bias, -1.0)

    @property
    def _is_plain(self) -> bool:
        return False

    def _gate(self, instance_mean: Tensor) -> Tensor:
        """(N, C) in the dtype of ``instance_mean``."""
        return torch.sigmoid(
            self.gate_weight.to(instance_mean.dtype) * instance_mean + self.gate_bias.to(instance_mean.dtype)
        )

    def _map(self, gate: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (N, C) of each row from its gate and statistics, (N or 1, C) or (C,), in their dtype."""
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.to(gate.dtype)
        scale = gate * scale
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias.to(gate.dtype)

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        self._refuse_single_value(x, partition)
        batch = BatchMoments(x, partition, instances=True)
        assert batch.instance_mean is not None
        if tracked:
            self._update_running(*batch.pooled())
        rows = spread_groups(partition.groups, torch.float64, batch.mean, batch.var)
        return batch.affine(*self._map(self._gate(batch.instance_mean), *rows), of_rows=True)

    def _forward_running(self, x: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            raise LeakfreeError(f"{type(self).__name__}: frozen, but it keeps no running statistics")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        positions = tuple(range(2, x.ndim))
        gate = self._gate(x.mean(positions, dtype=wide) if positions else x.to(wide))
        scale, shift = (
            table.view(*table.shape, *[1] * len(positions))
            for table in self._map(gate, self.running_mean.to(wide), self.running_var.to(wide))
        )
        return torch.addcmul(shift, x, scale).to(x.dtype)
