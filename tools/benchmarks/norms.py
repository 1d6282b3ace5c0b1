#!/usr/bin/env python
"""What the norms cost, side by side, forward and backward.

layers    in one process (--threads), contiguous and channels_last, each norm against nn.BatchNorm2d;
          GhostBN also against split norms (timm's, lightly's), FrozenBN against torchvision's and detectron2's,
          the remedies against their equations written with one operation for each step.
convolutions  CBN behind a convolution against convolution + BN, and the bytes that it remembers.
levels    DomainBN over the 5 levels of a pyramid, against five BN calls and one BN on the joined batch.
population  precise_bn on resnet18 against a plain forward of the same batches.
ranks     on several ranks (--ranks, one thread each): SyncBN against a local BN with two all-reduces of as many
          numbers, and against detectron2's NaiveSyncBatchNorm (E[x^2] - E[x]^2); ShuffleBN against a local BN.
accuracy  the float32 variance (running_var at momentum 1) against float64, at mean/std 1, 10, 100, 1000.

Times are medians over rounds in which all variants take turns; "peak / S" is the most memory that a step holds
beyond its input and the gradient it is given, in units of S, the bytes of the input. Peers take part where they are
installed; missing ones are named. "(plain)" is our plain writing of a peer's algorithm.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
import torch
import torch.distributed as dist
from measure import (
    DTYPES,
    Bar,
    Goal,
    Job,
    Report,
    Row,
    Shape,
    Step,
    alternate,
    count_wire,
    device_of,
    goal_bars,
    make_parser,
    make_setting,
    parse,
    peak_bytes,
    progress,
    run_ranks,
    timed_row,
    too_many_ranks,
    usable_cores,
    wanted,
)
from torch import Tensor, nn
from torchvision.models import resnet18

from leakfree.distributed import all_gather_objects, get_rank, get_world_size
from leakfree.norms import attach_convolutions, build_norm, convert_norms
from leakfree.population import precise_bn

SHAPES: dict[str, Shape] = {"A": (64, 64, 32, 32), "B": (16, 256, 14, 14), "C": (512, 256, 7, 7), "R": (256, 256, 7, 7)}
LARGE = [SHAPES["A"], SHAPES["C"]]  # the goals of GhostBN and FrozenBN are for these
RANK_SHAPES: dict[str, Shape] = {"D": (16, 64, 32, 32), "E": (128, 256, 7, 7), "R": (256, 256, 7, 7)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CONV_SHAPES: dict[str, Shape] = {"F": (16, 64, 28, 28), "G": (4, 256, 14, 14)}
LEVELS = [(4, 64, side, side) for side in (64, 32, 16, 8, 4)]
SECTIONS = ("layers", "convolutions", "levels", "population", "ranks", "accuracy")
CHUNKS, GROUPS = 8, 4  # of GhostBN and its peers; of ShuffleBN in one process

BN = "nn.BatchNorm2d"
BN_REDUCED = "BN + 2 all-reduces"
NAIVE_SYNC, D2_SYNC, TORCH_SYNC = "naive SyncBN (plain)", "detectron2 NaiveSyncBN", "nn.SyncBatchNorm"
PLAIN_SPLIT, TIMM_SPLIT = "split BN (plain)", "timm SplitBatchNorm2d"
PLAIN_FROZEN, D2_FROZEN = "frozen BN (plain)", "detectron2 FrozenBN"
CONV_BN, CONV_CBN, NAIVE_CBN = "conv + BN", "conv + CBN", "conv + CBN (plain)"
JOINED, FIVE_CALLS = "BN on the joined batch", "five BN calls"
PASS = "plain forward"


@dataclass(frozen=True)
class Layer:
    """A line of the table: a name and ``build(channels, rows)``, which raises ImportError for a missing peer."""

    name: str
    build: Callable[[int, int], nn.Module]
    peer: bool = False


LAYERS = [
    Layer(BN, lambda c, n: nn.BatchNorm2d(c)),
    Layer("BN", lambda c, n: build_norm("BN", c)),
    Layer("BatchStatBN", lambda c, n: build_norm("BatchStatBN", c)),
    Layer("ShuffleBN", lambda c, n: build_norm("ShuffleBN", c, num_groups=GROUPS)),
    Layer("GhostBN", lambda c, n: build_norm("GhostBN", c, group_size=max(1, n // CHUNKS))),
    Layer(PLAIN_SPLIT, lambda c, n: peers.SplitBatchNorm(c, CHUNKS), peer=True),
    Layer(TIMM_SPLIT, lambda c, n: peers.installed_timm_split(c, CHUNKS), peer=True),
    Layer("lightly SplitBatchNorm", lambda c, n: peers.installed_lightly_split(c, CHUNKS), peer=True),
    Layer("FrozenBN", lambda c, n: build_norm("FrozenBN", c)),
    Layer(PLAIN_FROZEN, lambda c, n: peers.FrozenBatchNorm(c), peer=True),
    Layer(D2_FROZEN, lambda c, n: peers.installed_detectron2_frozen(c), peer=True),
    Layer("torchvision FrozenBN", lambda c, n: peers.installed_torchvision_frozen(c), peer=True),
    Layer("GN", lambda c, n: build_norm("GN", c, num_groups=math.gcd(32, c))),
    Layer("LN", lambda c, n: build_norm("LN", c)),
    Layer("IN", lambda c, n: build_norm("IN", c)),
    Layer("PN", lambda c, n: build_norm("PN", c)),
    Layer("BatchRenorm", lambda c, n: build_norm("BatchRenorm", c, ramp=None)),
    Layer("BatchRenorm (plain)", lambda c, n: peers.NaiveBatchRenorm(c), peer=True),
    Layer("MBN", lambda c, n: build_norm("MBN", c)),
    Layer("MBN (plain)", lambda c, n: peers.NaiveMemorizedBatchNorm(c), peer=True),
    Layer("BGN", lambda c, n: build_norm("BGN", c, num_groups=math.gcd(32, c))),
    Layer("BGN (plain)", lambda c, n: peers.NaiveBatchGroupNorm(c, math.gcd(32, c)), peer=True),
    Layer("IEBN", lambda c, n: build_norm("IEBN", c)),
    Layer("IEBN (plain)", lambda c, n: peers.NaiveInstanceEnhancement(c), peer=True),
    Layer("ProxyNorm", lambda c, n: build_norm("ProxyNorm", c, norm="LN")),
    Layer("ProxyNorm (plain)", lambda c, n: peers.NaiveProxyNorm(c), peer=True),
]
PEAKS = {"FrozenBN": 2.0, "BatchRenorm": 3.0, "MBN": 2.0, "BGN": 2.0, "IEBN": 2.0, "ProxyNorm": 4.0}  # in units of S


def _conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def _conv_cbn(channels: int, rows: int) -> nn.Module:
    model = nn.Sequential(_conv(channels), build_norm("CBN", channels, window=4, burn_in=0))
    attach_convolutions(model)
    return model


CONV_LAYERS = [  # three iterations of the past in both windows
    Layer(CONV_BN, lambda c, n: nn.Sequential(_conv(c), nn.BatchNorm2d(c))),
    Layer(CONV_CBN, _conv_cbn),
    Layer(NAIVE_CBN, lambda c, n: peers.NaiveCrossIteration(_conv(c), past=3), peer=True),
]

RANK_LAYERS = [
    Layer(BN, lambda c, n: nn.BatchNorm2d(c)),
    Layer(BN_REDUCED, lambda c, n: nn.BatchNorm2d(c)),
    Layer("SyncBN", lambda c, n: build_norm("SyncBN", c)),
    Layer(NAIVE_SYNC, lambda c, n: peers.NaiveSyncBatchNorm(c), peer=True),
    Layer(D2_SYNC, lambda c, n: peers.installed_detectron2_sync(c), peer=True),
    Layer(TORCH_SYNC, lambda c, n: nn.SyncBatchNorm(c), peer=True),
    Layer("ShuffleBN", lambda c, n: build_norm("ShuffleBN", c, num_groups=max(2, get_world_size()))),
]

ACCURACY_LAYERS = {  # on one rank, on several
    1: [BN, "BN", "BatchStatBN", "GhostBN", "ShuffleBN", NAIVE_SYNC],
    2: ["SyncBN", "ShuffleBN", NAIVE_SYNC, D2_SYNC],
}
RATIOS = (1, 10, 100, 1000)


LAYER_GOALS = [
    Goal("ShuffleBN", BN, "<=", 1.15, [SHAPES["R"]], ["contiguous"]),
    Goal("GhostBN", BN, "<=", 1.15, LARGE, ["contiguous"]),
    Goal("GhostBN", BN, "<=", 1.35, LARGE, ["channels_last"]),
    Goal("GhostBN", TIMM_SPLIT, ">=", 1.3, LARGE),
    Goal("GhostBN", PLAIN_SPLIT, ">=", 1.3, LARGE),
    Goal("FrozenBN", D2_FROZEN, ">=", 1.2, LARGE),
    Goal("FrozenBN", PLAIN_FROZEN, ">=", 1.2, LARGE),
    Goal("BatchRenorm", BN, "<=", 1.3, LARGE),
    Goal("MBN", BN, "<=", 1.5, LARGE),
    Goal("BGN", BN, "<=", 1.6, LARGE),
    Goal("IEBN", BN, "<=", 1.5, LARGE),
    Goal("IEBN", "IEBN (plain)", ">=", 1.0, list(SHAPES.values())),
    Goal("ProxyNorm", "ProxyNorm (plain)", ">=", 2.0, LARGE),
]
CONV_GOALS = [Goal(CONV_CBN, CONV_BN, "<=", 1.8, list(CONV_SHAPES.values()))]
LEVEL_GOALS = [
    Goal("DomainBN", FIVE_CALLS, "<=", 1.15, LEVELS),
    Goal("DomainBN", JOINED, "<=", 1.2, LEVELS),
]
POPULATION_GOALS = [Goal("precise_bn", PASS, "<=", 1.05, [(32, 3, 96, 96)])]
RANK_GOALS = [
    Goal("SyncBN", BN_REDUCED, "<=", 1.15, list(RANK_SHAPES.values())),
    Goal("SyncBN", NAIVE_SYNC, ">=", 1.8, list(RANK_SHAPES.values())),
    Goal("SyncBN", D2_SYNC, ">=", 1.8, list(RANK_SHAPES.values())),
    Goal("ShuffleBN", BN, "<=", 1.25, [SHAPES["R"]]),
]


# --- Steps ----------------------------------------------------------------------------------------------------------


def make_input(shape: Shape, layout: str, settings: argparse.Namespace, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x, gradient of the output): standard normal."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = (
        torch.randn(shape, generator=generator)
        .to(device_of(settings), DTYPES[settings.dtype])
        .contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    return x.requires_grad_(), gradient


def train_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Step:
    """Forward and backward, with the gradients of the input and of the parameters."""
    wrt = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wrt, gradient)


def reduced_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Step:
    """The least a SyncBN can do: a local BN, and all-reduces of 2C+1 numbers forward and 2C backward."""
    channels = x.shape[1]
    forward, backward = (torch.zeros(count, device=x.device) for count in (2 * channels + 1, 2 * channels))
    wrt = [x, *layer.parameters()]

    def step() -> object:
        y = layer(x)
        dist.all_reduce(forward)
        gradients = torch.autograd.grad(y, wrt, gradient)
        dist.all_reduce(backward)
        return gradients

    return step


def build_steps(
    layers: Sequence[Layer], reference: str, x: Tensor, gradient: Tensor, settings: argparse.Namespace
) -> tuple[dict[str, Step], list[tuple[str, str]]]:
    """The steps that can run here, and (name, reason) of those that cannot."""
    steps: dict[str, Step] = {}
    skipped = []
    for layer in layers:
        if layer.name != reference and not wanted(layer.name, settings):
            continue
        if layer.name == TORCH_SYNC and x.device.type != "cuda":
            skipped.append((layer.name, "torch has it on GPUs only"))
            continue
        try:
            module = layer.build(x.shape[1], x.shape[0]).to(x.device)
            step = (reduced_step if layer.name == BN_REDUCED else train_step)(module, x, gradient)
            step()
        except ImportError as error:
            skipped.append((layer.name, str(error)))
            continue
        except (RuntimeError, ValueError, AssertionError) as error:
            if not layer.peer:
                raise
            skipped.append((layer.name, f"refuses {tuple(x.shape)} {x.dtype}: {error}"))
            continue
        steps[layer.name] = step
    return steps, skipped


# --- Jobs of the ranks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What a section compares, and with what."""

    section: str
    layers: Sequence[Layer]
    reference: str
    goals: Sequence[Goal]


