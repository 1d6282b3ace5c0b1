"""What is asked of the cluster, apart from the runs: typed, checked, and read from the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from leakfree.errors import LeakfreeError

__all__ = ["JobOptions", "LaunchError", "Launcher", "add_flags", "given_flags", "options_from"]

Launcher = Literal["slurm", "local", "debug"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)

_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*\Z")
_JOB_NAME = re.compile(r"[\w.@+-]+\Z")

# sbatch options that a flag of ours, or the config, already says.
_OWNED = {
    "account": "--account",
    "array": "--seeds, several configs, and --array-parallelism",
    "chdir": "the folder that you submit from",
    "constraint": "--constraint",
    "cpus-per-task": "--cpus-per-task",
    "error": "--log-dir",
    "gpus": "--num-gpus",
    "gpus-per-node": "--num-gpus",
    "gpus-per-task": "--num-gpus: every rank must see the GPUs of its machine",
    "job-name": "--name",
    "mem": "--mem",
    "nodes": "--num-machines",
    "ntasks": "--num-machines and --num-gpus or --num-processes",
    "ntasks-per-node": "--num-gpus or --num-processes",
    "open-mode": "nothing: logs are appended to, so that a requeued job keeps them",
    "output": "--log-dir",
    "partition": "--partition",
    "qos": "--qos",
    "signal": "--signal-delay",
    "time": "--time",
}
_OF_SLURM = (
    *("minutes", "partition", "constraint", "account", "qos", "cpus_per_task", "mem_gb", "array_parallelism", "sbatch"),
    *("max_requeues", "signal_delay", "preflight_seconds"),
)
_SET_BY_US = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(LeakfreeError):
    """Something asked of the cluster that it cannot give, or that contradicts the runs."""


@dataclass(frozen=True)
class JobOptions:
    """Where and how runs become jobs. Machines and ranks are in each run's config (``trainer``).

    Attributes:
        launcher: slurm: an sbatch job; local: a process in the background of this machine; debug: this process.
        name: of the job; "" = that of its run, or "leakfree" for several.
        log_dir: where each submission gets a folder of its own (mode 0700): logs, resolved configs, submitit's files.
        minutes: time limit of a job; None = none given.
        cpus_per_task: CPU cores of each rank; None = the cluster's default.
        mem_gb: memory on each machine, GB; None = the cluster's default.
        array_parallelism: runs of an array that may run at once; None = all.
        sbatch: further options of sbatch by their long name; True for one without a value.
        env: environment variables of the ranks.
        setup: shell lines before the ranks start.
        max_requeues: how often a job that meets its time limit is put back into the queue. Preemptions do not count.
        signal_delay: seconds before the time limit at which Slurm warns the job.
        preflight_seconds: how long ranks wait for each other before the training.

    Raises:
        LaunchError: a value out of its range, or an option that a flag of ours already says.
    """

    launcher: Launcher = "slurm"
    name: str = ""
    log_dir: str = "output/jobs"
    minutes: int | None = None
    partition: str | None = None
    constraint: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    array_parallelism: int | None = None
    sbatch: Mapping[str, str | bool] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    max_requeues: int = 1000
    signal_delay: int = 90
    preflight_seconds: int = 60

    def __post_init__(self) -> None:
        for name, low in (
            ("minutes", 1),
            ("cpus_per_task", 1),
            ("array_parallelism", 1),
            ("max_requeues", 0),
            ("signal_delay", 1),
            ("preflight_seconds", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise LaunchError(f"{_flag(name)}: must be at least {low}, got {value}")
        if self.mem_gb is not None and not 0 < self.mem_gb < 2**20:
            raise LaunchError(f"--mem: must be a positive number of GB, got {self.mem_gb:g}")
        if self.name and not _JOB_NAME.match(self.name):
            raise LaunchError(f"--name: got {self.name!r}; use letters, digits, and . _ - + @")
        for key, value in self.env.items():
            if not _ENVIRONMENT_NAME.match(key):
                raise LaunchError(f"--env: {key!r} cannot be the name of a variable; give NAME=VALUE")
            if key in _SET_BY_US:
                raise LaunchError(f"--env: {key} is set for each rank from the allocation")
            _one_line(value, f"--env {key}")
        for key, given in self.sbatch.items():
            if not _OPTION_NAME.match(key):
                raise LaunchError(f"--sbatch: {key!r} is no option of sbatch; give its long name, like exclude=n1")
            if key in _OWNED:
                raise LaunchError(f"--sbatch {key}: is given by {_OWNED[key]}")
            _one_line(str(given), f"--sbatch {key}")
        for name in ("partition", "constraint", "account", "qos"):
            _one_line(getattr(self, name) or "", f"--{name}")
        for line in self.setup:
            _one_line(line, "--setup")
        if self.launcher == "slurm" and self.minutes is not None and self.signal_delay >= 60 * self.minutes:
            raise LaunchError(
                f"--signal-delay: {self.signal_delay} seconds before the end is before the start: "
                f"the time limit is {60 * self.minutes} seconds"
            )

    def for_slurm_only(self) -> list[str]:
        """The flags of this that mean nothing without Slurm."""
        default = JobOptions()
        return [_flag(name) for name in _OF_SLURM if getattr(self, name) != getattr(default, name)]


def _flag(field_name: str) -> str:
    return {"minutes": "--time", "mem_gb": "--mem"}.get(field_name, "--" + field_name.replace("_", "-"))


def _one_line(text: str, what: str) -> None:
    """A line break in a value would be another line of the script."""
    if any(not (char.isprintable() or char == "\t") for char in text):
        raise LaunchError(f"{what}: must be one line of printable characters, got {text!r}")


# -------------------------------------------------------------------------------- the command line


def add_flags(parser: argparse.ArgumentParser, *, default_launcher: Launcher | None) -> None:
    """Add the flags of :class:`JobOptions`, in groups. What is not given stays None."""
    group = parser.add_argument_group("where to run")
    group.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default=default_launcher,
        help="slurm: an sbatch job; local: a background process of this machine; debug: this process, after the same "
        f"checks. Default: {default_launcher or 'none of them, train here and now'}",
    )
    group.add_argument("--dry-run", action="store_true", default=None, help="check all, print the sbatch script, stop")
    group = parser.add_argument_group("the allocation (slurm)")
    group.add_argument("--partition", metavar="P", help="as 'sinfo' names it")
    group.add_argument("--constraint", metavar="C", help="features that the machines must have")
    group.add_argument(
        "--time",
        metavar="MINUTES|[D-]HH:MM:SS",
        dest="minutes",
        type=_minutes,
        help="limit of one job (required). A training that needs longer saves itself before the end and is requeued",
    )
    group.add_argument("--cpus-per-task", metavar="C", type=int, help="CPU cores of each rank: threads, loader workers")
    group.add_argument("--mem", metavar="GB", dest="mem_gb", type=float, help="memory on each machine")
    group.add_argument("--account", metavar="A", help="who pays")
    group.add_argument("--qos", metavar="Q", help="quality of service")
    group.add_argument("--array-parallelism", metavar="N", type=int, help="at most N runs of an array at once")
    group.add_argument(
        "--sbatch",
        metavar="KEY[=VALUE]",
        action="append",
        help="any other option of sbatch, by its long name; repeatable",
    )
    group = parser.add_argument_group("the job")
    group.add_argument("--name", metavar="NAME", help="of the job; default: the run's")
    group.add_argument("--env", metavar="NAME=VALUE", action="append", help="environment variable; repeatable")
    group.add_argument(
        "--setup",
        metavar="'LINE'",
        action="append",
        help="shell line before the ranks start (module load ...); repeatable",
    )
    group.add_argument("--log-dir", metavar="DIR", help="shared folder for the jobs' logs; default: output/jobs")
    group.add_argument(
        "--max-requeues",
        metavar="N",
        type=int,
        help="requeues after a time limit; preemptions do not count; default: 1000",
    )
    group.add_argument(
        "--signal-delay", metavar="S", type=int, help="seconds to save before the time limit; default: 90"
    )
    group.add_argument(
        "--preflight-seconds",
        metavar="S",
        type=int,
        help="how long ranks wait for each other at the start; default: 60",
    )


def given_flags(args: argparse.Namespace) -> list[str]:
    """The flags of :func:`add_flags` that were given, but ``--launcher``."""
    names = ["dry_run", *(name for name in JobOptions.__dataclass_fields__ if name != "launcher")]
    return [_flag(name) for name in names if getattr(args, name, None) is not None]


def options_from(args: argparse.Namespace) -> JobOptions:
    """The options of a command line that was read with :func:`add_flags`.

    Raises:
        LaunchError: see :class:`JobOptions`; a pair without ``=``, or a name given twice.
    """
    values = {
        name: value for name in JobOptions.__dataclass_fields__ if (value := getattr(args, name, None)) is not None
    }
    if "env" in values:
        values["env"] = _pairs(values["env"], "--env", bare=False)
    if "sbatch" in values:
        values["sbatch"] = {
            key.lstrip("-").replace("_", "-"): value
            for key, value in _pairs(values["sbatch"], "--sbatch", bare=True).items()
        }
    if "setup" in values:
        values["setup"] = tuple(values["setup"])
    return JobOptions(**values)


def _pairs(texts: Iterable[str], flag: str, *, bare: bool) -> dict[str, str | bool]:
    pairs: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals or bare):
            raise LaunchError(f"{flag}: got {text!r}, expects NAME=VALUE")
        if key in pairs:
            raise LaunchError(f"{flag}: {key} is given twice")
        pairs[key] = value if equals else True
    return pairs


def _minutes(text: str) -> int:
    """Minutes of ``90``, ``1:30:00`` or ``2-00:00:00``; begun minutes count."""
    match = re.match(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?\Z", text)
    if re.match(r"\d+\Z", text):
        return int(text)
    if match is None or (match[1] is None and match[4] is None):  # 1:30 is minutes to Slurm, hours to people
        raise argparse.ArgumentTypeError(f"got {text!r}, expects MINUTES, HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + -(-seconds // 60)
