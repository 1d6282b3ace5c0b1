"""How every loader of this package is made, and how its processes live."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from leakfree.signals import held_back, outlast_signals

__all__ = ["Loader"]


class Loader(DataLoader[Any]):
    """A ``DataLoader`` that draws nothing from the global generator, and whose processes outlast signals to the job.

    They end with this process, or by it.

    Args:
        options: other arguments of ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], *, num_workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # Its own: a loader otherwise draws a seed for its processes from the global generator at each start, and a
            # resumed run would differ from an uninterrupted one in everything random after it.
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=partial(outlast_signals, parent=os.getpid()),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with held_back():  # until a process has said what it does with them
            return super().__iter__()