COMPARISONS = {
    what.section: what
    for what in (
        Comparison("layers", LAYERS, BN, LAYER_GOALS),
        Comparison("convolutions", CONV_LAYERS, CONV_BN, CONV_GOALS),
        Comparison("ranks", RANK_LAYERS, BN, RANK_GOALS),
    )
}


def compare(settings: argparse.Namespace, section: str, name: str, shape: Shape, layout: str) -> dict[str, Any]:
    """Sections "layers" and "convolutions" (one rank), and "ranks": one table."""
    what = COMPARISONS[section]
    x, gradient = make_input(shape, layout, settings, seed=get_rank())
    steps, skipped = build_steps(what.layers, what.reference, x, gradient, settings)
    size = x.numel() * x.element_size()
    rows = timed_rows(settings, what, f"{name}, {layout}", steps, shape, layout, size)
    for row in rows:
        if row.variant in PEAKS and shape in LARGE:
            row.bars.append(Bar("peak / S", round(row.peak, 2), "<=", PEAKS[row.variant]))  # C numbers are no breach
        if get_world_size() > 1:
            row.wire = count_wire(steps[row.variant], rows=len(x), draws=1, device=x.device)
            groups = {"SyncBN": 1, "ShuffleBN": max(2, get_world_size())}.get(row.variant)
            if groups:
                row.bars.append(Bar("numbers reduced", row.wire.numbers, "<=", groups * (4 * shape[1] + 1)))
    return {"timings": [row.as_dict() for row in rows], "skipped": skipped}


