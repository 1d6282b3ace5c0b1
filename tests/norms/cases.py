"""The norms that the house rules are for: how each is built, and the equations it follows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakfree.norms import build_norm, domain
from tests.norms import equations

C, DOMAINS = 6, 3


def batch(seed: int = 0, rows: int = 6, shape: Sequence[int] = (4, 3), dtype=torch.float64, channels: int = C):
    """(rows, channels, *shape); the statistics of batches and of samples differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, *shape, dtype=torch.float64, generator=generator)
    offset = torch.randn(rows, channels, *[1] * len(shape), dtype=torch.float64, generator=generator)
    scale, shift = torch.rand(2, channels, dtype=torch.float64, generator=generator) + 0.5
    return ((x + 0.7 * offset) * equations.column(scale, x) * 1.5 + 2 * equations.column(shift, x)).to(dtype)


def probe(x: Tensor) -> Tensor:
    """What the output is weighed with in a loss: without it, gradients of a batch norm are nearly 0."""
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99)).to(x.dtype)


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor] = (), v: Tensor | None = None):
    """Output, and gradients of the input and of those of ``parameters`` that train."""
    leaf = x.detach().clone().requires_grad_(True)
    y = run(leaf)
    v = (probe(x) if v is None else v).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *(p for p in parameters if p.requires_grad)], v)]


