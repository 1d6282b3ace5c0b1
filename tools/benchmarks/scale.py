#!/usr/bin/env python3
"""What a step of ShuffleBN and of moving rows costs at up to thousands of ranks: formulas, and draws simulated.

For each layout of the random groups: the numbers and bytes that one rank sends for one layer and step (bytes
follow docs/communication.md; tools/benchmarks/shuffle.py counts them on real ranks), the time of its all-reduces in
a latency + bandwidth model, and what a simulated draw gives: how often two rows of one rank meet in a group, how many
rows share statistics, how long the draw takes. The constants of the model are measured between two local processes
unless given: name those of your network.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import Report, at_least_one, make_parser, parse, run_ranks

from leakfree.distributed import all_reduce_sum_, barrier
from leakfree.shuffle import GroupDraw

SECTIONS = ("constants", "layouts")
NUMBER = 8  # bytes: statistics travel in float64
DRAWS = 40  # over which meetings are averaged


@dataclass(frozen=True)
class Layout:
    """Who draws groups with whom: ``members`` ranks together, ``groups`` groups among them."""

    name: str
    members: int
    groups: int


def layouts(ranks: int, subgroup: int, fixed: int) -> list[Layout]:
    """The choices a user has at this many ranks; those that coincide are listed once."""
    choices = [Layout("one group for each rank, over all", ranks, ranks)]
    if ranks > fixed:
        choices.append(Layout(f"{fixed} groups over all", ranks, fixed))
    if ranks > subgroup:
        choices.append(Layout(f"one group for each rank, among {subgroup}", subgroup, subgroup))
    return choices


def ring_bytes(payload: float, ranks: int) -> float:
    """Bytes that each rank sends in a bandwidth-optimal all-reduce (Patarasuk & Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * payload


def simulate(layout: Layout, rows: int) -> dict[str, float]:
    """Draws of the first rank's rows: how often two of them share a group, and how long a draw takes."""
    sizes = np.full(layout.members, rows)
    together = 0.0
    taken = []
    for index in range(DRAWS):
        start = time.perf_counter()
        groups = GroupDraw(sizes, 0, layout.groups, seed=0, index=index).groups
        taken.append((time.perf_counter() - start) * 1e6)
        counts = np.bincount(groups, minlength=layout.groups)
        together += float((counts * (counts - 1)).sum()) / (rows * (rows - 1))
    return {"meet %": 100 * together / DRAWS, "draw µs": float(np.median(taken))}


def measure_constants(settings: argparse.Namespace) -> dict[str, float]:
    """Latency (µs) and bandwidth (bytes/s) of an all-reduce between the ranks, from a short and a long one."""
    times = []
    for numbers in (1, 1 << 20):
        payload = torch.ones(numbers, dtype=torch.float64)
        taken = []
        for _ in range(settings.repeats + 2):
            payload.fill_(1.0)
            barrier()
            start = time.perf_counter()
            all_reduce_sum_(payload)
            taken.append(time.perf_counter() - start)
        times.append(float(np.median(taken[2:])))
    return {"latency_us": times[0] * 1e6, "bytes_per_second": ring_bytes(NUMBER << 20, 2) / (times[1] - times[0])}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(
        __doc__ or "", ranks=[2, 8, 64, 512, 4096], threads=1, shapes="default: 512,256,7,7; N is the rows of a rank"
    )
    add = parser.add_argument
    add("--subgroup", type=at_least_one, default=8, metavar="K", help="ranks that draw together (default: 8)")
    add("--groups", type=at_least_one, default=64, metavar="G", help="groups over all ranks (default: 64)")
    add("--latency-us", type=float, metavar="T", help="of one message (default: measured between local processes)")
    add("--gigabytes-per-second", type=float, metavar="B", help="of one rank's link (default: measured likewise)")
    settings = parse(parser, arguments, SECTIONS, [])
    report = Report("scale", settings)
    measured = next(iter(run_ranks([(measure_constants,)], 2, settings)))
    latency = (settings.latency_us or measured["latency_us"]) * 1e-6
    speed = settings.gigabytes_per_second * 1e9 if settings.gigabytes_per_second else measured["bytes_per_second"]
    report.add_figures([constants(measured, latency, speed)])
    for rows, channels, height, width in settings.shape or [(512, 256, 7, 7)]:
        share = rows * channels * height * width * (2 if settings.dtype == "bfloat16" else 4)
        title = f"one layer of {channels} channels, {rows} rows of {height}x{width} on each rank, forward and backward"
        report.add_figures(
            [
                figures(title, ranks, layout, rows, channels, share, latency, speed)
                for ranks in settings.ranks
                for layout in layouts(ranks, settings.subgroup, settings.groups)
            ]
        )
    report.close()
    return 0


def constants(measured: dict[str, float], latency: float, speed: float) -> dict[str, Any]:
    values = {
        "measured latency µs": measured["latency_us"],
        "measured GB/s": measured["bytes_per_second"] / 1e9,
        "used latency µs": latency * 1e6,
        "used GB/s": speed / 1e9,
    }
    return {
        "section": "constants",
        "title": "constants of the model",
        "setting": {"ranks": 2},
        "variant": "all-reduce of two local processes",
        "values": values,
        "bars": [],
    }


def figures(
    title: str, ranks: int, layout: Layout, rows: int, channels: int, share: int, latency: float, speed: float
) -> dict[str, Any]:
    """One row: a layout at a number of ranks."""
    numbers = layout.groups * (4 * channels + 1)
    sent = ring_bytes(numbers * NUMBER, layout.members)
    hops = 2 * 2 * math.ceil(math.log2(max(layout.members, 2)))  # two all-reduces, there and back along a tree
    values = {
        "numbers": numbers,
        "MB sent": sent / 1e6,
        "model ms": 1e3 * (hops * latency + sent / speed),
        "MB if rows move": 4 * (layout.members - 1) / layout.members * share / 1e6,
        "MB all-gather": 6 * (layout.members - 1) * share / 1e6,
        "rows a group": rows * layout.members / layout.groups,
        **simulate(layout, rows),
    }
    return {
        "section": "layouts",
        "title": title,
        "setting": {"ranks": ranks, "members": layout.members, "groups": layout.groups},
        "variant": f"{ranks:,} ranks: {layout.name}",
        "values": values,
        "bars": [],
    }


if __name__ == "__main__":
    sys.exit(main())
