"""The numbers of a training as it goes: ``metrics.json``, TensorBoard, one line per period, the record's timing."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from leakfree.distributed import all_gather_objects, get_rank, get_world_size, is_distributed
from leakfree.records import read_metrics
from leakfree.training.logs import LOG

__all__ = ["Journal", "peak_memory_mib", "timing_of"]


class Journal:
    """Measures steps, and writes a row every ``period`` steps and at the end.

    A row holds the losses averaged over the period's steps and over ranks, medians of rank 0's times, and
    its peak memory. All ranks call it alike; rank 0 writes.

    Args:
        period, max_steps: steps.
        start_step: completed when this session began.
    """

    def __init__(self, folder: Path, period: int, max_steps: int, start_step: int, device: torch.device) -> None:
        self.path = folder / "metrics.json"
        self.period = period
        self.max_steps = max_steps
        self.device = device
        self.seconds = 0.0  # in steps of this session
        self._writes = get_rank() == 0
        # what an earlier session showed beyond the point where this one continues is hidden
        self._board = SummaryWriter(str(folder), purge_step=start_step + 1) if self._writes else None
        self._sums: dict[str, Tensor] = {}
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._recent: deque[float] = deque(maxlen=200)
        self._waiting_since = self._began = time.perf_counter()

    def waiting(self) -> None:
        """The loop is ready for the next batch."""
        self._waiting_since = time.perf_counter()

    def fetched(self) -> None:
        """The batch is here."""
        self._began = time.perf_counter()

    def stepped(self, step: int, losses: dict[str, Tensor], lr: float) -> None:
        """``step`` steps are complete."""
        took = time.perf_counter() - self._waiting_since
        self.seconds += took
        self._steps.append(took)
        self._waits.append(self._began - self._waiting_since)
        self._recent.append(took)
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        if step % self.period == 0 or step == self.max_steps:
            self._write_period(step, lr)

    def _write_period(self, step: int, lr: float) -> None:
        means = self._means()
        row = {
            "step": step,
            **means,
            "lr": lr,
            "seconds_per_step": statistics.median(self._steps),
            "data_seconds_per_step": statistics.median(self._waits),
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        self.write(row)
        if self._writes:
            LOG.info("%s", self._line(row, means), extra={"periodic": True})
        self._sums, self._steps, self._waits = {}, [], []

    def _means(self) -> dict[str, float]:
        total = torch.stack([value.float() for value in self._sums.values()])
        if is_distributed():
            dist.all_reduce(total)
        return dict(zip(self._sums, (total / (len(self._steps) * get_world_size())).tolist(), strict=True))

    def _line(self, row: dict[str, Any], means: dict[str, float]) -> str:
        left = statistics.median(self._recent) * (self.max_steps - row["step"])
        losses = "  ".join(f"{name}: {value:.4g}" for name, value in means.items())
        return (
            f"eta: {timedelta(seconds=int(left))}  step: {row['step']}/{self.max_steps}  {losses}  "
            f"time: {row['seconds_per_step']:.4f}  data_time: {row['data_seconds_per_step']:.4f}  "
            f"lr: {row['lr']:.4g}  max_mem: {row['peak_memory_mib']:.0f}M"
        )

    def state_dict(self) -> dict[str, Any]:
        """The part of the period that is done, of each rank: for a checkpoint in the middle of it. A collective."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"ranks": all_gather_objects({"sums": sums, "step_times": self._steps, "wait_times": self._waits})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the period where :meth:`state_dict` was taken. Of another number of ranks each gets the mean."""
        ranks = state["ranks"]
        mine = ranks[get_rank() if len(ranks) == get_world_size() else 0]
        self._steps, self._waits = list(mine["step_times"]), list(mine["wait_times"])
        self._sums = {name: value.to(self.device) for name, value in mine["sums"].items()}
        if len(ranks) != get_world_size():
            for name in self._sums:
                self._sums[name] = torch.stack([item["sums"][name] for item in ranks]).mean(0).to(self.device)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to ``metrics.json`` and show its numbers in TensorBoard; it must have ``step``."""
        if self._board is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()  # a killed session must not take points with it that its checkpoint is past

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held: on a GPU by torch's allocator, else resident (MiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def timing_of(folder: Path, steps: int, seconds: float) -> dict[str, float | None]:
    """The timing of a record after ``steps`` steps, from the rows that the run's sessions wrote of these."""
    rows = [row for row in read_metrics(folder) if "seconds_per_step" in row and row["step"] <= steps]

    def over_rows(name: str, reduce: Any) -> float | None:
        return reduce([row[name] for row in rows]) if rows else None

    return {
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": over_rows("seconds_per_step", statistics.median),
        "data_seconds_per_step": over_rows("data_seconds_per_step", statistics.median),
        "peak_memory_mib": over_rows("peak_memory_mib", max),
    }
