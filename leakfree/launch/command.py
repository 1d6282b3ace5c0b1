"""``leakfree launch``: from a command line to jobs, or to one line that says why not."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from leakfree.launch.options import JobOptions
from leakfree.launch.runs import Run, expand_runs
from leakfree.launch.submit import Submitted, run_here, script_of, submit
from leakfree.launch.validate import check_cluster, check_runs

__all__ = ["launch"]


def launch(
    sources: Sequence[str | os.PathLike[str]],
    overrides: Sequence[str] = (),
    options: JobOptions | None = None,
    *,
    seeds: int | None = None,
    output: str | None = None,
    resume: bool = False,
    convert_ranks: bool = False,
    dry_run: bool = False,
    command: Sequence[str] = (),
) -> int:
    """Check the runs of some configs and hand them to ``options.launcher``; tells what it did, and how to follow it.

    Args:
        sources, overrides, seeds, output: which runs; see :func:`leakfree.launch.runs.expand_runs`.
        resume: go on with what lies in the output folders; a run that is finished is left out.
        convert_ranks: also where it was begun with another number of ranks; see :func:`leakfree.training.train`.
        dry_run: check everything and print the sbatch script; nothing is submitted or written.
        command: the words of the command line, for ``launch.json``.

    Returns:
        The exit code: 0, or that of the training with ``debug``.

    Raises:
        LeakfreeError: a mistake; nothing was submitted.
        Stopped, KeyboardInterrupt: of the training with ``debug``.
    """
    options = options or JobOptions()
    runs = expand_runs(sources, overrides, seeds=seeds, output=output)
    left = check_runs(runs, options, resume=resume, convert_ranks=convert_ranks)
    if left and options.launcher == "slurm":
        check_cluster(left, options, must_exist=not dry_run)
    for run in runs:
        if run not in left:
            print(f"{run.folder}: this run is finished")
    if not left:
        return 0
    if options.launcher != "slurm" and (unused := options.for_slurm_only()):
        print(f"not used by --launcher {options.launcher}: {', '.join(unused)}")
    if dry_run:
        _show_plan(left, options)
        return 0
    if options.launcher == "debug":
        return run_here(left, options, command, convert_ranks=convert_ranks)
    _show_jobs(submit(left, options, command, convert_ranks=convert_ranks), options)
    return 0


def _show_plan(runs: Sequence[Run], options: JobOptions) -> None:
    if options.launcher == "slurm":
        print(script_of(runs, options), end="")
        print("\n# not submitted (--dry-run); these runs would be its " + ("elements:" if len(runs) > 1 else "work:"))
    else:
        where = "in the background of this machine" if options.launcher == "local" else "in this process"
        print(f"# not started (--dry-run); these runs would be trained {where}:")
    for number, run in enumerate(runs):
        print(f"# {number}: {run.source} seed={run.config.seed} -> {run.folder}")


def _show_jobs(jobs: Sequence[Submitted], options: JobOptions) -> None:
    trainer = jobs[0].run.config.trainer
    kind = "GPU" if trainer.num_gpus else "CPU"
    size = f"{trainer.num_machines} x {trainer.ranks_per_machine} ranks ({kind})"
    main = jobs[0].job_id.partition("_")[0]
    what = {"slurm": f"submitted job {main}", "local": f"started process {main}"}[options.launcher]
    print(f"{what}: {len(jobs)} {'run' if len(jobs) == 1 else 'runs'}, {size} each")
    for job in jobs:
        print(f"  {job.job_id}  {job.run.folder}  log: {job.log}")
    folders = " ".join(shlex.quote(str(job.run.folder)) for job in jobs)
    kill = f"pkill -TERM -P {main}" if options.setup else f"kill {main}"  # after setup lines it is a shell's child
    end = f"scancel {main}" if options.launcher == "slurm" else f"{kill}    # saves, then ends"
    print(f"follow:\n  leakfree status {folders}\n  tail -F {shlex.quote(str(jobs[0].log))}\nend:\n  {end}")
