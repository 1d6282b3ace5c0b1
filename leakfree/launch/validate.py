"""Everything that can be known to be wrong before a job waits in a queue. Changes nothing, anywhere."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from leakfree.config import RunConfig
from leakfree.errors import CheckpointError, LeakfreeError, RunError, choices
from leakfree.launch.options import JobOptions, LaunchError
from leakfree.launch.runs import Run
from leakfree.launch.slurm import partitions
from leakfree.sealed import damage
from leakfree.training.folder import start_of_training
from leakfree.training.lock import lock_owner

__all__ = ["check_cluster", "check_runs"]

_GPU_OPTION = re.compile(r"gpu(?::[^:,=]+)?(?::(\d+))?\Z")


def check_runs(runs: Sequence[Run], options: JobOptions, *, resume: bool, convert_ranks: bool = False) -> list[Run]:
    """The runs that are left to do, of those that :func:`leakfree.launch.runs.expand_runs` has loaded.

    Args:
        resume: a folder may hold the beginning of its run; a finished run is left out.
        convert_ranks: that beginning may be of another number of ranks; see :func:`leakfree.training.train`.

    Raises:
        LeakfreeError: of the first run that cannot start: its data, its initial weights, its output folder, or a
            number of machines and ranks that the launcher cannot give.
    """
    left = []
    for run in runs:
        try:
            _check_size(run.config, options)
            _check_data(run.config)
            _check_weights(run.config)
            finished = _check_folder(run.config, resume, convert_ranks)
        except LeakfreeError as error:
            if len(runs) == 1:
                raise
            raise type(error)(f"{run.name}: {error}") from error
        if not finished:
            left.append(run)
    _check_array(left, options)
    _check_writable(Path(options.log_dir), "--log-dir")
    return left


def ranks(config: RunConfig) -> tuple[int, int, int]:
    """Machines, ranks on each, GPUs on each."""
    return config.trainer.num_machines, config.trainer.ranks_per_machine, config.trainer.num_gpus


def _check_size(config: RunConfig, options: JobOptions) -> None:
    if options.launcher != "slurm" and config.trainer.num_machines > 1:
        raise LaunchError(
            f"--num-machines: {config.trainer.num_machines} machines, but --launcher {options.launcher} has this one "
            "alone; use --num-machines 1, or --launcher slurm"
        )


def _check_array(runs: Sequence[Run], options: JobOptions) -> None:
    if options.launcher != "slurm":
        return
    for run in runs:
        if ranks(run.config) != ranks(runs[0].config):
            shown = [
                f"{item.name} has {count[0]} x {count[1]} ({'GPU' if count[2] else 'CPU'})"
                for item, count in ((item, ranks(item.config)) for item in (runs[0], run))
            ]
            raise LaunchError(
                f"the runs of one array need the same machines and ranks: {', '.join(shown)}; give --num-machines and "
                "--num-gpus or --num-processes, or launch them one by one"
            )


def _check_data(config: RunConfig) -> None:
    """Whether what is named by paths is there. What is embedded needs nothing, and then torch is not imported."""
    for split in ("train", "val"):
        part = getattr(config.data, split)
        if part.name in ("digits", "digit_scenes"):
            continue
        from leakfree import data

        if config.task == "detection":
            data.coco_paths(config.data, split)  # type: ignore[arg-type]
        else:
            data.images_path(config.data, split)  # type: ignore[arg-type]


def _check_weights(config: RunConfig) -> None:
    weights = str(getattr(getattr(config, "model", None), "weights", ""))
    if not weights:
        return
    if not Path(weights).is_file():
        there = "is not a file" if Path(weights).exists() else "does not exist"
        raise CheckpointError(f"model.weights: {weights} {there}; name a checkpoint, or train what writes it first")
    if fault := damage(weights):
        raise CheckpointError(f"model.weights: {weights} is damaged, or not a checkpoint: {fault}")


def _check_folder(config: RunConfig, resume: bool, convert_ranks: bool) -> bool:
    """Whether the run in the output folder is finished."""
    folder = Path(config.output_dir)
    _check_writable(folder, "output_dir")
    if not folder.exists():
        return False
    _check_unlocked(folder)
    start = start_of_training(
        config, folder, config.trainer.num_ranks, resume=resume, convert_ranks=convert_ranks, look_only=True
    )
    return start.finished


def _check_unlocked(folder: Path) -> None:
    owner = lock_owner(folder)
    if owner is not None and owner.alive:
        raise RunError(
            f"output_dir: {folder} is being written by {owner}; wait for it, stop it, or choose another output_dir"
        )


def _check_writable(folder: Path, key: str) -> None:
    """``folder``, or the folder that it would be made in, is one and can be written."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise RunError(f"{key}: {folder} cannot be used: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{key}: {folder} cannot be used: {there} cannot be written by this user")