def timed_rows(
    settings: argparse.Namespace,
    what: Comparison,
    name: str,
    steps: dict[str, Step],
    shape: Shape,
    layout: str,
    size: int,
) -> list[Row]:
    """The lines of one table: times, ratios and peak memory of ``steps``, the first being the reference."""
    ranks, device = get_world_size(), device_of(settings)
    title = f"{what.section}, {ranks} rank{'s' * (ranks > 1)}, {name}, {settings.dtype}"
    say = progress(title)
    rounds = alternate(steps, settings.repeats, device, max_pressure=settings.max_pressure, say=say)
    setting = make_setting(settings, shape, layout)
    rows = []
    for variant, step in steps.items():
        say(f"memory: {variant}")
        facts = {"section": what.section, "title": title, "setting": setting, "row_bytes": size}
        row = timed_row(rounds, variant, what.reference, **facts, peak=peak_bytes(step, device) / size)
        row.bars = goal_bars(what.goals, row, rounds)
        rows.append(row)
    return rows


def measure_state(settings: argparse.Namespace) -> dict[str, Any]:
    """What CBN remembers of three iterations, in bytes, against what autograd's derivatives take."""
    rows = []
    for name, shape in CONV_SHAPES.items():
        x = torch.randn(shape)
        ours, plain = _conv_cbn(shape[1], shape[0]), peers.NaiveCrossIteration(_conv(shape[1]), past=3)
        for _ in range(5):
            ours(x), plain(x)
        state = sum(b.numel() * b.element_size() for b in ours[1].buffers())  # type: ignore[index]
        share = state / plain.state_bytes()
        rows.append(
            {
                "section": "convolutions",
                "title": "state of CBN, bytes",
                "setting": {"ranks": 1, "shape": shape},
                "variant": f"{name}, {shape[1]} to {shape[1]} channels",
                "values": {"CBN": state, "plain": plain.state_bytes(), "share": share},
                "bars": [Bar("state / plain", share, "<=", 0.4).as_dict()],
            }
        )
    return {"figures": rows, "skipped": []}


