"""GN, LN, IN, PN: norms that treat each sample by itself, so that nothing leaks between samples.

All are the same in training and in eval and keep no statistics. They differ in which values of one sample share
a mean and a biased variance: those of a group of channels (GN), of all channels (LN), of one channel (IN), or of
one position (PN, and LN with ``per_position``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms.traced import traced_call

__all__ = ["GroupNorm", "InstanceNorm", "LayerNorm", "PositionalNorm", "check_groups", "check_input"]


def check_groups(name: str, num_features: int, num_groups: int) -> None:
    """Refuse a number of channel groups that does not divide the channels."""
    if num_groups < 1 or num_features % num_groups:
        divisors = [str(n) for n in range(1, num_features + 1) if num_features % n == 0]
        raise ConfigError(
            f"{name}: num_groups={num_groups} does not divide {num_features} channels; use one of {', '.join(divisors)}"
        )


def check_input(name: str, x: Tensor, num_features: int, values: int, advice: str) -> None:
    """Refuse an input that is not (N, num_features, *) of a floating dtype, or a single value (``values``) a mean."""
    if not x.is_floating_point():
        raise LeakfreeError(f"{name} expects floating point numbers, got {x.dtype}")
    if x.ndim < 2 or x.shape[1] != num_features:
        raise LeakfreeError(f"{name} expects (N, {num_features}, *), got {tuple(x.shape)}")
    if values == 1:
        raise LeakfreeError(
            f"{name}: in an input {tuple(x.shape)} each mean is of a single value, so that all would become 0; {advice}"
        )


class GroupNorm(nn.GroupNorm):
    """GN: channel groups of one sample share statistics; batch independent.

    Input (N, C, *) of any floating dtype, the output like it.

    Args:
        num_groups: must divide ``num_features``; 32 is the paper's. 1 is LN.

    Raises:
        ConfigError: ``num_groups`` does not divide ``num_features``.
        LeakfreeError: another number of channels, or a single value for each group.

    Reference: Wu & He 2018, equations 1-7.
    """

    def __init__(
        self, num_features: int, *, num_groups: int = 32, dim: int | None = None, eps: float = 1e-5, affine: bool = True
    ) -> None:
        check_groups("GN", num_features, num_groups)
        super().__init__(num_groups, num_features, eps, affine)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        self._check(input, "GN", "use fewer groups")
        return super().forward(input)

    def _check(self, x: Tensor, name: str, advice: str) -> None:
        positions = x.shape[2:].numel()
        check_input(name, x, self.num_channels, self.num_channels // self.num_groups * positions, advice)


class LayerNorm(GroupNorm):
    """LN: all values of one sample share statistics (C and positions), and each channel has a weight and a bias.

    With ``per_position`` the channels of one position share them: the LayerNorm of transformers, ConvNeXt's "LN2d".
    For inputs (N, C) both are ``nn.LayerNorm(C)``.

    Args:
        per_position: statistics of each position by itself.
        eps: inside the root; None = 1e-5, or 1e-6 with ``per_position`` (ConvNeXt's).

    Raises:
        LeakfreeError: another number of channels, or a single value for each mean.

    Reference: Ba et al. 2016, equations 3-4; Wu & He 2018, section 3.1 for convolutions; Liu et al. 2022 (ConvNeXt).
    """

    def __init__(
        self,
        num_features: int,
        *,
        per_position: bool = False,
        dim: int | None = None,
        eps: float | None = None,
        affine: bool = True,
    ) -> None:
        eps = eps if eps is not None else 1e-6 if per_position else 1e-5
        super().__init__(num_features, num_groups=1, eps=eps, affine=affine)
        self.per_position = per_position

    def extra_repr(self) -> str:
        return f"{self.num_channels}, per_position={self.per_position}, eps={self.eps}, affine={self.affine}"

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        name = "PN" if isinstance(self, PositionalNorm) else "LN"
        if not self.per_position:
            self._check(input, name, "give it more channels")
            return nn.GroupNorm.forward(self, input)
        check_input(name, input, self.num_channels, self.num_channels, "give it more channels")
        y = F.layer_norm(input.movedim(1, -1), (self.num_channels,), self.weight, self.bias, self.eps).movedim(-1, 1)
        return y.contiguous() if input.is_contiguous() else y


class PositionalNorm(LayerNorm):
    """PN: the channels of one position of one sample share statistics. (Not Proxy Normalization.)

    Args:
        affine: whether each channel has a weight and a bias; the paper's layer has none.

    Raises:
        LeakfreeError: another number of channels, or a single channel.

    Reference: Li et al. 2019, "Positional Normalization", equations 1-3. Choices: biased variance (the authors' code
    divides by C - 1); eps inside the root; the moments are not passed on ("moment shortcut").
    """

    def __init__(self, num_features: int, *, dim: int | None = None, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__(num_features, per_position=True, eps=eps, affine=affine)


class InstanceNorm(GroupNorm):
    """IN: the positions of one channel of one sample share statistics.

    Args:
        affine: whether each channel has a weight and a bias; torch's default is none.

    Raises:
        LeakfreeError: an input (N, C) or of one position, which has nothing to share; another number of channels.

    Reference: Ulyanov et al. 2016, equation 4. No running statistics, as torch's default.
    """

    def __init__(self, num_features: int, *, dim: int | None = None, eps: float = 1e-5, affine: bool = False) -> None:
        super().__init__(num_features, num_groups=num_features, eps=eps, affine=affine)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        self._check(input, "IN", "IN needs several positions: use LN or GN")
        return nn.GroupNorm.forward(self, input)
