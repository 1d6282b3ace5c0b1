"""DomainBN: the rows of one domain share statistics, and every domain has running statistics of its own.

Which domain the rows of a forward are from is said by :func:`leakfree.norms.domain`.

Legend: D domains, N rows, C channels, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from leakfree.distributed import Group
from leakfree.errors import LeakfreeError, choices
from leakfree.norms.domains import NO_ROWS, Given, Key, Levels, Rows, current_domain, domain, given_domain
from leakfree.norms.partitioned import BatchNorm, PartitionedBatchNorm, State
from leakfree.norms.statistics import partitioned_batch_norm
from leakfree.norms.traced import traced_call
from leakfree.partition import Partition
from leakfree.recomputation import Replay, recomputing

__all__ = ["DomainBatchNorm"]


@dataclass(frozen=True)
class _DomainPartition(Partition):
    """A partition that also tells the domains, which need not be its groups."""

    domains: Rows | Levels = NO_ROWS


class DomainBatchNorm(PartitionedBatchNorm):
    """DomainBN: the rows of one domain share statistics; each domain has its own running statistics.

    Equals D batch norms, each run on the rows of its domain. :func:`domain` says which those are. Three
    choices are free of each other: training statistics, running statistics (both below) and the affine map.

    ============ ============= ========================================================================
    training     running       in a RetinaNet head over five levels (Wu & Johnson 2021, Tables 4 and 5)
    ============ ============= ========================================================================
    "shared"     "shared"      all levels are one batch, in training and in inference
    "shared"     "domain"      inconsistent: inference knows the levels, training does not
    "domain"     "shared"      inconsistent: what one BN does that is called for each level in turn
    "domain"     "domain"      each level by itself, in training and in inference; the default
    ============ ============= ========================================================================

    Training statistics are shared among the rows of *one* call: a mixed batch, or the levels of a
    mapping ``{domain: (N, C, *_d)}``, which may differ in ``*`` and come back as ``{domain: y_d}``. A mapping
    names the domains by itself; with ``train_statistics="shared"`` its levels, of equal N, are
    normalized as if laid side by side in space, else each as in a call of its own.

    Train: a domain's running statistics get its own moments, counted in its own ``num_batches_tracked``;
    a domain without rows keeps all three. Shared ones get the pooled moments of a call.
    Eval: every row is normalized with the statistics of its domain.
    No domain need be said where nothing depends on it.

    Args:
        num_domains: D.
        domain_names: D names, another way to say a domain; otherwise only indices are known.
        train_statistics, running_statistics: "domain" or "shared".
        affine: "shared" (or True), one weight and bias (C,) for all; "separate", (D, C), one of each
            domain; False, none.
        across_ranks: the rows of a domain meet over all ranks, as in SyncBN: equal to one process, also
            where a rank has no rows, or other domains than the rest. Then every rank runs the layer
            equally often (with mappings of the same domains), and needs a gradient if any does.
        process_group: the ranks to meet; "node" for those of this machine.
        dim, eps, momentum, track_running_stats: as for the other batch norms. ``momentum=None`` averages
            the forwards that had rows of the domain.

    Attributes:
        running_mean, running_var: (D, C), or (C,) if shared; ``num_batches_tracked``: int64 (D,), or ().

    Raises:
        ValueError: an option out of its range, or input of another rank or channel count than promised.
        LeakfreeError: no domain is said, one that the layer does not have, or as many as other rows; in a
            recomputation, a forward whose domain cannot be found again.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_domains: int,
        domain_names: Sequence[str] | None = None,
        train_statistics: str = "domain",
        running_statistics: str = "domain",
        affine: bool | str = "shared",
        across_ranks: bool = False,
        process_group: Group = None,
        dim: int | None = None,
        **options: object,
    ) -> None:
        super().__init__(num_features, dim=dim, affine=affine is not False, **options)  # type: ignore[arg-type]
        if num_domains < 1:
            raise ValueError(f"num_domains must be at least 1, got {num_domains}")
        names = None if domain_names is None else tuple(domain_names)
        if names is not None and (len(set(names)) != num_domains or len(names) != num_domains):
            raise ValueError(f"domain_names must be {num_domains} different names, got {list(names)}")
        for option, value in (("train_statistics", train_statistics), ("running_statistics", running_statistics)):
            if value not in ("domain", "shared"):
                raise ValueError(f"{option} must be 'domain' or 'shared', got {value!r}")
        if affine not in (True, False, "shared", "separate"):
            raise ValueError(f"affine must be 'shared', 'separate' or a bool, got {affine!r}")
        self.num_domains = num_domains
        self.domain_names = names
        self.train_statistics = train_statistics
        self.running_statistics = running_statistics
        self.separate_affine = affine == "separate"
        self.across_ranks = across_ranks
        self.process_group = process_group
        self._said: Replay[Rows] = Replay(type(self).__name__, Rows.same_as)
        if self.separate_affine:
            self.weight = nn.Parameter(torch.ones(num_domains, num_features))
            self.bias = nn.Parameter(torch.zeros(num_domains, num_features))
        if self._separate_running:
            self.register_buffer("running_mean", torch.zeros(num_domains, num_features))
            self.register_buffer("running_var", torch.ones(num_domains, num_features))
            self.register_buffer("num_batches_tracked", torch.zeros(num_domains, dtype=torch.int64))

    def extra_repr(self) -> str:
        own = {
            "num_domains": self.num_domains,
            "train_statistics": self.train_statistics,
            "running_statistics": self.running_statistics,
            "separate_affine": self.separate_affine,
            "across_ranks": self.across_ranks,
        }
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in own.items())])

    @property
    def communicates(self) -> bool:
        """Whether training forwards exchange statistics, so that all ranks must keep in step."""
        return self.across_ranks

    @property
    def _separate_running(self) -> bool:
        return self.track_running_stats and self.running_statistics == "domain"

    # ------------------------------------------------------------------------------- which domain

    def index_of(self, key: Key) -> int:
        """The index of a domain given by index or name; a LeakfreeError if there is none."""
        names = self.domain_names
        if isinstance(key, str):
            if names is None:
                raise LeakfreeError(
                    f"{type(self).__name__}: domain {key!r} is a name, but the layer has no domain_names; "
                    f"give an index from 0 to {self.num_domains - 1}"
                )
            if key not in names:
                raise LeakfreeError(f"{type(self).__name__}: no domain {key!r}; choose from {choices(key, names)}")
            return names.index(key)
        self._check_range(key, key)
        return key

    def label_of(self, index: int) -> str:
        return str(index) if self.domain_names is None else self.domain_names[index]

    def _check_range(self, low: int, high: int) -> None:
        if low < 0 or high >= self.num_domains:
            raise LeakfreeError(
                f"{type(self).__name__}: domain {low if low < 0 else high} is out of range; "
                f"the layer has {self.num_domains} domains, from 0 to {self.num_domains - 1}"
            )

    def _domains(self, x: Tensor) -> Rows | Levels:
        """The domains of the rows of ``x``, from the context or, in a recomputation, from the first forward."""
        given = current_domain()
        if recomputing() and (given is None or not given.in_backward):
            return self._domains_before(x)
        domains = self._domains_said(x)
        if isinstance(domains, Levels):
            return domains  # a recomputation says them again
        if not len(x):
            return NO_ROWS
        if not torch.is_inference_mode_enabled():
            self._said.remember(x, replace(domains), graph=domains)
        return domains

    def _domains_said(self, x: Tensor) -> Rows | Levels:
        given = current_domain()
        if given is None:
            raise LeakfreeError(
                f"{type(self).__name__}: the domain of the rows is not known; run the forward inside "
                "`with leakfree.norms.domain(k):`, where k is the index"
                + ("" if self.domain_names is None else f" or name ({', '.join(self.domain_names)})")
                + f" of one of the {self.num_domains} domains, or int64 (N,), one index for each row"
            )
        if isinstance(given.key, Levels):
            return given.key
        if given.key is not None:
            return Rows(index=self.index_of(given.key))
        assert given.ids is not None
        if len(given.ids) != len(x):
            raise LeakfreeError(
                f"{type(self).__name__}: the domains of {len(given.ids)} rows are given, but the input has {len(x)}"
            )
        self._check_range(*given.bounds())
        return Rows(ids=given.on(x.device))

    def _domains_before(self, x: Tensor) -> Rows:
        if not len(x):
            return NO_ROWS
        inside = "open `with domain(...)` inside the checkpointed function"
        try:
            before = self._said.recall(x)
        except RuntimeError as error:
            raise LeakfreeError(
                f"{type(self).__name__}: forwards on the same input but in different domains wait for their "
                f"recomputation, where they cannot be told apart; {inside}"
            ) from error
        if before is None:
            raise LeakfreeError(
                f"{type(self).__name__}: this forward runs inside a backward, but its input is that of no recent "
                f"forward, so its domain cannot be found again; {inside}"
            )
        return before

    # ------------------------------------------------------------------------------- the forward

    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    @overload
    def forward(self, input: Mapping[Key, Tensor]) -> dict[Key, Tensor]: ...
    @torch.compiler.disable  # a compiler would take the domain of one call for a constant
    def forward(self, input: Tensor | Mapping[Key, Tensor]) -> Tensor | dict[Key, Tensor]:
        if isinstance(input, fx.Proxy):
            return traced_call(self, input)
        if not isinstance(input, Mapping):
            return super().forward(input)
        indices, levels = self._indices(input), list(input.values())
        if self.train_statistics == "shared" and self._takes_batch_statistics:
            return dict(zip(input, self._forward_together(indices, levels), strict=True))
        outputs = []
        for index, level in zip(indices, levels, strict=True):
            with domain(index):
                outputs.append(super().forward(level))
        return dict(zip(input, outputs, strict=True))

    def _indices(self, levels: Mapping[Key, Tensor]) -> list[int]:
        indices = [self.index_of(key) for key in levels]
        if len(set(indices)) < max(1, len(indices)):
            raise LeakfreeError(
                f"{type(self).__name__}: expected a tensor for each of some domains, got {list(levels) or 'none'}"
            )
        return indices

    def _forward_together(self, indices: list[int], levels: list[Tensor]) -> list[Tensor]:
        """The levels side by side in space, as one tensor (N, C, S, 1...)."""
        for level in levels:
            self._check_input_dim(level)
        if len({len(level) for level in levels}) > 1:
            raise LeakfreeError(
                f"{type(self).__name__}: levels that share training statistics need the same number of rows, got "
                f"{', '.join(str(tuple(level.shape)) for level in levels)}"
            )
        flat = [level.flatten(2) if level.ndim > 2 else level[:, :, None] for level in levels]
        sizes = [level.shape[2] for level in flat]
        together = torch.cat(flat, 2)
        together = together.view(*together.shape, *[1] * (levels[0].ndim - 3))
        with given_domain(Given(Levels(tuple(indices), tuple(sizes)))):
            y = super().forward(together)
        # Copies: parts of one tensor could not be changed in place (ReLU).
        parts = zip(y.flatten(2).split(sizes, 2), levels, strict=True)
        return [part.view(level.shape).clone(memory_format=_memory_format(level)) for part, level in parts]

    def _partition(self, x: Tensor, again: bool) -> Partition:
        return self.partition(x)  # a recomputed forward finds its domains again, hence its groups

    def partition(self, x: Tensor) -> Partition:
        return self._grouped(x, Partition(across_ranks=self.across_ranks, process_group=self.process_group))

    def _partition_in_eval(self, x: Tensor) -> Partition:
        return super()._partition_in_eval(x) if self._measured else self._grouped(x, Partition())

    def _grouped(self, x: Tensor, whole: Partition) -> Partition:
        """``whole``, all rows, by domain if these do not share training statistics."""
        shares = self.train_statistics == "shared"
        if shares and not (self._separate_running or self.separate_affine):
            return whole
        domains = self._domains(x)
        groups = None
        if not shares:
            assert isinstance(domains, Rows)
            if domains.ids is not None or whole.synchronized:  # else the only group
                groups = domains.groups(x)
        return _DomainPartition(
            groups,
            1 if groups is None else self.num_domains,
            whole.across_ranks,
            whole.process_group,
            domains=domains,
        )

    def _normalize(self, x: Tensor, partition: Partition, tracked: bool) -> Tensor:
        if isinstance(partition, _DomainPartition):
            domains, groups_are_domains = partition.domains, partition.groups is not None
        elif self.separate_affine:
            domains, groups_are_domains = self._domains(x), False
        else:  # nothing depends on the domain
            return super()._normalize(x, partition, tracked)
        index = domains.index if isinstance(domains, Rows) else None
        if index is not None and partition.groups is None and not partition.synchronized:
            return _tie(self._forward_native(x, tracked, self._state_of(index)), domains)
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        maps_later = self.separate_affine and not groups_are_domains
        y, moments = partitioned_batch_norm(
            x, partition, *((None, None) if maps_later else (weight, bias)), eps=self.eps
        )
        if maps_later:
            y = _affine(y, *(None if table is None else domains.spread(table, x) for table in (weight, bias)))
        if tracked and not self._separate_running:
            self._update_running(*moments.pooled())
        elif tracked:
            if not groups_are_domains:
                moments = domains.moments(x, partition, self.num_domains)
            self._update_running(moments.count, moments.mean, moments.var)
        return _tie(y, domains)

    def _state_of(self, index: int) -> State:
        """Parameters and running statistics of one domain: views where each domain has its own."""

        def of(table: Tensor | None, separate: bool) -> Tensor | None:
            return table[index] if table is not None and separate else table

        return State(
            of(self.weight, self.separate_affine),
            of(self.bias, self.separate_affine),
            of(self.running_mean, self._separate_running),
            of(self.running_var, self._separate_running),
            of(self.num_batches_tracked, self._separate_running),
        )

    def _forward_running(self, x: Tensor) -> Tensor:
        if (
            self.running_mean is None
            or self.running_var is None
            or not (self._separate_running or self.separate_affine)
        ):
            return super()._forward_running(x)
        domains = self._domains(x)
        assert isinstance(domains, Rows)
        if domains.index is not None:
            weight, bias, mean, var, _ = self._state_of(domains.index)
            assert mean is not None
            assert var is not None
            # Copies: torch keeps them for the backward, and another domain's update would count as a change of them.
            y = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, False, 0.0, self.eps)
            return _tie(y, domains)
        scale = torch.rsqrt(self.running_var.double() + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.running_mean.double() * scale
        if self.bias is not None:
            shift = shift + self.bias.double()
        return _tie(_affine(x, domains.spread(scale, x), domains.spread(shift, x)), domains)

    # ------------------------------------------------------------------------------- for other tools

    def by_statistics(self, input: Tensor | Mapping[Key, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Split what :meth:`forward` takes by the row of the running statistics (0 if shared) that it is about."""
        if isinstance(input, Mapping):
            for index, level in zip(self._indices(input), input.values(), strict=True):
                yield (index if self._separate_running else 0), level
        elif not self._separate_running:
            yield 0, input
        else:
            domains = self._domains_said(input)
            assert isinstance(domains, Rows)
            if domains.ids is None:
                assert domains.index is not None
                yield domains.index, input
                return
            for index in domains.ids.unique().tolist():
                yield index, input[domains.ids == index]

    def single(self, key: Key) -> BatchNorm:
        """The batch norm that this layer is for the rows of one domain.

        What the domains share it shares with this layer (the same Parameters); what is the domain's own
        is copied, and so are the running statistics.
        """
        norm = BatchNorm(
            self.num_features,
            dim=self.dim,
            eps=self.eps,
            momentum=self.momentum,
            affine=self.affine,
            track_running_stats=self.track_running_stats,
        )
        state = self._state_of(self.index_of(key))
        for name, value in state._asdict().items():
            if isinstance(value, nn.Parameter) or value is None:
                setattr(norm, name, value)
            elif name in ("weight", "bias"):
                setattr(norm, name, nn.Parameter(value.detach().clone(), getattr(self, name).requires_grad))
            else:
                setattr(norm, name, value.clone())
        norm.frozen = self.frozen
        return norm.train(self.training)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x * scale + shift``, computed at least in float32; the result has the dtype of ``x``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if scale is not None:
        y = y * scale.to(wide)
    if shift is not None:
        y = y + shift.to(wide)
    return y.to(x.dtype)


def _tie(y: Tensor, domains: Rows | Levels) -> Tensor:
    """Make ``domains`` live as long as the graph of ``y``: the sign by which ``Replay`` knows that it may run again."""
    if y.grad_fn is not None:
        graph: Any = y.grad_fn
        graph.metadata["leakfree.domain"] = domains
    return y


def _memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format