def compare_levels(settings: argparse.Namespace, layout: str) -> dict[str, Any]:
    """Section "levels": five maps of a pyramid through one shared norm."""
    levels, gradients = [], []
    for shape in LEVELS:
        x, gradient = make_input(shape, layout, settings)
        levels.append(x)
        gradients.append(gradient)
    channels = LEVELS[0][1]
    joined_norm, shared, ours = (
        nn.BatchNorm1d(channels),
        nn.BatchNorm2d(channels),
        build_norm("DomainBN", channels, num_domains=len(LEVELS)),
    )

    def joined() -> object:
        y = joined_norm(torch.cat([x.flatten(2) for x in levels], 2))
        parts = y.split([x[0, 0].numel() for x in levels], 2)
        return torch.autograd.grad(parts, [*levels, *joined_norm.parameters()], [g.flatten(2) for g in gradients])

    def five() -> object:
        return torch.autograd.grad([shared(x) for x in levels], [*levels, *shared.parameters()], gradients)

    def domains() -> object:
        outputs = ours(dict(enumerate(levels)))
        return torch.autograd.grad([outputs[i] for i in range(len(levels))], [*levels, *ours.parameters()], gradients)

    steps: dict[str, Step] = {FIVE_CALLS: five, JOINED: joined, "DomainBN": domains}
    what = Comparison("levels", [], FIVE_CALLS, LEVEL_GOALS)
    size = sum(x.numel() * x.element_size() for x in levels)
    rows = timed_rows(settings, what, f"5 levels of {LEVELS[0]} and smaller, {layout}", steps, LEVELS[0], layout, size)
    return {"timings": [row.as_dict() for row in rows], "skipped": []}


