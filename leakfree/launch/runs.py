"""Which runs a command asks for: every config with every seed, each with a name and a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leakfree.config import RunConfig, load_config
from leakfree.errors import ConfigError

__all__ = ["Run", "expand_runs", "run_name"]

_INSTEAD = {"output_dir": "--output", "seed": "--seeds"}


@dataclass(frozen=True)
class Run:
    """One run of a command: a config file with the overrides of the line, resolved."""

    name: str
    source: Path
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)


def run_name(source: str | os.PathLike[str], seed: int = 0) -> str:
    """The name of a run among others: its config's file, and its seed unless that is 0.

    >>> run_name("configs/contrastive/digits/moco_bn.yaml", 3)
    'moco_bn_seed3'
    """
    return Path(source).stem + (f"_seed{seed}" if seed else "")


def expand_runs(
    sources: Sequence[str | os.PathLike[str]],
    overrides: Sequence[str] = (),
    *,
    seeds: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> list[Run]:
    """Every config with every seed, loaded and checked; configs in the order given, seeds inside.

    Args:
        sources: config files.
        overrides: ``key.path=value`` texts, for all runs.
        seeds: how many: 0, 1, ...; None leaves each config its own.
        output: folder of the runs' folders, named by :func:`run_name`. None: each config's ``output_dir``, with
            ``_seedK`` behind it for seed K > 0.

    Raises:
        ConfigError: a config that does not load, an override of what differs between the runs, two runs in one folder.
    """
    if not sources:
        raise ConfigError("no run asked for: give at least one config file")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds: must be at least 1, got {seeds}")
    for text in overrides:
        key = text.partition("=")[0].strip()
        if (key == "seed" and seeds is not None) or (key == "output_dir" and output is not None):
            raise ConfigError(f"{text}: {key} is another one for each run, given by {_INSTEAD[key]}")
    runs: list[Run] = []
    for source in map(Path, sources):
        for seed in [0] if seeds is None else range(seeds):
            config = load_config(source, [*overrides, *([] if seeds is None else [f"seed={seed}"])])
            name = run_name(source, seed)
            if output is not None:
                config.output_dir = str(Path(output) / name)
            elif seed:
                config.output_dir = f"{config.output_dir.rstrip('/')}_seed{seed}"
            runs.append(Run(name, source, config))
    _check_folders(runs, output is not None)
    return runs


def _check_folders(runs: list[Run], named_by_file: bool) -> None:
    taken: dict[str, Run] = {}
    for run in runs:
        place = os.path.realpath(run.folder)
        if place in taken:
            one = taken[place].source
            why = "runs are named by their config's file, and these have one name" if named_by_file else "output_dir"
            remedy = "" if named_by_file else "; --output DIR gives each run a folder of its own"
            raise ConfigError(f"{why}: {one} and {run.source} would both write to {run.folder}{remedy}")
        taken[place] = run
