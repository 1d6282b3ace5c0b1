"""LARS, as lightly has it."""

from __future__ import annotations

from typing import Any

import torch
from lightly.utils.lars import LARS

__all__ = ["lars"]


def lars(groups: list[dict[str, Any]], *, lr: float, momentum: float) -> torch.optim.Optimizer:
    """LARS for large batches (You et al. 2017); groups without weight decay are not adapted (Chen et al. 2020, B.6)."""
    optimizer: torch.optim.Optimizer = LARS(groups, lr=lr, momentum=momentum)
    return optimizer
