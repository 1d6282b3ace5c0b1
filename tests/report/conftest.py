"""Fixtures of the report's tests: folders of runs from the measured regime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.regime import REGIME, curve_rows, regime_record, write_run


@pytest.fixture
def regime_runs(tmp_path: Path) -> Callable[..., list[str]]:
    """``regime_runs(num_seeds=1, names=None)`` writes the folders and returns their paths."""

    def write(num_seeds: int = 1, names: tuple[str, ...] = tuple(REGIME)) -> list[str]:
        return [
            write_run(tmp_path / "runs" / f"{name}_seed{seed}", regime_record(name, seed), curve_rows(name, seed))
            for name in names
            for seed in range(num_seeds)
        ]

    return write
