#!/usr/bin/env python
"""What shuffling costs, side by side, in time, memory and bytes on the wire, for 1, 2, 4, 8 ranks of one thread each.

roi      RoI features, forward and backward, as many rows on every rank: ShuffleBN (statistics travel) and
         Shuffled(BN) (rows travel) against a local BN and against the all-gather shuffle around BN; the exchange
         alone against the all-gather's and against a bare all-to-all of the same bytes (four calls).
unequal  the exchange alone, with 0 rows on the first rank, N on the last, and equal steps between.
images   MoCo's image shuffle without a gradient (64x3x224x224) against the all-gather.
drawing  microseconds of one rank to draw its rows' groups at 4,096 ranks x 512 rows.

Counted on the wire, mean over ranks and over --draws shuffles: bytes of rows sent to other ranks in units of S (the
bytes of a rank's rows), numbers put into all-reduces, bytes of integers (sizes, or a permutation), and all of these
("wire", an all-reduce of n bytes as 2 (W-1)/W n). "kernel / wire": what the loopback device carried meanwhile, packet
headers and the traffic of strangers included. "peak / S": the most memory a step holds beyond its input and the
gradient it is given. Formulas: 4 (W-1)/W S for rows there and back, forward and backward; groups x (4C+1) numbers
for ShuffleBN.
"(plain)" is our plain writing of detectron2's or MoCo's algorithm. Peers take part where they are installed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
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
    Report,
    Shape,
    Spread,
    Step,
    Wire,
    alternate,
    at_least_one,
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
    wanted,
)
from torch import Tensor, nn

from leakfree.distributed import all_gather_objects, get_rank, get_world_size
from leakfree.norms import build_norm
from leakfree.shuffle import GroupDraw, Shuffled, batch_shuffle, batch_unshuffle

ROI: Shape = (256, 256, 7, 7)
IMAGES: Shape = (64, 3, 224, 224)
SECTIONS = ("roi", "unequal", "images", "drawing")
FAR_RANKS, FAR_ROWS = 4096, 512  # of section "drawing"

BN, SHUFFLE_BN, SHUFFLED = "nn.BatchNorm2d", "ShuffleBN", "Shuffled(BN)"
GATHER_BN, D2_GATHER_BN = "all-gather around BN (plain)", "all-gather around BN (detectron2)"
EXCHANGE = "batch_shuffle + batch_unshuffle"
GATHER, D2_GATHER = "all-gather exchange (plain)", "all-gather exchange (detectron2)"
BARE = "bare all-to-all"
IMAGE_SHUFFLE, MOCO, LIGHTLY = "batch_shuffle", "MoCo all-gather (plain)", "MoCo all-gather (lightly)"


@dataclass
class Variant:
    """One way to do it. ``back()`` must be x, which is checked; ``random``: its bytes differ from draw to draw."""

    step: Step
    back: Callable[[], Tensor] | None = None
    random: bool = False


def train_step(forward: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, *layers: nn.Module) -> Step:
    wrt = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    return lambda: torch.autograd.grad(forward(x), wrt, gradient)


def rank_rows(section: str, rows: int) -> int:
    """Rows of this rank; on unequal ranks from 0 to ``rows`` in equal steps."""
    if section != "unequal":
        return rows
    return round(rows * get_rank() / max(1, get_world_size() - 1))


def num_groups() -> int:
    return get_world_size() if get_world_size() > 1 else 4


def exchange_variants(x: Tensor, gradient: Tensor) -> dict[str, Callable[[], Variant]]:
    generator = torch.Generator().manual_seed(1)  # alike on all ranks

    def ours(x: Tensor) -> Tensor:
        rows, ticket = batch_shuffle(x, generator=generator)
        return batch_unshuffle(rows, ticket)

    def gathered(tools: peers.AllGatherShuffle) -> Variant:
        def forward(x: Tensor) -> Tensor:
            rows, home = tools.shuffle(x)
            return tools.unshuffle(rows, home)

        return Variant(train_step(forward, x, gradient), lambda: forward(x))

    variants = {EXCHANGE: lambda: Variant(train_step(ours, x, gradient), lambda: ours(x), random=True)}
    if get_world_size() > 1:
        variants[GATHER] = lambda: gathered(peers.AllGatherShuffle())
        variants[D2_GATHER] = lambda: gathered(peers.installed_detectron2_shuffle())
    return variants


def roi_variants(x: Tensor, gradient: Tensor) -> dict[str, Callable[[], Variant]]:
    channels = x.shape[1]

    def normed(layer: nn.Module, *, random: bool = False) -> Variant:
        layer = layer.to(x.device)
        return Variant(train_step(layer, x, gradient, layer), random=random)

    def gathered(tools: peers.AllGatherShuffle) -> Variant:
        layer = nn.BatchNorm2d(channels).to(x.device)

        def forward(x: Tensor) -> Tensor:
            rows, home = tools.shuffle(x)
            return tools.unshuffle(layer(rows), home)

        return Variant(train_step(forward, x, gradient, layer))

    variants: dict[str, Callable[[], Variant]] = {
        BN: lambda: normed(nn.BatchNorm2d(channels)),
        SHUFFLE_BN: lambda: normed(build_norm("ShuffleBN", channels, num_groups=num_groups())),
        SHUFFLED: lambda: normed(Shuffled(build_norm("BN", channels), num_groups()), random=True),
    }
    if get_world_size() > 1:
        variants[GATHER_BN] = lambda: gathered(peers.AllGatherShuffle())
        variants[D2_GATHER_BN] = lambda: gathered(peers.installed_detectron2_shuffle())
        variants[BARE] = lambda: Variant(bare_step(x))
    return variants | exchange_variants(x, gradient)


def bare_step(x: Tensor) -> Step:
    """Four all-to-alls of the rank's rows in equal shares, into memory that is there: the least that rows can cost."""
    ranks = get_world_size()
    shares = [len(x) // ranks + (rank < len(x) % ranks) for rank in range(ranks)]
    rows = x.detach().clone()
    received = rows.new_empty((shares[get_rank()] * ranks, *x.shape[1:]))
    arrivals = [shares[get_rank()]] * ranks

    def step() -> None:
        for _ in range(4):
            dist.all_to_all_single(received, rows, arrivals, shares)

    return step


def image_variants(x: Tensor, gradient: Tensor) -> dict[str, Callable[[], Variant]]:
    generator = torch.Generator().manual_seed(1)
    images = x.detach()

    @torch.no_grad()
    def ours() -> Tensor:
        return batch_shuffle(images, generator=generator)[0]

    def installed() -> Variant:
        shuffle = peers.installed_lightly_shuffle()
        return Variant(lambda: shuffle(images))

    return {
        MOCO: lambda: Variant(lambda: peers.moco_shuffle(images)),
        IMAGE_SHUFFLE: lambda: Variant(ours, random=True),
        LIGHTLY: installed,
    }


# Section: its variants, its standard shape, and the reference of its ratios.
MOVES: dict[str, tuple[Callable[[Tensor, Tensor], dict[str, Callable[[], Variant]]], Shape, str]] = {
    "roi": (roi_variants, ROI, BN),
    "unequal": (exchange_variants, ROI, EXCHANGE),
    "images": (image_variants, IMAGES, IMAGE_SHUFFLE),
}

GOALS = [
    Goal(SHUFFLE_BN, BN, "<=", 1.15, [ROI], ranks=[1]),
    Goal(SHUFFLE_BN, BN, "<=", 1.25, [ROI], ranks=[2, 4]),
    *(Goal(SHUFFLE_BN, peer, ">=", 8, [ROI], ranks=[2]) for peer in (GATHER_BN, D2_GATHER_BN)),
    *(Goal(SHUFFLE_BN, peer, ">=", 25, [ROI], ranks=[4]) for peer in (GATHER_BN, D2_GATHER_BN)),
    *(Goal(EXCHANGE, peer, ">=", 4, [ROI], ranks=[2]) for peer in (GATHER, D2_GATHER)),
    *(Goal(EXCHANGE, peer, ">=", 6, [ROI], ranks=[4]) for peer in (GATHER, D2_GATHER)),
    Goal(EXCHANGE, BARE, "<=", 2, [ROI], ranks=[2, 4]),
]


def wire_bars(variant: str, wire: Wire, row_bytes: float, channels: int) -> list[Bar]:
    """The formulas: bytes of rows per rank, numbers of the statistics, no permutation."""
    ranks = get_world_size()
    if variant not in (SHUFFLE_BN, SHUFFLED, EXCHANGE, IMAGE_SHUFFLE):
        return []
    none = Bar("permutation bytes", wire.permutation, "<=", 0)
    if variant == SHUFFLE_BN:
        numbers = Bar("numbers reduced", wire.numbers, "<=", num_groups() * (4 * channels + 1))
        return [numbers, Bar("bytes of rows", wire.sent, "<=", 0), none]
    passes = 1 if variant == IMAGE_SHUFFLE else 4
    return [Bar("bytes of rows / S", wire.sent / row_bytes, "+-", passes * (ranks - 1) / ranks), none]


def compare(settings: argparse.Namespace, section: str, shape: Shape) -> dict[str, Any]:
    """What each rank runs: one table."""
    make_variants, _, reference = MOVES[section]
    ranks, device = get_world_size(), device_of(settings)
    torch.manual_seed(get_rank())
    own = (rank_rows(section, shape[0]), *shape[1:])
    x, gradient = (torch.randn(own).to(device, DTYPES[settings.dtype]) for _ in range(2))
    variants: dict[str, Variant] = {}
    skipped = []
    for name, make in make_variants(x.requires_grad_(), gradient).items():
        if name != reference and not wanted(name, settings):
            continue
        try:
            variants[name] = make()
        except ImportError as error:
            skipped.append((name, str(error)))

    title = f"{section}, {ranks} rank{'s' * (ranks > 1)}, {'×'.join(map(str, shape))}, {settings.dtype}"
    say = progress(title)
    row_bytes = float(np.mean(all_gather_objects(x.numel() * x.element_size())))
    wires = {}
    for name, variant in variants.items():  # before the timing, which draws a number of times that varies
        say(f"bytes: {name}")
        if variant.back is not None and not torch.equal(variant.back(), x):
            raise AssertionError(f"{name}: rows did not come home")
        draws = settings.draws if variant.random else 1
        wires[name] = count_wire(variant.step, rows=shape[0], draws=draws, device=device)
    steps = {name: variant.step for name, variant in variants.items()}
    rounds = alternate(steps, settings.repeats, device, max_pressure=settings.max_pressure, say=say)
    setting = make_setting(settings, shape, "contiguous")
    rows = []
    for name, variant in variants.items():
        say(f"memory: {name}")
        peak = peak_bytes(variant.step, device) / row_bytes
        facts = {"section": section, "title": title, "setting": setting, "row_bytes": row_bytes, "peak": peak}
        row = timed_row(rounds, name, reference, **facts)
        if ranks > 1:
            row.wire = wires[name]
            row.bars = wire_bars(name, row.wire, row_bytes, shape[1])
        row.bars += goal_bars(GOALS if section == "roi" else [], row, rounds)
        rows.append(row.as_dict())
    return {"timings": rows, "skipped": skipped}


# --- Drawing ----------------------------------------------------------------------------------------------------------


def microseconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    work()
    taken = []
    for _ in range(5 * repeats):
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * 1e6)
    spread = Spread.of(taken)
    return {"µs": spread.median, "q1": spread.low, "q3": spread.high}


