"""Reports: runs side by side, as a page and on the console. Reads the records of runs; never loads torch."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from rich.console import Console

from leakfree.errors import RunError
from leakfree.records import write_atomic
from leakfree.report.console import print_comparison
from leakfree.report.html import render
from leakfree.report.runs import find_variant, group_runs, load_runs

__all__ = ["compare"]


def compare(runs: list[str], output: str | None = None, title: str | None = None, baseline: str | None = None) -> None:
    """Print a comparison of runs and write it as a self-contained HTML page.

    Runs whose configs differ only in seed and output folder are one variant: its numbers are the mean and
    the range over its runs. The order is that of ``runs``; runs of several tasks have a section for each. Numbers
    that a run does not have are shown as n.a. with the reason its record gives; unfinished runs are shown with a mark.

    Args:
        runs: output folders of runs (or paths of their ``record.json``).
        output: the page to write, ``*.html``; None prints only. Written atomically; missing parents are made.
        title: heading of the page.
        baseline: label, folder name or path of the run that differences refer to, in the section of its task.

    Raises:
        RunError: no run, a folder without a usable record, a folder given twice, an unknown baseline, or an output
            that cannot be written.
    """
    target = None if output is None else _checked_output(output)
    variants = group_runs(load_runs(runs))
    reference = None if baseline is None else find_variant(variants, baseline)
    if target is not None:  # before printing: a closed pipe must not cost the page
        _write(
            target, render(variants, title=title, baseline=reference, command=_command(runs, output, title, baseline))
        )
    console = Console(highlight=False, markup=False, emoji=False)
    print_comparison(variants, console, reference)
    if target is not None:
        console.print(f"\nreport: {target}", soft_wrap=True)


def _write(target: Path, page: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, page.encode("utf-8", "replace"))  # a folder's name may hold bytes that are no text
    except OSError as error:
        raise RunError(f"{target}: the report cannot be written: {error.strerror or error}") from error


def _checked_output(output: str) -> Path:
    target = Path(output)
    if os.path.isdir(target):
        raise RunError(f"{output}: is a folder; give a file, such as {target / 'report.html'}")
    if target.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{output}: the report is a page: give a name that ends in .html")
    return target


def _command(runs: list[str], output: str | None, title: str | None, baseline: str | None) -> str:
    """The command line that makes this page again."""
    words = ["leakfree", "compare", *runs]
    for flag, value in (("-o", output), ("--title", title), ("--baseline", baseline)):
        words += [] if value is None else [flag, value]
    return shlex.join(words)
