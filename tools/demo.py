#!/usr/bin/env python
"""`make demo`: see the leaks of batch norm, and see them gone, on the embedded digits.

Detection: builds DigitScenes, trains one backbone on mixed-class scenes, then the same Mask R-CNN heads with the leaky
BatchNorm and with each cure, each under 2 ranks. Contrastive learning: trains MoCo with and without ShuffleBN.
Evaluates and compares them. The same command again continues what is unfinished and reuses what is finished.

    python tools/demo.py [--output output/digits] [--data datasets] [--seeds 1] [--jobs N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from sweep import Run, guarded, work

from leakfree.report import compare
from leakfree.training.ranks import usable_cores

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRETRAIN = "pretrain"
HEADS = [
    "mask_rcnn_small_BNhead_leaky",
    "mask_rcnn_small_SyncBNhead",
    "mask_rcnn_small_BNhead_shuffle_statistics",
    "mask_rcnn_small_BNhead_shuffle_features",
    "mask_rcnn_small_GNhead",
    "mask_rcnn_small_BNhead_frozen_tail",
]
END_TO_END = ["mask_rcnn_small_BNhead_leaky_e2e", "mask_rcnn_small_BNhead_shuffle_statistics_e2e"]
CONTRASTIVE = ["moco_bn", "moco_shuffle_bn"]
RANKS = 2  # of each detector


def plan(output: Path, data: Path, seeds: int) -> tuple[Run, list[Run]]:
    """The pre-training of detectors, and the runs of the report in its order."""

    def run(task: str, config: str, seed: int, *overrides: str, ranks: int = RANKS) -> Run:
        folder = output / (config.removeprefix("mask_rcnn_small_") + (f"_seed{seed}" if seed else ""))
        path = CONFIGS / task / "digits" / f"{config}.yaml"
        return Run(path, folder, [f"data.root={data}", f"seed={seed}", *overrides], ranks)

    weights = f"model.weights={output / PRETRAIN / 'model_final.pt'}"
    heads = [run("detection", config, seed, weights) for config in HEADS for seed in range(seeds)]
    whole = [run("detection", config, 0, weights) for config in END_TO_END]
    contrastive = [run("contrastive", config, seed, ranks=1) for config in CONTRASTIVE for seed in range(seeds)]
    return run("detection", PRETRAIN, 0), [*heads, *whole, *contrastive]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/digits"), help="folder of the runs and the report")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="where DigitScenes are written")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each run but the end-to-end ones")
    parser.add_argument("--jobs", type=int, default=0, help="cores to use; default: all")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    start = time.monotonic()
    cores = arguments.jobs or max(1, int(usable_cores()))
    report = arguments.output / "report.html"

    def demo() -> None:
        pretrain, runs = plan(arguments.output, arguments.data, arguments.seeds)
        console.print(f"{1 + len(runs)} runs on {cores} cores; logs in {arguments.output}/RUN/log.txt")
        work([pretrain], cores, console)
        work(runs, cores, console)
        compare(
            [str(run.folder) for run in runs],
            output=str(report),
            title="The leakage of batch norms: RoI heads of Mask R-CNN, and MoCo",
        )
        minutes = (time.monotonic() - start) / 60
        console.print(f"\n{minutes:.1f} minutes. The report: {report.resolve()}", highlight=False)

    return guarded("demo", demo, console)


if __name__ == "__main__":
    sys.exit(main())
