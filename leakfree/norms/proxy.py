"""ProxyNorm: a norm of each sample by itself, its activation, and the channel's normalization after that.

LN and GN leave channels with means and variances of their own. Proxy Normalization removes them behind the
activation, by the statistics that the activation of a normal variable (the proxy) would have: no sample is asked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from leakfree.errors import ConfigError, choices
from leakfree.norms.activated_proxy import ProxyMoments, activated_proxy, normal_quantiles
from leakfree.norms.activations import ACTIVATIONS
from leakfree.norms.functional import is_transformed
from leakfree.norms.independent import check_groups, check_input
from leakfree.norms.proxied import ProxyNormalize, Settings
from leakfree.norms.proxied_activation import HasActivated
from leakfree.norms.traced import traced_call

__all__ = ["ACTIVATIONS", "ProxyNorm"]


class ProxyNorm(HasActivated):
    """ProxyNorm: ``(z - E) / sqrt(Var + eps)`` with ``z = phi(weight * Norm(x) + bias)``; norm and activation in one.

    Norm is LN or GN without an affine map, phi the activation: put this layer in the place of both. E and Var are the
    mean and the biased variance of ``phi(weight * Y + bias)`` of each channel, with Y normal of mean ``proxy_shift``
    and standard deviation ``1 + proxy_scale``, at ``num_points`` quantiles of it; gradients go through them to all four
    parameters (C,). At first weight is 1 and the others are 0. The same in training and in eval; nothing leaks.

    E and Var are functions of the parameters alone: they and their derivatives are computed once for each value of the
    parameters, so once in an optimizer step, however many forwards it has. On the CPU the values are compared; as that
    would wait for another device, there they are computed in each forward of training and kept in eval as long as
    no parameter changes in place (a change through ``.data`` is not seen until the mode is set again).

    Weight decay is for ``proxy_shift`` and ``proxy_scale`` only, as the authors have it: see :meth:`proxy_parameters`.

    Input (N, C, *) of any floating dtype, the output like it; computed in float32 (float64 for float64 data), so exact
    to about 1e-7 of |mean| / std of a sample, as torch's group norm.
    Compiled, exported or under torch.func, the layer is plain operations of torch.

    Args:
        norm: "LN", over all values of a sample, or "GN".
        num_groups: of GN; must divide ``num_features``. None = 32 (the paper's number is not known).
        activation: one of :data:`ACTIVATIONS`.
        num_points: of the quadrature, the authors' 200.
        eps: beside the proxy's variance, the authors' 0.03: it keeps channels that are almost dead from exploding.
        norm_eps: beside the variance of Norm.

    Raises:
        ConfigError: an unknown norm or activation, groups that do not divide the channels.
        LeakfreeError: another number of channels, or a single value for each mean.

    Reference: Labatie et al. 2021 (arXiv 2106.03743), section 4 and equations 5-7; quadrature and eps as in the
    authors' code.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        norm: str = "LN",
        num_groups: int | None = None,
        activation: str = "relu",
        num_points: int = 200,
        eps: float = 0.03,
        norm_eps: float = 1e-5,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("LN", "GN"):
            raise ConfigError(f"ProxyNorm: unknown norm={norm!r}; choose from LN, GN")
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"ProxyNorm: unknown activation={activation!r}; choose from {choices(activation, ACTIVATIONS)}"
            )
        if norm == "LN" and num_groups not in (None, 1):
            raise ConfigError(f"ProxyNorm: num_groups={num_groups} is for norm='GN'; LN has one group")
        if num_points < 2:
            raise ConfigError(f"ProxyNorm: num_points must be at least 2, got {num_points}")
        self.num_groups = 1 if norm == "LN" else 32 if num_groups is None else num_groups
        check_groups("ProxyNorm", num_features, self.num_groups)
        self.num_features = num_features
        self.norm = norm
        self.activation = activation
        self.num_points = num_points
        self.eps = eps
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.proxy_scale = nn.Parameter(torch.zeros(num_features))
        self.proxy_shift = nn.Parameter(torch.zeros(num_features))
        self._known: ProxyMoments | None = None

    def extra_repr(self) -> str:
        groups = f", num_groups={self.num_groups}" if self.norm == "GN" else ""
        return f"{self.num_features}, norm={self.norm}{groups}, activation={self.activation}, eps={self.eps}"

    def proxy_parameters(self) -> list[nn.Parameter]:
        """``proxy_shift`` and ``proxy_scale``: those that weight decay is for; weight and bias go without."""
        return [self.proxy_shift, self.proxy_scale]

    def proxy_moments(self) -> tuple[Tensor, Tensor]:
        """E and Var of the activated proxy, (C,) each, without gradient: y is ``(z - E) * rsqrt(Var + eps)``."""
        proxy = self._proxy(torch.float64 if self.weight.dtype == torch.float64 else torch.float32)
        return proxy.mean.clone(), proxy.var.clone()

    def proxy_map(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) of ``y = z * scale + shift``, (C,) each, without gradient."""
        proxy = self._proxy(torch.float64 if self.weight.dtype == torch.float64 else torch.float32)
        return proxy.scale.clone(), proxy.shift.clone()

    def train(self, mode: bool = True) -> ProxyNorm:
        self._known = None
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        values = self.num_features // self.num_groups * input.shape[2:].numel()
        check_input("ProxyNorm", input, self.num_features, values, "use LN, or fewer groups")
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
            return self._plain(input)
        proxy = self._proxy(_wide(input))
        settings = Settings(ACTIVATIONS[self.activation], self.num_groups, self.norm_eps)
        y: Tensor = ProxyNormalize.apply(
            input, self.weight, self.bias, self.proxy_scale, self.proxy_shift, proxy, settings
        )
        return y

    def _plain(self, x: Tensor) -> Tensor:
        """The definition, one operation for each step: for compilers, which fuse them."""
        phi, wide = ACTIVATIONS[self.activation].apply, _wide(x)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        weight, bias, scale, shift = self._parameters_in(wide)
        y = F.group_norm(x.to(wide), self.num_groups, eps=self.norm_eps)
        z = phi(weight.view(shape) * y + bias.view(shape))
        points = (1 + scale)[:, None] * normal_quantiles(self.num_points, weight) + shift[:, None]
        response = phi(weight[:, None] * points + bias[:, None])
        mean, var = response.mean(1), response.var(1, unbiased=False)
        return ((z - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)).to(x.dtype)

    def _parameters_in(self, dtype: torch.dtype) -> list[Tensor]:
        bias = torch.zeros_like(self.weight) if self.bias is None else self.bias
        return [tensor.to(dtype) for tensor in (self.weight, bias, self.proxy_scale, self.proxy_shift)]

    @torch.no_grad()
    def _proxy(self, dtype: torch.dtype) -> ProxyMoments:
        """The moments of the activated proxy, from the last time if the parameters are those of then."""
        values = torch.stack(self._parameters_in(dtype))
        if values.device.type == "cpu":
            version, known = None, self._known
        else:
            parameters = list(self.parameters(recurse=False))
            untold = self.training or any(tensor.is_inference() for tensor in parameters)  # these have no version
            version = None if untold else tuple((tensor._version, tensor.data_ptr()) for tensor in parameters)
            known = None if untold else self._known
        if torch.is_inference_mode_enabled():  # what is made there may not meet a gradient later
            return activated_proxy(values, version, ACTIVATIONS[self.activation], self.num_points, self.eps)
        if known is not None and known.values.dtype == dtype and known.values.device == values.device:
            same = torch.equal(known.values, values) if version is None else known.version == version
            if same:
                return known
        self._known = activated_proxy(values, version, ACTIVATIONS[self.activation], self.num_points, self.eps)
        return self._known


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
