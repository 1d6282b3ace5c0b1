"""The command line: what it accepts, what it says about mistakes, and with which exit code it ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from leakfree import __version__, cli
from leakfree.cli import main
from leakfree.training.ranks import RankError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  train: {name: digit_scenes}\n  val: {name: digit_scenes}\n")
    return str(path)


def error_of(capsys, *argv: str) -> str:
    """Run a command that must end with 2 and one line on stderr; return that line."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("leakfree: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["unknown command 'trian'", "valid: train, "]),
        (["--resume"], ["no command given"]),
        (["train"], ["--config-file FILE is required"]),
        (["train", "--config-file"], ["--config-file", "expected one argument"]),
        (["train", "--config-fil", "x"], ["unknown argument '--config-fil'", "flags: --config-file, "]),
        (["train", "--num-gpu", "1"], ["flags: --num-gpus, "]),
        (["train", "--num-gpus", "two"], ["--num-gpus", "'two'"]),
        (["train", "--config-file", "x", "--num-gpus", "1", "--num-processes", "2"], ["exclude each other"]),
        (["train", "--config-file", "x", "--eval-only", "--resume"], ["exclude each other"]),
        (["train", "--config-file", "x", "--convert-ranks"], ["--convert-ranks", "add --resume"]),
        (["status"], ["required: RUN"]),
        (["train", "--config-file", "nothing.yaml"], ["nothing.yaml: no such file"]),
        (["evaluate", "--config-file", "x", "--num-nodes", "2"], ["unknown argument '--num-nodes'"]),
        (["check"], ["--config-file FILE is required"]),
        (["check", "--config-file", "nothing.yaml"], ["nothing.yaml: no such file"]),
        (["check", "--config-file", "x", "--resume"], ["unknown argument '--resume'"]),
        (["compare"], ["required: RUN"]),
        (["compare", "no/such/run"], ["no/such/run"]),
        (["env", "now"], ["unknown argument 'now'"]),
    ],
)
def test_a_wrong_line_is_one_line_and_exit_code_2(capsys, argv, words):
    message = error_of(capsys, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lrr=1"], ["command line: optimizer.lrr: unknown key; did you mean optimizer.lr?"]),
        (["optimizer.lr=fast"], ["command line: optimizer.lr: expects a number, got text 'fast'"]),
        (["seed"], ["command line: got 'seed', expects key.path=value"]),
        (["--num-processes", "3"], ["trainer.total_batch_size", "3 ranks (trainer.num_processes)"]),
        (["--num-gpus", "3"], ["trainer.total_batch_size", "3 ranks (trainer.num_gpus)"]),
        (["--num-gpus=-1"], ["command line: trainer.num_gpus: must be at least 0"]),
        (["--num-gpus", "0", "trainer.num_processes=3"], ["3 ranks (trainer.num_processes)"]),  # two different keys
        (["--num-processes", "2", "trainer.num_processes=2"], ["--num-processes 2 and trainer.num_processes=2 both"]),
        (["trainer.num_gpus=5", "--num-processes", "2"], ["--num-processes 2 and trainer.num_gpus=5 both set"]),
        (["--num-gpus", "2", "trainer.num_gpus=4"], ["--num-gpus 2 and trainer.num_gpus=4 both set trainer.num_gpus"]),
    ],
)
def test_flags_and_overrides_may_stand_anywhere(capsys, config_file, overrides, words):
    """Every order gives the same message, so every order was read the same way."""
    flag = ["--config-file", config_file]
    lines = {
        error_of(capsys, *argv)
        for argv in (
            ["train", *flag, *overrides],
            ["train", *overrides, *flag],
            [*flag, "train", *overrides],
            [*overrides, "train", *flag],
            ["evaluate", f"--config-file={config_file}", *overrides],
        )
    }
    assert len(lines) == 1, lines
    message = lines.pop()
    assert all(word in message for word in words), message


