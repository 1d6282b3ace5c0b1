#!/usr/bin/env python
"""What judging features by their neighbours costs: weighted kNN against lightly's, recall@k and mAP beside.

knn     weighted kNN of all queries (CIFAR-10's sizes: a bank of 50,000 x 128, 10,000 queries, k = 200, 10 classes) by
        leakfree's two backends and by lightly's knn_predict in its batched use (batches of --batch queries against
        the transposed bank, all normalized before, which is timed in ours and theirs); "products alone" multiplies
        the same bank and queries and keeps nothing: what no exact search can go below.
recall  recall@1, 2, 4, 8 of the same queries, by both backends.
map     mAP of ranking the whole bank, for a tenth of the queries and of the bank.

"peak / S": the most memory beyond the inputs, S being their bytes. On the CPU it is resident memory (the kernel's
high-water mark, Linux only), each variant in a process of its own that has done the same on a few rows before; on a
GPU, torch's allocations. "unlike": predictions that are not the reference's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from measure import (
    Bar,
    Goal,
    Report,
    Shape,
    alternate,
    at_least_one,
    device_of,
    goal_bars,
    make_parser,
    parse,
    peak_bytes,
    progress,
    run_ranks,
    timed_row,
    usable_cores,
    wanted,
)
from torch import Tensor

from leakfree.evaluation import knn_predict, recall_at_k, retrieval_map

STANDARD: Shape = (50_000, 10_000, 128, 200)  # bank, queries, width, k
TEMPERATURE = 0.07
KS = (1, 2, 4, 8)
MEMORY_LIMIT = 200  # MB, of weighted kNN at the standard size
TIE = 1e-3  # relative distance of votes or averages that rounding may turn around

LIGHTLY, PRODUCTS = "knn_predict (lightly)", "products alone"
FAISS, TORCH = "faiss", "torch"
SECTIONS = {"knn": LIGHTLY, "recall": FAISS, "map": FAISS}  # and the reference of its ratios
GOALS = [Goal(FAISS, LIGHTLY, ">=", 1.7, [STANDARD])]

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def make_data(bank: int, queries: int, width: int, classes: int) -> Data:
    """Overlapping clusters: features and classes of bank and queries."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=generator)
    parts: list[Tensor] = []
    for count in (bank, queries):
        y = torch.randint(classes, (count,), generator=generator)
        parts += [centers[y] + 4 * torch.randn(count, width, generator=generator), y]
    return parts[0], parts[1], parts[2], parts[3]


