"""Cross-Iteration BN: the statistics of the last iterations, corrected for how the weights have moved since.

When a forward is one of plain BN, of which past it takes the average, and which forwards it refuses; the past itself
is kept in :mod:`leakfree.norms.window`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from leakfree.errors import LeakfreeError
from leakfree.norms.moments import BatchMoments
from leakfree.norms.past import Past
from leakfree.norms.patches import Call
from leakfree.norms.present_weights import PresentWeight
from leakfree.norms.statistics import Moments
from leakfree.norms.window import Counter, WindowedBatchNorm
from leakfree.partition import Partition

__all__ = ["CrossIterationBatchNorm"]


class CrossIterationBatchNorm(WindowedBatchNorm):
    """CBN: a batch is normalized with its own moments and those of the last ``window - 1`` iterations, averaged.

    The moments of a past iteration are taken to the present weights of the convolution before the norm (its own
    only), by a first-order Taylor term::

        mean_j' = mean_j + rho * <dmean_j/dW, W - W_j>,    nu_j' = nu_j + rho * <dnu_j/dW, W - W_j>,    nu = E[y^2]
        mean = average of mean_j',    var = average of max(nu_j', mean_j'^2) - mean^2
        xhat = (y - mean) / sqrt(var + eps)

    The past is constant to the gradient, which flows through the batch's own share. In closed form, with p the
    patch of the input that the convolution sees, ``dmean_c/dW_c = E[p]`` and ``dnu_c/dW_c = 2 E[y_c p]``: a weight
    gradient. So a forward costs one of these on top of BN. The first-order mean is exact in W; nu is
    underestimated by ``dW^T E[p p^T] dW``, which ``moments="exact"`` adds.

    The norm must know the convolution: call :meth:`attach`, or :func:`attach_convolutions` on the model, after
    building or converting it. Only ``rho=0``, the window without compensation, goes without.
    The first ``burn_in`` training forwards are those of BN, and leave the window empty. After them every training
    forward is an iteration: with accumulated gradients each part of the batch is one. The buffers receive the moments
    of the current batch alone, and eval is that of BN.

    The window is in the state dict, so a resumed run continues with it. A checkpoint without one (of BN) empties it;
    when weights are changed by other means than steps of training, call :meth:`reset_window`. It is each
    rank's own: under DDP pass ``broadcast_buffers=False``, else every forward sends rank 0's to all.
    Inside a scope with base groups, each group is averaged with the same past, which is that of all groups pooled.
    Recomputed forwards (activation checkpointing) find their past again and are not iterations.

    Args:
        window: iterations averaged, the current one included; 1 is BN. (The authors' ``buffer_num`` + 1.)
        burn_in: training forwards of plain BN, counted by ``num_batches_tracked``; settable. The default is the
            authors' 8 of 12 epochs of COCO with 16 images a step: scale it to your run.
        rho: how much of the change of the weights is compensated for.
        guard: what is done with a variance that the compensation made negative, by channel: "max" takes 0 for it (the
            paper's ``max(nu, mean^2)``); "drop" leaves the iteration out of the average (the authors' code).
        moments: "taylor", or "exact": keeps ``Cov(p, p)``, P * P numbers for each group and iteration, so that nu
            is exact in W too. It costs about ``P / C`` more convolutions in a forward.
        ramp: "two_stage": the full window right after ``burn_in``; "linear": a window that grows from 1 to full
            until then.
        several_calls: allow training forwards before the backward of the last one. Each is an iteration: right for
            views of one batch or for pipelines, wrong for the levels of a pyramid, which differ in their statistics
            (attach a CBN of its own for each level to the shared convolution).

    Attributes:
        window_forwards: int64 (), iterations seen by the window since it was empty.
        window_mean, window_var: float64 (K - 1, C), moments of past batches, var biased, by order of writing.
        window_patch, window_slope: (K - 1, G, P), ``E[p]``, and ((K - 1) * C, input channels of a group, kernel
            positions), ``Cov(y_c, p)``, laid out in memory as the weight; float32, or float64 for a float64
            convolution. None before a convolution is attached, like those that follow.
        window_anchor: float64 (K - 1, 2, C), ``<E[p], W> + b`` and ``<Cov(y, p), W>`` at the time.
        window_scatter, window_weight: for "exact", (K - 1, G * P, P), ``Cov(p, p)``, and (K - 1, C, P), W.

    Raises:
        ValueError: an option out of its range.
        LeakfreeError: in a training forward: no convolution is attached, or not the one that made the input; a second
            forward before the backward of the last (unless ``several_calls``); groups that span ranks.

    A batch with a single value per channel has a defined answer once the window is in use; in the burn-in it is
    torch's error.

    Reference: Yao et al. 2021, "Cross-Iteration Batch Normalization" (arXiv 2002.05712), equations 3-8. Choices: eps
    inside the root (the authors' code adds it to the root); biased variance in the burn-in too; the bias of the
    convolution is compensated for like its weight; iterations weigh alike, whatever their number of rows.
    """

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 4,
        burn_in: int = 58_640,
        rho: float = 1.0,
        guard: str = "max",
        moments: str = "taylor",
        ramp: str = "two_stage",
        several_calls: bool = False,
        dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_features, window=window, rho=rho, guard=guard, moments=moments, dim=dim, **options)
        self._choose("ramp", ramp, ("two_stage", "linear"))
        if not self.track_running_stats:
            raise ValueError("CBN counts its burn-in in num_batches_tracked: track_running_stats must be True")
        self.burn_in = burn_in
        self.ramp = ramp
        self.several_calls = several_calls
        self._past = Past(type(self).__name__)
        self._last: weakref.ref[_Graph] | None = None  # the last training forward, until its graph is gone
        self._done = Counter()

    def extra_repr(self) -> str:
        own = ("window", "burn_in", "rho", "guard", "moments", "ramp")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)!r}" for name in own)])

    @property
    def burn_in(self) -> int:
        return self._burn_in

    @burn_in.setter
    def burn_in(self, forwards: int) -> None:
        if forwards != int(forwards) or forwards < 0:
            raise ValueError(f"burn_in must be a number of forwards, at least 0, got {forwards}")
        self._burn_in = int(forwards)

    @property
    def _is_plain(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a copy has no graph

    def _past_wanted(self, done: int) -> int:
        """Past iterations in the forward after ``done`` others."""
        if self.ramp == "linear" and self.burn_in:
            return min(self.window - 1, (self.window - 1) * (done + 1) // self.burn_in)
        return self.window - 1 if done >= self.burn_in else 0

    # ------------------------------------------------------------------------------- the forward

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        if self.window == 1 or not self.training or self._measured:
            return super()._normalize(x, partition, tracked)
        if partition.synchronized:
            raise LeakfreeError(
                f"{self._name}: the groups of this scope span ranks, but the window is each rank's own; let groups end "
                "where ranks do (images per rank a multiple of the images per group)"
            )
        call = None if self._tap is None else self._tap.take()
        if not x.numel():
            return super()._normalize(x, partition, tracked)
        if not tracked:  # recomputed: the window has moved on
            past = self._past.again(x)
            plain = past[0].ndim < 2
            return (
                super()._normalize(x, partition, False) if plain else self._averaged(BatchMoments(x, partition), past)
            )
        self._refuse_second_call()
        conv = self._source(call, x) if self.needs_convolution else None
        assert self.num_batches_tracked is not None
        done = self._done.read(self.num_batches_tracked)
        wanted = self._past_wanted(done)
        past = (self.window_mean.new_zeros(0),) * 3  # the mark of a plain batch norm
        if wanted:
            batch = BatchMoments(x, partition)
            count, mean, var = Moments(batch.count, batch.mean.detach(), batch.var.detach()).pooled()
            past = self._compensated(wanted, conv)
            self._push(x, mean, var, conv, None if call is None else call.input)
            self._update_running(count, mean, var)
            y = self._averaged(batch, past)
        else:
            y = super()._normalize(x, partition, tracked)
            if self._pushed.read(self.window_forwards):
                self.reset_window()  # what is in it will be too old when the burn-in ends
        self._done.know(self.num_batches_tracked, done + 1)
        graph = _Graph()
        if y.requires_grad:
            y.register_hook(graph)
            self._last = weakref.ref(graph)
        self._past.keep(x, past, graph)
        return y

    def _refuse_second_call(self) -> None:
        last = None if self._last is None else self._last()
        if last is not None and last.waits and not self.several_calls:
            raise LeakfreeError(
                f"{self._name}: a second training forward before the backward of the last one. A layer that runs over "
                "several inputs in an iteration, such as the levels of a pyramid, would mix them in its window: give "
                "each a CBN of its own, attached to the shared convolution. If they are of one kind (views of a "
                "batch), pass several_calls=True"
            )

    def _source(self, call: Call | None, x: Tensor) -> PresentWeight:
        """The convolution that made ``x`` in its last ``call``."""
        if self._tap is None:
            raise LeakfreeError(
                f"{self._name}: does not know the convolution before it, whose weights it compensates for; call "
                "leakfree.norms.attach_convolutions(model) or attach(conv) before training, or take rho=0"
            )
        if call is None:
            raise LeakfreeError(
                f"{self._name}: the convolution that it is attached to has not run since the layer's last forward; "
                "attach the one that makes its input, by attach(conv) or leakfree.norms.attach_convolutions(model)"
            )
        if not call.made(x):
            raise LeakfreeError(
                f"{self._name}: its input is not the last output of the convolution that it is attached to: it was "
                "changed in between, or comes from elsewhere; attach the convolution right before the layer"
            )
        return PresentWeight.of(self._tap.conv)

    def _averaged(self, batch: BatchMoments, past: tuple[Tensor, ...]) -> Tensor:
        """The batch normalized with its own moments averaged with those of the past."""
        share, past_mean, past_var = past
        total = 1 + share.sum(0)
        mean = (batch.mean + (share * past_mean).sum(0)) / total
        # The average of nu less the squared mean, without its cancellation.
        spread = past_var[:, None] + (past_mean[:, None] - mean).square()  # (iterations, groups of rows, C)
        var = (batch.var + (batch.mean - mean).square() + (share[:, None] * spread).sum(0)) / total
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -mean * scale
        return batch.affine(scale, shift if self.bias is None else shift + self.bias.double())


class _Graph:
    """A hook on a forward's result: it lives as long as the graph, and is told of the backward."""

    def __init__(self) -> None:
        self.waits = True

    def __call__(self, gradient: Tensor) -> None:
        self.waits = False