def compare_population(settings: argparse.Namespace) -> dict[str, Any]:
    """Section "population": the same batches with and without the counting."""
    shape: Shape = (32, 3, 96, 96)
    model = convert_norms(resnet18(), "BN").to(device_of(settings)).eval()
    batches = [make_input(shape, "contiguous", settings, seed)[0].detach() for seed in range(3)]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def forward() -> object:
        for norm in norms:
            norm.training = True
        with torch.no_grad():
            return [model(batch) for batch in batches]

    steps: dict[str, Step] = {PASS: forward, "precise_bn": lambda: precise_bn(model, batches, progress=False)}
    what = Comparison("population", [], PASS, POPULATION_GOALS)
    size = len(batches) * batches[0].numel() * batches[0].element_size()
    rows = timed_rows(settings, what, "resnet18, 3 batches of 32×3×96×96", steps, shape, "contiguous", size)
    return {"timings": [row.as_dict() for row in rows], "skipped": []}


def measure_accuracy(settings: argparse.Namespace) -> dict[str, Any]:
    """Section "accuracy": the largest relative error over channels of the variance that a float32 layer stores."""
    ranks = get_world_size()
    layers = {layer.name: layer for layer in ((*RANK_LAYERS, *LAYERS) if ranks == 1 else RANK_LAYERS)}
    n, c, h, w = settings.shape[0] if settings.shape else SHAPES["R"]
    shape = (n, min(c, 32), h, w)
    title = f"accuracy of the variance, {ranks} rank{'s' * (ranks > 1)}, {'×'.join(map(str, shape))}, at mean/std"
    say = progress(title)
    rows, skipped = [], []
    for name in ACCURACY_LAYERS[min(ranks, 2)]:
        if not wanted(name, settings):
            continue
        for layout in LAYOUTS:
            say(f"{name}, {layout}")
            values = {}
            try:
                for ratio in RATIOS:
                    layer = layers[name].build(shape[1], n).to(device_of(settings))
                    biased = name in (NAIVE_SYNC, D2_SYNC)  # they store the biased variance
                    values[str(ratio)] = variance_error(layer, shape, layout, ratio, device_of(settings), biased=biased)
            except ImportError as error:
                skipped.append((name, str(error)))
                continue
            ours = not layers[name].peer and name != BN
            rows.append(
                {
                    "section": "accuracy",
                    "title": title,
                    "setting": {"ranks": ranks, "shape": shape, "layout": layout},
                    "variant": f"{name}, {layout}",
                    "values": values,
                    "bars": [Bar("relative error", max(values.values()), "<=", 1e-6).as_dict()] if ours else [],
                }
            )
    return {"figures": rows, "skipped": skipped}


