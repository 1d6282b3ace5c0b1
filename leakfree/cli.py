"""The ``leakfree`` command: reads the command line and calls one public function.

torch and Lightning are imported only by the commands that need them, so that ``--help`` and ``compare`` start at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from leakfree import __version__
from leakfree.config import RunConfig, load_config
from leakfree.errors import CheckpointError, ConfigError, LeakfreeError, choices, one_line
from leakfree.launch.options import add_flags, given_flags, options_from
from leakfree.training import RankError, Stopped
from leakfree.training.stopping import EXIT_STOPPED, listening

__all__ = ["UsageError", "main"]

_EXAMPLES = {
    "train": """examples:
  leakfree train --config-file configs/detection/digits/pretrain.yaml --num-processes 2
  leakfree train --config-file configs/classification/digits_BN.yaml model.norm=SyncBN output_dir=output/try
  leakfree train --config-file configs/detection/coco/mask_rcnn_R50_FPN_1x.yaml --num-gpus 8 seed=1
  leakfree train --config-file output/digits/pretrain/config.yaml --resume
  leakfree train --config-file configs/detection/coco/mask_rcnn_R50_FPN_1x.yaml --num-machines 2 --num-gpus 8 \\
      --launcher slurm --partition gpu --time 12:00:00 --cpus-per-task 8""",
    "launch": """examples:
  leakfree launch --config-file configs/classification/digits_BN.yaml --num-processes 2 --launcher local
  leakfree launch --config-file configs/detection/coco/mask_rcnn_R50_FPN_1x.yaml --num-machines 4 --num-gpus 4 \\
      --partition gpu --time 12:00:00 --cpus-per-task 8 --dry-run     # then once more without --dry-run
  leakfree launch --config-file configs/classification/digits_BN.yaml configs/classification/digits_GN.yaml --seeds 5 \\
      --output output/sweep --partition cpu --time 30 --cpus-per-task 2 --array-parallelism 4 optimizer.lr=0.05
  leakfree launch --config-file configs/classification/digits_BN.yaml --partition gpu --time 60 --num-gpus 1 \\
      --sbatch exclude=node07 --env NCCL_DEBUG=WARN --setup 'module load cuda'

