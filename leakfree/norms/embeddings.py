"""BN embeddings: a sample of an unknown domain is predicted by a mixture of the known ones.

Every DomainBN layer is a space in which a domain is a point, its population statistics, and a sample is one
too, its own statistics. Near domains weigh more.

Legend: D domains, N samples, K outputs, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.errors import LeakfreeError
from leakfree.keeping import attributes_kept
from leakfree.norms.domains import Key, domain
from leakfree.norms.per_domain import DomainBatchNorm

__all__ = ["BatchNormEmbeddings", "DomainMixture"]

_TINY = 1e-8  # added to a distance, whose inverse is a weight
_SMALLEST = 1e-20  # W_l below which its root has no gradient


@dataclass(frozen=True)
class DomainMixture:
    """The predictions for N samples.

    Attributes:
        prediction: (N, K), the mixture: log-probabilities, or logits with ``mix="logits"``.
        weights: (N, D), of the domains; they add up to 1.
        distances: (N, D), from each sample to each domain.
        outputs: (D, N, K), of the model in each domain.
        own: (N, K), of the model with each sample in its own domain and the statistics of the batch; None outside
            training.
    """

    prediction: Tensor
    weights: Tensor
    distances: Tensor
    outputs: Tensor
    own: Tensor | None = None


class BatchNormEmbeddings(nn.Module):
    """Runs ``model`` once in each domain and mixes the predictions by the distance of the sample to the domain.

    ``distance(x, d) = sum_l W_l`` over the calls of DomainBN layers that keep running statistics of each domain, with
    the Wasserstein distance between diagonal Gaussians, ``W_l = |m_x - m_d|^2 + |s_x - s_d|^2``: means and standard
    deviations of the sample's own map, (C,), in the forward in domain d, and of the domain's running
    statistics. ``weight_d = (1 / distance_d) / sum_e (1 / distance_e)``, ``prediction = sum_d weight_d * f_d(x)``.

    Eval: D forwards, nothing of the batch is shared, and no domain is asked for.
    Train: ``forward(x, domains)`` with int64 (N,), the domain of each sample, first runs the mixed batch as the model
    is trained (batch statistics of each domain, running statistics updated once), then in each domain with
    the updated statistics as constants; for a sample's own domain the first of these is mixed in. D + 1 forwards.
    Train with the cross-entropy of ``prediction``, which takes log-probabilities as well as logits, and of ``own``
    (see :meth:`mixture`) if wanted. Gradients go through predictions and weights, not into running statistics.
    Batch norms without domains use their running statistics in all but the first forward.

    Runs eagerly, parts that were compiled too. Do not checkpoint activations inside: the D forwards differ in the mode
    of their norms.

    Args:
        model: maps what :meth:`forward` gets to (N, K) logits.
        domains: indices or names of those to mix; None = all.
        root: take the root of each W_l before the sum.
        scale: "sum" over channels, or "mean", so that layers with many channels do not outweigh the others.
        mix: "probabilities" (softmax of the logits) or "logits".
        single_values: what maps of a single value, which have no variance, count as: "skip" or "mean" (only the means).

    Attributes:
        domains: indices of the mixed domains.

    Raises:
        LeakfreeError: no DomainBN with statistics of each domain, layers of different numbers of domains, or no
            domain; in a forward: samples of no mixed domain, outputs other than (N, K), or no layer with a distance.
        ValueError: an option out of its range.

    Reference: Segu et al. 2020, "Batch Normalization Embeddings for Deep Domain Generalization", sections 3.2 and 3.3.
    Choices, as the paper is not clear there: squared distances, summed and not scaled; probabilities are mixed;
    the sample's statistics are taken in each domain's own forward; standard deviations include eps in the root;
    the mixture in training as above.

    Example:
        >>> mixed = BatchNormEmbeddings(model)                                # doctest: +SKIP
        >>> loss = F.cross_entropy(mixed(images, domains), labels)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        domains: Sequence[Key] | None = None,
        root: bool = False,
        scale: str = "sum",
        mix: str = "probabilities",
        single_values: str = "skip",
    ) -> None:
        super().__init__()
        for option, value, valid in (
            ("scale", scale, ("sum", "mean")),
            ("mix", mix, ("probabilities", "logits")),
            ("single_values", single_values, ("skip", "mean")),
        ):
            if value not in valid:
                raise ValueError(f"{option} must be {' or '.join(map(repr, valid))}, got {value!r}")
        self.model = model
        self.root, self.scale, self.mix, self.single_values = root, scale, mix, single_values
        layers = self._layers()
        if not layers:
            raise LeakfreeError(
                "BatchNormEmbeddings: the model has no DomainBN with running statistics of each domain; "
                'convert it first: convert_norms(model, "DomainBN", num_domains=...)'
            )
        sizes = {layer.num_domains for layer in layers}
        if len(sizes) > 1:
            raise LeakfreeError(f"BatchNormEmbeddings: the layers have different numbers of domains: {sorted(sizes)}")
        keys = range(layers[0].num_domains) if domains is None else domains
        self.domains = tuple(layers[0].index_of(key) for key in keys)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise LeakfreeError(f"BatchNormEmbeddings: domains must be one or more different ones, got {list(keys)}")

    def extra_repr(self) -> str:
        return f"domains={self.domains}, root={self.root}, scale={self.scale!r}, mix={self.mix!r}"

    def forward(self, input: Any, domains: Tensor | None = None) -> Tensor:
        """The mixed prediction (N, K); see :meth:`mixture`."""
        return self.mixture(input, domains).prediction

    @torch.compiler.disable  # hooks and modes that change between forwards
    def mixture(self, input: Any, domains: Tensor | None = None) -> DomainMixture:
        """The mixed prediction and what it is made of.

        Args:
            input: what the model takes.
            domains: int64 (N,), the domain of each sample, in training mode; ignored in eval.
        """
        own = None
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.training:
                own = self._own(input, domains)
            with self._stored_statistics():
                found = [self._in_domain(input, index) for index in self.domains]
        outputs = torch.stack([output for output, _ in found])
        distances = torch.stack([distance for _, distance in found], 1)
        inverse = (distances + _TINY).reciprocal()
        weights = inverse / inverse.sum(1, keepdim=True)
        mixed = outputs
        if own is not None and domains is not None:
            of_sample = torch.tensor(self.domains, device=outputs.device)[:, None] == domains.to(outputs.device)
            mixed = torch.where(of_sample[..., None], own, outputs)
        return DomainMixture(self._mix(mixed, weights), weights, distances, outputs, own)

    def _layers(self) -> list[DomainBatchNorm]:
        layers = [layer for layer in self.model.modules() if isinstance(layer, DomainBatchNorm)]
        return [layer for layer in layers if layer.running_mean is not None and layer.running_mean.ndim == 2]

    def _own(self, input: Any, domains: Tensor | None) -> Tensor:
        if domains is None:
            raise LeakfreeError(
                "BatchNormEmbeddings: training needs `domains`, int64 (N,), the domain of each sample; "
                "call .eval() to predict samples of unknown domains"
            )
        strangers = set(domains.unique().tolist()) - set(self.domains)
        if strangers:
            raise LeakfreeError(f"BatchNormEmbeddings: samples of domain {min(strangers)}, not one of {self.domains}")
        with domain(domains):
            return self._checked(self.model(input))

    def _in_domain(self, input: Any, index: int) -> tuple[Tensor, Tensor]:
        """The output (N, K) with the statistics of a domain, and the distances (N,) to it."""
        parts: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self._layers():
                hook = self._measure(index, parts)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            with domain(index):
                output = self._checked(self.model(input))
        if not parts:
            raise LeakfreeError(
                "BatchNormEmbeddings: no DomainBN layer ran on maps of more than one value, so samples have no "
                'statistics; use single_values="mean"'
            )
        return output, torch.stack(parts).sum(0)

    def _measure(self, index: int, parts: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def measure(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(layer, DomainBatchNorm)
            distance = self._distance(layer, args[0] if args else kwargs["input"], index)
            if distance is not None:
                parts.append(distance)

        return measure

    def _distance(self, layer: DomainBatchNorm, input: object, index: int) -> Tensor | None:
        """W_l (N,) between the samples and a domain; None where it is skipped."""
        if not isinstance(input, Tensor):
            raise LeakfreeError("BatchNormEmbeddings: a DomainBN that takes levels has no distance to one domain")
        assert layer.running_mean is not None
        assert layer.running_var is not None
        values = input.flatten(2) if input.ndim > 2 else input[..., None]
        if values.shape[2] < 2 and self.single_values == "skip":
            return None
        values = values if values.dtype == torch.float64 else values.float()
        if not len(values):
            return values.new_zeros(0)
        var, mean = torch.var_mean(values, 2, correction=0)
        squared = (mean - layer.running_mean[index].detach().to(mean)).square()
        if values.shape[2] > 1:
            std = (layer.running_var[index].detach().to(mean) + layer.eps).sqrt()
            squared = squared + ((var + layer.eps).sqrt() - std).square()
        distance = squared.sum(1) if self.scale == "sum" else squared.mean(1)
        return distance.clamp(min=_SMALLEST).sqrt() if self.root else distance

    @contextmanager
    def _stored_statistics(self) -> Iterator[None]:
        """Inside, batch norms normalize with their running statistics and leave them alone; dropout goes on."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        with attributes_kept(norms, "training"):
            for norm in norms:
                norm.training = False
            yield

    @staticmethod
    def _checked(output: Any) -> Tensor:
        if isinstance(output, Tensor) and output.ndim == 2:
            return output
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise LeakfreeError(f"BatchNormEmbeddings: the model must return logits (N, K), got {got}")

    def _mix(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """(D, N, K) and (N, D) -> (N, K)."""
        weights = weights.t()[..., None]
        if self.mix == "logits":
            return (outputs * weights.to(outputs)).sum(0)
        return (outputs.log_softmax(2) + weights.log().to(outputs)).logsumexp(0)