def variance_error(
    layer: nn.Module, shape: Shape, layout: str, ratio: float, device: torch.device, *, biased: bool
) -> float:
    """One training forward at momentum 1, then ``running_var`` against the float64 variance over all ranks."""
    generator = torch.Generator().manual_seed(get_rank())
    x = (torch.randn(shape, generator=generator) + ratio).contiguous(memory_format=LAYOUTS[layout])
    everyone = np.concatenate(all_gather_objects(x.double().numpy()))
    exact = everyone.var(axis=(0, 2, 3), ddof=0 if biased else 1)
    layer.momentum = 1.0  # type: ignore[assignment]
    layer(x.to(device))
    stored = layer.get_buffer("running_var").double().cpu().numpy()
    return float(np.abs(stored / exact - 1).max())


# --- Command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    shapes = "; ".join(f"{name}={','.join(map(str, shape))}" for name, shape in (SHAPES | RANK_SHAPES).items())
    parser = make_parser(
        __doc__ or "",
        ranks=[1, 2, 4],
        threads=usable_cores(),
        shapes=f"default: {shapes}, of which D, E, R on several ranks",
    )
    names = dict.fromkeys(layer.name for layer in (*LAYERS, *RANK_LAYERS))
    settings = parse(parser, arguments, SECTIONS, list(names))
    report = Report("norms", settings)
    for ranks in settings.ranks:
        if reason := too_many_ranks(ranks, settings):
            report.add_skipped([(f"{ranks} ranks", reason)])
            continue
        jobs: list[Job] = []
        for section in ("layers", "convolutions") if ranks == 1 else ("ranks",):
            if section in settings.only_sections:
                standard = {"layers": SHAPES, "convolutions": CONV_SHAPES, "ranks": RANK_SHAPES}[section]
                for name, shape in chosen_shapes(settings, standard).items():
                    layouts = list(LAYOUTS) if ranks == 1 else ["contiguous"]
                    jobs += [(compare, section, name, shape, layout) for layout in layouts]
        if ranks == 1 and "convolutions" in settings.only_sections:
            jobs.append((measure_state,))
        if ranks == 1 and "levels" in settings.only_sections:
            jobs += [(compare_levels, layout) for layout in LAYOUTS]
        if ranks == 1 and "population" in settings.only_sections:
            jobs.append((compare_population,))
        if "accuracy" in settings.only_sections:
            jobs.append((measure_accuracy,))
        for found in run_ranks(jobs, ranks, settings):
            report.add_skipped(found["skipped"])
            report.add_timings(found.get("timings", []))
            report.add_figures(found.get("figures", []))
    report.close()
    return 0


def chosen_shapes(settings: argparse.Namespace, standard: dict[str, Shape]) -> dict[str, Shape]:
    """Shapes by the name under which a table shows them."""
    named = {f"{name} {'×'.join(map(str, shape))}": shape for name, shape in standard.items()}
    if not settings.shape:
        return named
    names = {shape: name for name, shape in named.items()}
    return {names.get(shape, "×".join(map(str, shape))): shape for shape in settings.shape}


if __name__ == "__main__":
    sys.exit(main())