Several configs, or --seeds K, become one array job, a run for each. A job that meets its time limit, or is preempted,
saves itself and is requeued; the same line with --resume goes on after any other end. See docs/cluster.md.""",
    "evaluate": """examples:
  leakfree evaluate --config-file output/digits/BNhead_leaky/config.yaml
  leakfree evaluate --config-file output/digits/BNhead_leaky/config.yaml \\
      model.weights=output/digits/BNhead_leaky/model_final.pt output_dir=output/evaluated evaluation.max_images=80""",
    "check": """examples:
  leakfree check --config-file configs/contrastive/digits/moco_sync_bn.yaml
  leakfree check --config-file configs/contrastive/digits/moco_shuffle_bn.yaml --num-processes 4 model.query=sync_bn
  leakfree check --config-file configs/detection/digits/mask_rcnn_small_BNhead_leaky.yaml --strict""",
    "compare": """examples:
  leakfree compare output/digits/BNhead_leaky output/digits/SyncBNhead
  leakfree compare output/digits/*head* -o report.html""",
    "status": """examples:
  leakfree status output/digits/BNhead_leaky
  leakfree status output --watch 10
  leakfree status output/sweep/* --json""",
    "export": """examples:
  leakfree export output/contrastive/imagenet/moco --format torchvision --output resnet50.pt
  leakfree export output/contrastive/imagenet/moco/checkpoint_0100000.pt --format detectron2 --output resnet50.pkl""",
    "env": """examples:
  leakfree env""",
}


class UsageError(LeakfreeError):
    """A command line that cannot be read: an unknown command or flag, or a flag without its value."""


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None, *, own: bool | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the command line after the program's name; by default this process's own.
        own: this process ends with the command: after a training or evaluation it ignores SIGUSR2 and SIGTERM, so that
            its exit code stands. By default so where ``argv`` is not given.

    Returns:
        0 done, 1 a rank failed (named, with its traceback), 2 the user's mistake (one line on stderr),
        75 stopped by a signal with the state saved: give the command again, with --resume,
        130 interrupted from the keyboard. Another failure of ours keeps its traceback, and Python exits with 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders and texts of records may be no text
    try:
        return _run(list(sys.argv[1:] if argv is None else argv), argv is None if own is None else own)
    except LeakfreeError as error:
        print("leakfree: error:", one_line(error), file=sys.stderr)
        return 2
    except RankError as error:  # holds the traceback of the rank, if there is one; ours would only hide it
        print(f"leakfree: failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"leakfree: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("leakfree: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str], own: bool) -> int:
    if odd := next((word for word in argv if "\0" in word), None):
        raise UsageError(f"the argument {odd!r} has a NUL character, which no name can have")
    parsers = _parsers()
    name, rest = _split_command(argv, parsers)
    if name is None:
        return _run_without_command(rest, parsers)
    parser = parsers[name]
    try:
        args, unknown = parser.parse_known_intermixed_args(rest)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UsageError(f"leakfree {name}: unknown argument {unknown[0]!r}; flags: {choices(unknown[0], flags)}")
    args.words = argv
    if name not in ("train", "launch", "evaluate"):
        return _COMMANDS[name](args)
    with listening(to_the_end=own):  # so that no later signal changes the exit code
        return _COMMANDS[name](args)


def _split_command(argv: list[str], parsers: dict[str, _Parser]) -> tuple[str | None, list[str]]:
    """Take the command's name out of the line: its first word that is a command, and no flag's value."""
    with_value = {
        flag
        for parser in parsers.values()
        for action in parser._actions
        if action.nargs is None
        for flag in action.option_strings
    }
    words = [
        index
        for index, word in enumerate(argv)
        if not word.startswith("-") and "=" not in word and not (index and argv[index - 1] in with_value)
    ]
    for index in words:
        if argv[index] in parsers:
            return argv[index], argv[:index] + argv[index + 1 :]
    if words:
        word = argv[words[0]]
        raise UsageError(f"unknown command {word!r}; valid: {choices(word, parsers)}")
    return None, argv


def _run_without_command(argv: list[str], parsers: dict[str, _Parser]) -> int:
    if argv and argv[0] == "--version":
        print(f"leakfree {__version__}")
        return 0
    if argv and not {"-h", "--help"} & set(argv):
        raise UsageError(f"no command given; valid: {', '.join(parsers)}")
    lines = [f"  {name:<10}{parser.description}" for name, parser in parsers.items()]
    print(
        "usage: leakfree COMMAND ...\n\nMeasure, remove and compare the leakage of batch statistics.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n'leakfree COMMAND --help' explains one. Flags and key.path=value may stand anywhere on the line.\n"
        + "\n".join(["", "examples:", *(_EXAMPLES[name].splitlines()[1] for name in parsers)]),
        file=sys.stdout if argv else sys.stderr,
    )
    return 0 if argv else 2


# ------------------------------------------------------------------------------------- parsers


def _parsers() -> dict[str, _Parser]:
    def add(name: str, description: str) -> _Parser:
        parsers[name] = _Parser(
            prog=f"leakfree {name}",
            description=description,
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        return parsers[name]

    parsers: dict[str, _Parser] = {}
    train = add("train", "Train, evaluate and measure the run of a config.")
    _add_config_flags(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    _add_convert_ranks(train)
    train.add_argument("--eval-only", action="store_true", help="the same as 'leakfree evaluate'")
    add_flags(train, default_launcher=None)
    launch = add("launch", "Train on a cluster or in the background: one run, or an array of configs and seeds.")
    _add_config_flags(launch, several=True)
    launch.add_argument("--seeds", type=int, metavar="K", help="seeds 0, 1, ... K-1 of each config")
    launch.add_argument(
        "--output", metavar="DIR", help="a folder for each run in DIR, named by its config's file (and _seedK)"
    )
    launch.add_argument("--resume", action="store_true", help="go on with what lies in the output folders")
    _add_convert_ranks(launch)
    add_flags(launch, default_launcher="slurm")
    _add_config_flags(add("evaluate", "Evaluate a trained model under the statistics the config names."))
    check = add("check", "Tell whether a config lets batch statistics leak, and why, before it runs.")
    _add_config_flags(check)
    check.add_argument("--strict", action="store_true", help="exit code 2 when there is a leak")
    compare = add("compare", "Put runs side by side: leakage, accuracy, time, memory, settings.")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    compare.add_argument("-o", "--output", metavar="FILE", help="also write a self-contained HTML report")
    compare.add_argument("--title", metavar="TEXT", help="heading of the report")
    compare.add_argument("--baseline", metavar="RUN", help="the run that differences refer to")
    status = add("status", "Show how runs are doing: progress, time left, restarts, alarms; local and on Slurm.")
    status.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, or a folder that holds some")
    status.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    status.add_argument("--watch", type=float, metavar="SECONDS", help="show it again so often, until Ctrl-C")
    status.add_argument("--strict", action="store_true", help="exit code 1 when a run has an alarm")
    export = add("export", "Write a contrastive run's backbone for torchvision, timm or detectron2.")
    export.add_argument("run", metavar="RUN", help="output folder of a run, or a checkpoint of one")
    export.add_argument(
        "--format", required=True, choices=["torchvision", "timm", "detectron2"], help="the library that loads it"
    )
    export.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write; .pkl for detectron2")
    add("env", "Print versions and hardware, for a bug report.")
    return parsers


def _add_convert_ranks(parser: _Parser) -> None:
    parser.add_argument(
        "--convert-ranks",
        action="store_true",
        help="with --resume: go on with another number of ranks, and keep what is normalized together",
    )


def _add_config_flags(parser: _Parser, several: bool = False) -> None:
    if several:
        parser.add_argument("--config-file", metavar="FILE", nargs="+", help="YAML files, one run for each (required)")
    else:
        parser.add_argument("--config-file", metavar="FILE", help="the run's YAML file (required)")
    parser.add_argument("--num-machines", type=int, metavar="M", help="machines: trainer.num_machines=M")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="ranks on GPUs of each: trainer.num_gpus=N")
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="ranks on CPU of each: trainer.num_processes=N trainer.num_gpus=0",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="override a key of the config; the last one wins"
    )


# ------------------------------------------------------------------------------------ commands


def _config(args: argparse.Namespace) -> RunConfig:
    overrides = _overrides(args)
    return load_config(args.config_file, overrides)


def _overrides(args: argparse.Namespace) -> list[str]:
    """The overrides of the line, its flags for ranks among them."""
    if not args.config_file:
        raise UsageError("--config-file FILE is required, like --config-file configs/detection/coco/...yaml")
    if args.num_gpus is not None and args.num_processes is not None:
        raise UsageError("--num-gpus and --num-processes exclude each other: ranks are on GPUs or on CPU")
    flags: dict[str, str] = {}  # config key -> the flag that sets it
    if args.num_machines is not None:
        flags["trainer.num_machines"] = f"--num-machines {args.num_machines}"
    if args.num_gpus is not None:
        flags["trainer.num_gpus"] = f"--num-gpus {args.num_gpus}"
    if args.num_processes is not None:
        flags |= dict.fromkeys(["trainer.num_processes", "trainer.num_gpus"], f"--num-processes {args.num_processes}")
    for override in args.overrides:
        if (key := override.partition("=")[0].strip()) in flags:
            raise UsageError(f"{flags[key]} and {override} both set {key}; give one of them")
    values = {key: flag.split()[1] for key, flag in flags.items()}
    if args.num_processes is not None:
        values["trainer.num_gpus"] = "0"
    return [*(f"{key}={value}" for key, value in values.items()), *args.overrides]


def _train(args: argparse.Namespace) -> int:
    _check_convert_ranks(args)
    if args.eval_only and args.resume:
        raise UsageError("--eval-only and --resume exclude each other: --resume is for training that goes on")
    if args.launcher is None and (flags := given_flags(args)):
        raise UsageError(f"{flags[0]} is for jobs: add --launcher slurm, or give it to 'leakfree launch'")
    if args.eval_only and args.launcher is not None:
        raise UsageError(
            "--eval-only and --launcher exclude each other: jobs are trainings, which end in an evaluation"
        )
    if args.eval_only:
        return _evaluate(args)
    if args.launcher is not None:
        return _launch_runs(args, [args.config_file])
    config = _config(args)
    from leakfree.training import train

    train(config, resume=args.resume, convert_ranks=args.convert_ranks)
    return 0


def _check_convert_ranks(args: argparse.Namespace) -> None:
    if args.convert_ranks and not args.resume:
        raise UsageError("--convert-ranks is for a run that goes on: add --resume")


def _launch(args: argparse.Namespace) -> int:
    _check_convert_ranks(args)
    words = args.config_file or []
    args.overrides = [*(word for word in words if _is_override(word)), *args.overrides]
    return _launch_runs(args, [word for word in words if not _is_override(word)])


def _is_override(word: str) -> bool:
    """--config-file takes all words up to the next flag."""
    return "=" in word and not Path(word).exists()


def _launch_runs(args: argparse.Namespace, sources: list[str]) -> int:
    overrides = _overrides(args)
    options = options_from(args)
    from leakfree.launch import launch

    return launch(
        sources,
        overrides,
        options,
        seeds=getattr(args, "seeds", None),
        output=getattr(args, "output", None),
        resume=args.resume,
        convert_ranks=args.convert_ranks,
        dry_run=bool(args.dry_run),
        command=["leakfree", *args.words],
    )


def _evaluate(args: argparse.Namespace) -> int:
    config = _config(args)
    from leakfree.training import evaluate

    evaluate(config)
    return 0


def _check(args: argparse.Namespace) -> int:
    config = _config(args)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from leakfree.leakage import check_config

    findings = check_config(config)
    table = Table("verdict", "keys", "why", box=box.SIMPLE_HEAD, show_lines=True)
    for item in findings:
        remedy = f"\nremedy: {item.remedy}" if item.remedy else ""
        table.add_row(item.verdict, "\n".join(item.keys), f"{item.reason}{remedy}\nsource: {item.source}")
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table if findings else "nothing to judge: no norm that is known")
    leaks = [item for item in findings if item.verdict == "leak"]
    if args.strict and leaks:
        keys = ", ".join(dict.fromkeys(key for item in leaks for key in item.keys))
        raise ConfigError(f"{args.config_file}: leaks ({keys}), and --strict was given")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from leakfree.report import compare

    compare(args.runs, args.output, args.title, args.baseline)
    return 0


def _status(args: argparse.Namespace) -> int:
    from leakfree.launch.status import show_status

    if args.watch is not None and not 0.1 <= args.watch <= 86400:
        raise UsageError(f"--watch {args.watch:g}: give seconds, from 0.1 to 86400")
    return show_status(args.runs, as_json=args.json, watch=args.watch, strict=args.strict)


def _export(args: argparse.Namespace) -> int:
    from leakfree.sealed import read_checkpoint
    from leakfree.training.checkpoints import newest_valid

    path = Path(args.run)
    notices: list[str] = []
    if os.path.isdir(path):
        found, notices = newest_valid(path)
        if found is None:
            raise CheckpointError(f"{path}: the folder holds no checkpoint of a run")
        path = found
    checkpoint = read_checkpoint(path)
    from leakfree.contrastive import write_backbone

    try:
        write_backbone(checkpoint, args.format, Path(args.output))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    print(*notices, f"{path} -> {args.output} ({args.format})", sep="\n")
    return 0


def _env(args: argparse.Namespace) -> int:
    rows = [("leakfree", __version__), ("python", platform.python_version())]
    names = ["torch", "torchvision", "lightning", "torchmetrics", "faster-coco-eval", "omegaconf", "numpy"]
    rows += [(name, _version(name)) for name in names]
    rows += [("system", platform.platform()), ("CPUs", str(os.cpu_count())), *_accelerators()]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[tuple[str, str]]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # a broken install is what `env` is asked about
        return [("torch import", f"fails: {error}")]
    rows = [("torch for CUDA", str(torch.version.cuda or "no: built for CPU"))]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows if len(rows) > 1 else [*rows, ("GPU", "none")]


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "launch": _launch,
    "evaluate": _evaluate,
    "check": _check,
    "compare": _compare,
    "status": _status,
    "export": _export,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())