def measure_drawing(repeats: int) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Section "drawing": what one rank of many does before any row or statistic travels."""
    torch.set_num_threads(1)
    draws = itertools.count()
    sizes = {ranks: np.full(ranks, FAR_ROWS) for ranks in (8, FAR_RANKS)}

    def draw(ranks: int) -> GroupDraw:
        return GroupDraw(sizes[ranks], ranks // 2, ranks, seed=0, index=next(draws))

    rows, skipped = [], []

    def add(variant: str, ranks: int, work: Callable[[], object], limit: float | None = None) -> None:
        values = microseconds(work, repeats)
        rows.append(
            {
                "section": "drawing",
                "title": f"drawing, {FAR_ROWS} rows on each rank, one group for each rank",
                "setting": {"ranks": ranks, "rows": FAR_ROWS, "threads": 1},
                "variant": f"{variant}, {ranks:,} ranks",
                "values": values,
                "bars": [] if limit is None else [Bar("µs", values["µs"], "<=", limit).as_dict()],
            }
        )

    add("GroupDraw.groups", 8, lambda: draw(8).groups)
    add("GroupDraw.groups", FAR_RANKS, lambda: draw(FAR_RANKS).groups, limit=1000.0)
    try:
        from leakfree.shuffle.exchange import make_ticket
    except ImportError as error:
        skipped.append(("the plan that moves rows", str(error)))
    else:
        add("with the plan that moves rows", FAR_RANKS, lambda: make_ticket(draw(FAR_RANKS), torch.device("cpu"), None))
    try:  # torch's own stand-in for a large group: a collective copies what this rank put in, and sends nothing
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        skipped.append(("ShuffleBN in a simulated group", str(error)))
    else:
        dist.init_process_group("fake", rank=FAR_RANKS // 2, world_size=FAR_RANKS, store=FakeStore())
        layer, x = build_norm("ShuffleBN", 1, dim=1, num_groups=FAR_RANKS), torch.zeros(FAR_ROWS, 1)
        mine, everyone = torch.zeros(4, dtype=torch.int64), torch.zeros(FAR_RANKS * 4, dtype=torch.int64)
        add("simulated: ShuffleBN.partition, sizes gathered", FAR_RANKS, lambda: layer.partition(x))  # type: ignore[operator]
        add("simulated: of which the gathering", FAR_RANKS, lambda: dist.all_gather_into_tensor(everyone, mine))
        dist.destroy_process_group()
    return rows, skipped


def main(arguments: Sequence[str] | None = None) -> int:
    shapes = f"default: roi and unequal {','.join(map(str, ROI))}, images {','.join(map(str, IMAGES))}"
    parser = make_parser(__doc__ or "", ranks=[1, 2, 4, 8], threads=1, shapes=shapes)
    parser.add_argument(
        "--draws", type=at_least_one, default=32, metavar="N", help="shuffles over which bytes are averaged"
    )
    names = [BN, SHUFFLE_BN, SHUFFLED, GATHER_BN, D2_GATHER_BN, BARE, EXCHANGE, GATHER, D2_GATHER]
    settings = parse(parser, arguments, SECTIONS, [*names, IMAGE_SHUFFLE, MOCO, LIGHTLY])
    report = Report("shuffle", settings)
    for ranks in settings.ranks:
        if reason := too_many_ranks(ranks, settings):
            report.add_skipped([(f"{ranks} ranks", reason)])
            continue
        sections = [name for name in settings.only_sections if name in (MOVES if ranks > 1 else ["roi"])]
        jobs = [(compare, name, shape) for name in sections for shape in settings.shape or [MOVES[name][1]]]
        for found in run_ranks(jobs, ranks, settings):
            report.add_skipped(found["skipped"])
            report.add_timings(found["timings"])
    if "drawing" in settings.only_sections:
        figures, skipped = measure_drawing(settings.repeats)
        report.add_skipped(skipped)
        report.add_figures(figures)
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