def test_help_shows_flags_and_examples_that_parse(capsys):
    for command in ("train", "evaluate", "check", "compare", "status", "env"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert "examples:\n  leakfree " + command in text
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: leakfree COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_configs_in_the_examples_exist(capsys, command):
    main([command, "--help"])
    files = re.findall(r"configs/\S+", capsys.readouterr().out)
    assert files
    assert all((ROOT / file).is_file() for file in files), files


SYNC = "configs/contrastive/digits/moco_sync_bn.yaml"
SHUFFLE = "configs/contrastive/digits/moco_shuffle_bn.yaml"


def check(*argv: str) -> subprocess.CompletedProcess:
    """The real command, in a process of its own, on a wide console."""
    line = [sys.executable, "-m", "leakfree.cli", "check", *argv]
    wide = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=wide, check=False)


def test_check_tells_what_leaks_and_why_and_strict_ends_with_2():
    done = check("--config-file", SYNC, "--strict")
    assert done.returncode == 2
    assert done.stderr == f"leakfree: error: {SYNC}: leaks (model.query), and --strict was given\n"
    for words in ("leak ", "model.key", "that no key in the queue", "remedy: model.key=shuffle_bn", "moco issue 46"):
        assert words in done.stdout, done.stdout


def test_check_answers_for_the_ranks_and_overrides_given():
    done = check("--config-file", SHUFFLE, "model.images_per_group=0", "--num-processes", "4", "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "safe" in done.stdout
    assert "16 of 64 images at random" in done.stdout


def test_a_leak_without_strict_and_a_check_of_one_group(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["check", "--config-file", SYNC]) == 0
    assert "leak" in capsys.readouterr().out
    one_group = ["--config-file", SHUFFLE, "model.images_per_group=0", "--strict"]
    assert main(["check", *one_group, "model.method=simclr", "model.queue_size=65536", "model.momentum=0.999"]) == 0
    out = capsys.readouterr().out  # no effect, but no leak either
    assert "no effect" in out
    assert "safe" in out


def test_check_says_so_where_it_knows_no_norm(capsys, config_file):
    overrides = ["model.box_head.name=4conv1fc", "model.box_head.norm=Mine", "model.mask_head.norm=Mine"]
    assert main(["check", "--config-file", config_file, *overrides]) == 0
    assert capsys.readouterr().out == "nothing to judge: no norm that is known\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"leakfree {__version__}\n"


def test_env_lists_what_a_bug_report_needs(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert {"leakfree", "python", "torch", "torchvision", "lightning", "system", "CPUs"} <= set(names)
    assert any(name.startswith("GPU") for name in names)


def run(code: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=False)


def test_an_interrupt_is_130_and_a_failure_of_ours_keeps_its_traceback():
    code = "import sys, leakfree.cli as cli; cli._COMMANDS['env'] = lambda args: {}[0]; sys.exit(cli.main(['env']))"
    done = run(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = run(code.replace("{}[0]", "(_ for _ in ()).throw(KeyboardInterrupt)"))
    assert (done.returncode, done.stderr) == (130, "leakfree: interrupted\n")


def test_help_and_mistakes_do_not_load_torch():
    code = "import sys; from leakfree.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    assert run(code, "train", "--help").stdout.endswith("False\n")
    assert run(code, "compare", "no/such/run").stdout == "False\n"
    assert run(code, "train", "--config-file", "x.yaml").stdout == "False\n"


@pytest.mark.parametrize(("tool", "command"), [("train_net.py", "train"), ("compare.py", "compare")])
def test_a_tool_is_the_command(tool, command):
    code = f"import runpy, sys; sys.argv[0] = 'tools/{tool}'; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run(code, "--bogus", "run")
    assert done.returncode == 2
    assert f"leakfree {command}: unknown argument '--bogus'" in done.stderr


def test_a_failed_rank_is_told_without_our_own_traceback(monkeypatch, capsys):
    def fail(args):
        raise RankError("rank 1 was killed by SIGKILL")

    monkeypatch.setitem(cli._COMMANDS, "env", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "leakfree: failed: rank 1 was killed by SIGKILL\n"