def sizes(settings: argparse.Namespace, section: str) -> Shape:
    share = 10 if section == "map" else 1
    bank = max(settings.bank // share, 2)
    return bank, max(settings.queries // share, 1), settings.width, min(settings.neighbours, bank)


def variants(settings: argparse.Namespace, section: str) -> dict[str, Callable[[Data, int], Any]]:
    """Name: (data, k) -> what it finds.

    Raises:
        ImportError: lightly is not installed.
    """
    if section == "recall":
        return {name: lambda data, k, name=name: recall_at_k(*data, KS, backend=name) for name in (FAISS, TORCH)}
    if section == "map":
        return {name: lambda data, k, name=name: retrieval_map(*data, backend=name) for name in (FAISS, TORCH)}

    def ours(data: Data, k: int, backend: str) -> Tensor:
        classes = settings.classes
        options = {"k": k, "temperature": TEMPERATURE, "num_classes": classes, "backend": backend}
        return knn_predict(*data[:3], **options)[:, 0]

    def theirs(data: Data, k: int) -> Tensor:
        predict = peers.installed_lightly_knn()
        bank = F.normalize(data[0], dim=1).T.contiguous()
        batches = F.normalize(data[2], dim=1).split(settings.batch)
        options = {"num_classes": settings.classes, "knn_k": k, "knn_t": TEMPERATURE}
        return torch.cat([predict(batch, bank, data[1], **options)[:, 0] for batch in batches])

    def products(data: Data, k: int) -> None:
        bank, queries = (F.normalize(x, dim=1) for x in (data[0], data[2]))
        for batch in queries.split(1024):
            for tile in bank.split(1024):
                batch @ tile.T

    return {
        LIGHTLY: theirs,
        FAISS: lambda data, k: ours(data, k, FAISS),
        TORCH: lambda data, k: ours(data, k, TORCH),
        PRODUCTS: products,
    }


# --- Memory -----------------------------------------------------------------------------------------------------------


def resident_peak(settings: argparse.Namespace, section: str, name: str) -> int:
    """Bytes beyond the inputs that this process, which is new, comes to hold; -1 where the system does not tell."""
    torch.set_num_threads(settings.threads)
    run = variants(settings, section)[name]
    run(make_data(64, 16, settings.width, settings.classes), 8)  # libraries and threads
    bank, queries, width, k = sizes(settings, section)
    data = make_data(bank, queries, width, settings.classes)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        run(data, k)
        return _status("VmHWM") - before
    except OSError:
        return -1


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def resident_peaks(settings: argparse.Namespace, section: str, names: Sequence[str]) -> dict[str, int]:
    context, peaks = multiprocessing.get_context("forkserver"), {}
    context.set_forkserver_preload(["measure", "peers", "leakfree.evaluation"])  # new processes, but one import
    for name in names:
        progress(f"{section}, memory")(name)
        with context.Pool(1) as pool:
            peaks[name] = pool.apply(resident_peak, (settings, section, name))
    return peaks


# --- Time -------------------------------------------------------------------------------------------------------------


def unlike(found: Any, reference: Any) -> int:
    """How many answers are not the reference's (of measures: how many differ by more than rounding)."""
    if found is None:
        return 0
    if isinstance(found, Tensor):
        return int((found.cpu() != reference.cpu()).sum())
    pairs = [(found[k], reference[k]) for k in KS] if isinstance(found, dict) else [(found, reference)]
    return sum(abs(left - right) > TIE * abs(right) for left, right in pairs)


def compare(settings: argparse.Namespace, section: str, names: Sequence[str], peaks: dict[str, int]) -> dict[str, Any]:
    """One table."""
    device, reference, shape = device_of(settings), SECTIONS[section], sizes(settings, section)
    bank, queries, width, k = shape
    data: Data = tuple(x.to(device) for x in make_data(bank, queries, width, settings.classes))  # type: ignore[assignment]
    runs = {name: run for name, run in variants(settings, section).items() if name in names}
    reference = reference if reference in runs else names[0]
    title = f"{section}, bank {bank:,} × {width}, {queries:,} queries, {settings.classes} classes"
    if section == "knn":
        title += f", k = {k}"
    say = progress(title)
    expected = runs[reference](data, k)
    wrong = {name: unlike(run(data, k), expected) for name, run in runs.items()}
    steps = {name: lambda run=run: run(data, k) for name, run in runs.items()}
    rounds = alternate(steps, settings.repeats, device, max_pressure=settings.max_pressure, say=say)
    input_bytes = float(sum(x.numel() * x.element_size() for x in data))
    setting = {
        "ranks": 1,
        "threads": torch.get_num_threads(),
        "device": settings.device,
        "dtype": "float32",
        "shape": shape,
        "layout": "contiguous",
    }
    rows = []
    for name in runs:
        held = peaks[name] if device.type == "cpu" else peak_bytes(steps[name], device)
        peak = held / input_bytes if held >= 0 else float("nan")
        facts = {"section": section, "title": title, "setting": setting, "row_bytes": input_bytes, "peak": peak}
        row = timed_row(rounds, name, reference, **facts)
        row.bars = goal_bars(GOALS, row, rounds)
        if name in (FAISS, TORCH):
            row.bars.append(Bar(f"unlike {reference}", wrong[name], "<=", 0))
        if name == FAISS and section == "knn" and shape == STANDARD and device.type == "cpu" and held >= 0:
            row.bars.append(Bar("extra MB", held / 1e6, "<=", MEMORY_LIMIT))
        rows.append(row.as_dict())
    return {"timings": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", threads=usable_cores())
    names = ("bank", "queries", "width", "neighbours")
    for name, size, what in zip(names, STANDARD, ("rows", "rows", "numbers a row", "that vote"), strict=True):
        parser.add_argument(f"--{name}", type=at_least_one, default=size, metavar="N", help=f"{what} (default: {size})")
    parser.add_argument("--classes", type=at_least_one, default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--batch",
        type=at_least_one,
        default=512,
        metavar="N",
        help="queries that lightly gets at a time (default: 512)",
    )
    settings = parse(parser, arguments, list(SECTIONS), [LIGHTLY, FAISS, TORCH, PRODUCTS])
    if settings.neighbours > settings.bank:
        parser.error(f"--neighbours {settings.neighbours} is more than --bank {settings.bank}")
    report = Report("knn", settings)
    for section in settings.only_sections:
        chosen = [name for name in variants(settings, section) if name == SECTIONS[section] or wanted(name, settings)]
        if LIGHTLY in chosen:
            try:
                peers.installed_lightly_knn()
            except ImportError as error:
                report.add_skipped([(LIGHTLY, str(error))])
                chosen.remove(LIGHTLY)
        peaks = resident_peaks(settings, section, chosen) if settings.device == "cpu" else {}
        if -1 in peaks.values():
            report.add_skipped([("peak memory", "this system keeps no high-water mark that can be reset")])
        for found in run_ranks([(compare, section, chosen, peaks)], 1, settings):
            report.add_timings(found["timings"])
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