def assert_close(some: Iterable[Tensor], others: Iterable[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def changed(before: dict[str, Any], module: nn.Module) -> set[str]:
    """The keys whose values are not bitwise as ``before``; some may be extra state."""
    after = module.state_dict()
    assert before.keys() == after.keys()
    return {
        key
        for key, value in after.items()
        if not (torch.equal(before[key], value) if isinstance(value, Tensor) else before[key] == value)
    }


@dataclass(frozen=True)
class Case:
    """A norm with options.

    Attributes:
        equation: makes the equations of a new layer.
        kind: "batch" (statistics of the batch, moving or remembered ones in eval), "frozen" or "independent".
        groups: the domain of each of so many rows; None for norms without domains.
        extra: what its state dict has beside a batch norm's.
    """

    title: str
    name: str
    equation: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "batch"
    groups: Callable[[int], Tensor | int] | None = None
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.title

    def make(self, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        """The layer, not at its initial weight and bias; for inputs of any dimensions."""
        norm = build_norm(self.name, C, **{"dim": None, **self.options, **options}).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator), alpha=0.5)
            if self.kind == "frozen":
                given = self.equation()
                norm.running_mean.copy_(given.mean)
                norm.running_var.copy_(given.var)
        return norm

    def around(self, rows: int) -> contextlib.AbstractContextManager:
        """What a forward of so many rows runs in."""
        return contextlib.nullcontext() if self.groups is None else domain(self.groups(rows))

    def groups_of(self, norm: nn.Module, rows: int) -> Tensor | None:
        """The groups of the rows of its last forward, for the equations."""
        if self.groups is None:
            return getattr(norm, "last_groups", None)
        groups = self.groups(rows)
        return groups if isinstance(groups, Tensor) else torch.full((rows,), groups)

    def forward(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with self.around(len(x)):
                return norm(x)

        return run

    def trained(self, steps: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        """After some training forwards."""
        norm = self.make(dtype, **options)
        for step in range(steps):
            self.forward(norm)(batch(step, dtype=dtype))
        return norm

    def needs_positions(self) -> bool:
        return self.name == "IN"


def _mixed(rows: int) -> Tensor:
    return (2 * torch.arange(rows) + rows) % DOMAINS


def _domains(training: str, running: str, affine: str) -> Case:
    return Case(
        f"DomainBN {training} {running} {affine}",
        "DomainBN",
        lambda **options: equations.DomainBatchNorm(C, DOMAINS, training, running, **options),
        {"num_domains": DOMAINS, "train_statistics": training, "running_statistics": running, "affine": affine},
        groups=_mixed,
    )


def _of(kind: Callable[..., Any], *args: Any, **given: Any) -> Callable[..., Any]:
    return lambda **options: kind(*args, **(given | options))


_RENORM = {"momentum": 0.3, "ramp": (1, 4, 6), "r_max": 1.5, "d_max": 0.4}
_MEMORY = ("memory_mean", "memory_var", "memory_count")
_WINDOW = ("window_mean", "window_var", "window_forwards")  # without compensation
_GATE = ("gate_weight", "gate_bias")


def _memorized(memory: int, decay: float) -> Case:
    return Case(
        f"MBN {memory} {decay}",
        "MBN",
        _of(equations.MemorizedBatchNorm, C, memory, decay),
        {"memory": memory, "decay": decay},
        extra=_MEMORY,
    )


def _grouped(num_groups: int) -> Case:
    return Case(f"BGN {num_groups}", "BGN", _of(equations.BatchGroupNorm, C, num_groups), {"num_groups": num_groups})


def _independent(title: str, name: str, sharing: str, eps: float = 1e-5, **options: Any) -> Case:
    return Case(title, name, _of(equations.IndependentNorm, sharing, eps), options, kind="independent")


BATCH_NORMS = [
    Case("BN", "BN", _of(equations.BatchNorm, C)),
    Case("SyncBN", "SyncBN", _of(equations.BatchNorm, C)),
    Case("GhostBN", "GhostBN", _of(equations.BatchNorm, C), {"group_size": 3}),
    Case("ShuffleBN", "ShuffleBN", _of(equations.BatchNorm, C), {"num_groups": 3}),
    Case("BatchStatBN", "BatchStatBN", _of(equations.BatchStatNorm, C)),
    Case("BatchRenorm", "BatchRenorm", _of(equations.BatchRenorm, C, **_RENORM), _RENORM),
    _grouped(1),
    _grouped(2),
    _grouped(C),
    Case("IEBN", "IEBN", _of(equations.EnhancedBatchNorm, C), extra=_GATE),
    _memorized(3, 0.6),
    Case(
        "CBN",
        "CBN",
        _of(equations.CrossIterationBatchNorm, C, 3),
        {"rho": 0.0, "window": 3, "burn_in": 0},
        extra=_WINDOW,
    ),
]
MIXED_DOMAINS = [
    _domains(*choice)
    for choice in itertools.product(("domain", "shared"), ("domain", "shared"), ("shared", "separate"))
]
ONE_DOMAIN = [replace(case, title=f"{case.title}, one domain", groups=lambda rows: 1) for case in MIXED_DOMAINS]
DOMAIN_NORMS = [*MIXED_DOMAINS, ONE_DOMAIN[1]]
INDEPENDENT_NORMS = [
    _independent("GN", "GN", "groups of 2", num_groups=3),
    _independent("LN", "LN", "sample"),
    _independent("LN per position", "LN", "position", 1e-6, per_position=True),
    _independent("IN", "IN", "channel", affine=True),
    _independent("PN", "PN", "position", affine=True),
    Case("ProxyNorm", "ProxyNorm", _of(equations.ProxyNorm, F.relu, 1), kind="independent"),
    Case(
        "ProxyNorm silu GN",
        "ProxyNorm",
        _of(equations.ProxyNorm, F.silu, 3),
        {"activation": "silu", "norm": "GN", "num_groups": 3},
        kind="independent",
    ),
]
FROZEN = Case("FrozenBN", "FrozenBN", _of(equations.FrozenNorm, C), {"affine_trainable": True}, kind="frozen")
CASES = [*BATCH_NORMS, *DOMAIN_NORMS, FROZEN, *INDEPENDENT_NORMS]


def _variant(case: Case, **options: Any) -> Case:
    """Options that the equations take too."""
    title = f"{case.title} {' '.join(f'{name}={value}' for name, value in options.items())}"
    return replace(case, title=title, options=case.options | options, equation=lambda: case.equation(**options))


AVERAGING = [case for case in [*BATCH_NORMS, *DOMAIN_NORMS] if case.name not in ("MBN", "CBN", "BatchStatBN")]
VARIANTS = [
    *(_variant(case, momentum=None) for case in AVERAGING),
    _grouped(3),
    _memorized(1, 0.9),
    _memorized(2, 0.3),
    _memorized(5, 1.0),
    _variant(next(case for case in BATCH_NORMS if case.name == "BatchRenorm"), ramp=None),
    _variant(next(case for case in BATCH_NORMS if case.name == "BatchRenorm"), ramp=None, momentum=None),
    *(
        replace(case, title=f"{case.title} affine=False", options=case.options | {"affine": False})
        for case in BATCH_NORMS
    ),
]


def named(*titles: str) -> list[Case]:
    """The cases of these titles."""
    found = {case.title: case for case in (*CASES, *VARIANTS)}
    return [found[title] for title in titles]