# ------------------------------------------------------------------------------------- the cluster


def check_cluster(runs: Sequence[Run], options: JobOptions, *, must_exist: bool = True) -> None:
    """What sbatch would refuse, or leave in the queue for ever, as far as ``sinfo`` tells.

    Args:
        must_exist: false where nothing is submitted.

    Raises:
        LaunchError: Slurm is not here, a needed option is not given, or the partition cannot hold such a job.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing and must_exist:
        raise LaunchError(
            f"no Slurm here ({' and '.join(missing)} not found): run this on the cluster's login node, or use "
            "--launcher local (in the background of this machine) or --launcher debug"
        )
    if options.minutes is None:
        raise LaunchError(
            "--time is required with --launcher slurm: how long one job may run, like --time 8:00:00; "
            "a training that needs longer goes on in the next job by itself"
        )
    machines, tasks, gpus = ranks(runs[0].config)
    _check_gpu_options(gpus, options)
    if missing:
        return
    known = partitions()
    if not known:  # the controller does not answer, or hides its partitions: sbatch will tell
        return
    if options.partition is None:
        chosen = [item for item in known.values() if item.is_default]
        if not chosen:
            raise LaunchError(
                f"--partition is required: this cluster has no default; there are: {', '.join(sorted(known))}"
            )
    else:
        names = options.partition.split(",")  # Slurm takes the first that can start it
        for name in names:
            if name not in known:
                raise LaunchError(f"--partition: no partition {name!r}; there are: {choices(name, known)}")
        chosen = [known[name] for name in names]
    for part in chosen:
        if not part.is_up:
            raise LaunchError(f"--partition: {part.name} is down; jobs would wait for ever")
        if part.minutes is not None and options.minutes > part.minutes:
            raise LaunchError(
                f"--time: {_clock(options.minutes)} is more than the {_clock(part.minutes)} of partition {part.name}; "
                f"use at most {_clock(part.minutes)}: a training that needs longer goes on in the next job by itself"
            )
        if machines > part.nodes:
            raise LaunchError(f"--num-machines: {machines}, but partition {part.name} has {part.nodes}")
        cpus = tasks * (options.cpus_per_task or 1)
        if part.cpus is not None and cpus > part.cpus and "overcommit" not in options.sbatch:
            raise LaunchError(
                f"--cpus-per-task: {tasks} ranks of {options.cpus_per_task or 1} CPUs need {cpus} on each machine, "
                f"those of partition {part.name} have {part.cpus}"
            )
        wanted = set(re.findall(r"[\w.:/+-]+", re.sub(r"\*\d+", "", options.constraint or "")))
        for name in sorted(wanted - part.features):
            there = choices(name, part.features) if part.features else "none"
            raise LaunchError(
                f"--constraint: no machine of partition {part.name} has the feature {name!r}; features: {there}"
            )


def _check_gpu_options(gpus: int, options: JobOptions) -> None:
    """GPUs asked for by ``--sbatch gres=gpu:...`` and those of the config are the same."""
    for word in str(options.sbatch.get("gres", "")).split(","):
        match = _GPU_OPTION.match(word)
        if match is None:
            continue
        count = int(match[1] or 1)
        if count != gpus:
            raise LaunchError(
                f"--sbatch gres={word}: {count} GPUs on each machine, but trainer.num_gpus is {gpus}; "
                f"give --num-gpus {count}, or leave gres out"
            )


def _clock(minutes: int) -> str:
    days, rest = divmod(minutes, 1440)
    return (f"{days}-" if days else "") + time.strftime("%H:%M:%S", time.gmtime(60 * rest))
