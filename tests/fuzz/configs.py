"""Malformed configs and command lines."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from leakfree.config.check import flatten
from leakfree.config.schema import TASKS
from tests.fuzz.place import SHORT, Case, Make, Place

__all__ = ["MAKERS"]

CONFIGS = Path(__file__).parents[2] / "configs"
NORMS = ["SyncBN", "GhostBN", "ShuffleBN", "BatchRenorm", "BGN", "CBN", "MBN", "IEBN", "DomainBN", "GN", "ProxyNorm"]
OPTIONS = [
    "eps", "momentum", "group_size", "num_groups", "window", "burn_in", "memory", "num_domains", "norm", "ramp",
    "affine", "track_running_stats", "device", "dtype", "process_group", "where", "self", "num_features", "dim",
    "name",
]  # fmt: skip
NUMBERS = [-1, 0, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.5, math.nan, math.inf, -math.inf, 1e308,
           1e-320, -1e308]  # fmt: skip
TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "\u2028", "\x1b[31mred", "x" * 100_000, "../" * 40 + "etc/passwd", "/etc/passwd",
    "${seed}", "${nope}", "${oc.env:HOME}", "${a${seed}}", "${", "???", "%s%n{0}", "__class__", "os.system", "BN",
    "none",
    "true", "1", "null", "~", "*", "\ufeff", "\u202e", "timm/resnet18", "BN\nleakfree: done",
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, [], [[]], [None], ["a"], [1, "a"], list(range(1000)), [[[[[1]]]]], {}, {"a": 1}, {"": 1},
    {"_target_": "os.system", "_args_": ["touch {canary}"]}, {"__class__": {"__init__": 1}}, {"a": {"b": {"c": []}}},
]  # fmt: skip


def _yaml(value: Any) -> str:
    """One value in flow style; JSON is YAML but for numbers that are not finite."""
    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")


def _tiny(rng: random.Random, place: Place) -> tuple[str, str]:
    task = rng.choice(list(TASKS))
    return task, (place.made / f"{task}.yaml").read_text()


def _written(place: Place, text: str | bytes, name: str = "config.yaml") -> Path:
    path = place.inputs / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def _line(rng: random.Random, place: Place, path: Path | str, *overrides: str, command: str | None = None) -> list[str]:
    command = command or rng.choice(["check", "train", "train", "evaluate"])
    return [command, "--config-file", str(path), f"output_dir={place.output}", *SHORT, *overrides]


def _hostile(rng: random.Random, place: Place) -> Any:
    """A value that few keys can take."""
    value = rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS]))
    return json.loads(json.dumps(value).replace("{canary}", str(place.canary)))


# ------------------------------------------------------------------------------------------ a key


def a_key(rng: random.Random, place: Place) -> Case:
    """A key of a tiny config with a hostile value, in the file."""
    task, text = _tiny(rng, place)
    tree = yaml.safe_load(text)
    key = rng.choice([key for key in flatten(asdict(TASKS[task]())) if key not in ("output_dir", "data.root", "task")])
    value = _hostile(rng, place)
    section = tree
    *names, last = key.split(".")
    for name in names:
        section = section.setdefault(name, {})
    section[last] = value
    path = _written(place, _block(tree))
    return Case(f"{key}={value!r:.40}", _line(rng, place, path), codes=(0, 2))


def _block(tree: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(key)}: {_yaml(value)}\n" for key, value in tree.items())


def an_override(rng: random.Random, place: Place) -> Case:
    """The same on the command line."""
    task, _ = _tiny(rng, place)
    key = rng.choice([key for key in flatten(asdict(TASKS[task]())) if key not in ("output_dir", "data.root", "task")])
    value = _hostile(rng, place)
    text = value if isinstance(value, str) and rng.random() < 0.5 else _yaml(value)
    line = _line(rng, place, place.made / f"{task}.yaml", f"{key}={text}")
    return Case(f"command line: {key}={value!r:.40}", line, codes=(0, 2))


def a_section(rng: random.Random, place: Place) -> Case:
    """A section that is no section."""
    task, text = _tiny(rng, place)
    tree = yaml.safe_load(text)
    name = rng.choice([key for key, value in asdict(TASKS[task]()).items() if isinstance(value, dict)])
    tree[name] = rng.choice([3, "text", [], [{}], None, True, 1.5, {"nothing": 1}, [[["a"]]]])
    return Case(f"{name} is {tree[name]!r}", _line(rng, place, _written(place, _block(tree))))


def an_unknown_key(rng: random.Random, place: Place) -> Case:
    _, text = _tiny(rng, place)
    name = rng.choice(["trainr", "__init__", "x" * 50_000, "a.b.c", "model.", ".", "${seed}", "schedule.max_step", "é"])
    value = _yaml(rng.choice([1, {"a": {"b": 2}}, "x"]))
    return Case(f"unknown key {name:.20}", _line(rng, place, _written(place, f"{text}\n{json.dumps(name)}: {value}\n")))


def norm_options(rng: random.Random, place: Place) -> Case:
    """Options that a norm does not take, or not of this type."""
    task, text = _tiny(rng, place)
    tree = yaml.safe_load(text)
    given = {
        name: rng.choice([-1, 0, 3, 10**30, math.nan, "x", "", True, None, 1e308, "cuda", "${seed}", [1], {"a": 1}])
        for name in rng.sample(OPTIONS, rng.choice([1, 1, 2]))
    }
    section = tree["model"]
    if task == "detection":
        section = section[rng.choice(["box_head", "mask_head", "backbone"])]
    if task == "contrastive":
        section["query"] = rng.choice(["ghost_bn", "gn", "bn"])
    else:
        section["norm"] = rng.choice([*NORMS, "Nope", "nn.BatchNorm2d", "bn", "x" * 10_000])
    section["norm_options"] = given
    what = f"{section.get('norm', section.get('query'))!r:.20} with {given}"
    return Case(what, _line(rng, place, _written(place, _block(tree)), command="train"), codes=(0, 2))


def output_dir(rng: random.Random, place: Place) -> Case:
    """Folders that cannot be, or are elsewhere: the user's choice, within what can be."""
    taken = place.inputs / "taken"
    taken.write_text("a file\n")
    elsewhere = place.sandbox / "elsewhere"
    folder = rng.choice(
        [
            "a\0b", "\0", "\ud800", "", "   ", "x" * 300, "x/" * 5000, str(taken), f"{taken}/sub", "/dev/null",
            "/dev/null/run", "/proc/nothing/run", "${nope}", "${output_dir}", "???", f"{place.output}/../elsewhere",
            f"{elsewhere}/a\nb", f"{elsewhere}/\x1b[31m", f"{elsewhere}/-rf", f"{elsewhere}/{{0}}%s",
            f"{elsewhere}/\udcff", f"{elsewhere}/{'é' * 100}",
        ]
    )  # fmt: skip
    _, text = _tiny(rng, place)
    if rng.random() < 0.5 and "\0" not in folder:
        path, given = _written(place, text), folder if folder.strip() else json.dumps(folder)
        line = ["train", "--config-file", str(path), *SHORT, f"output_dir={given}"]
    else:
        line = ["train", "--config-file", str(_written(place, f"{text}\noutput_dir: {_yaml(folder)}\n")), *SHORT]
    sound = str(elsewhere) in folder or "elsewhere" in folder
    writes = (str(elsewhere), str(place.sandbox / "cwd"), str(taken), "/proc")
    return Case(f"output_dir {folder!r:.40}", line, codes=(0, 2) if sound else (2,), writes=writes)


# ------------------------------------------------------------------------------------- the document


def tags(rng: random.Random, place: Place) -> Case:
    """YAML that asks to run something."""
    command = f"touch {place.canary}"
    tag = rng.choice(
        [
            f"!!python/object/apply:os.system ['{command}']",
            f"!!python/object/new:os.system ['{command}']",
            f"!!python/object/apply:subprocess.check_output [['touch', '{place.canary}']]",
            "!!python/name:os.system",
            "!!python/module:leakfree_canary",
            f"!!python/object/apply:builtins.eval ['open({str(place.canary)!r}, \"w\")']",
            f"!!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:exec }}], "
            f"listitems: \"open('{place.canary}', 'w')\"}}",
            "!!python/tuple [1, 2]",
            f"!include {place.secret}",
            "!!binary aGVsbG8=",
            "!!timestamp 2001-01-01",
            "!!set {a, b}",
            "!ENV ${HOME}",
            "!<tag:yaml.org,2002:python/object/apply:os.system> ['true']",
            "!!omap [a: 1]",
        ]
    )
    _, text = _tiny(rng, place)
    document = rng.choice([f"{text}\nseed: {tag}\n", f"{text}\nmodel: {tag}\n", f"{tag}\n", f"? {tag}\n: 1\n"])
    if rng.random() < 0.3:
        return Case(
            f"override {tag:.50}",
            _line(rng, place, place.made / "classification.yaml", f"model.num_classes={tag}", command="check"),
        )
    if rng.random() < 0.2:
        _written(place, document, "base.yaml")
        return Case(f"base with {tag:.50}", _line(rng, place, _written(place, f"_BASE_: base.yaml\n{text}")))
    return Case(f"tag {tag:.50}", _line(rng, place, _written(place, document)))


def anchors(rng: random.Random, place: Place) -> Case:
    """Aliases that multiply, merge keys, and a value that holds itself."""
    levels = rng.choice([3, 9, 30])
    laughs = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, levels))
    merged = "base: &base {seed: 1}\n<<: *base\n"
    loop = "model: &m\n  norm_options: *m\n"
    return Case("anchors", _line(rng, place, _written(place, rng.choice([laughs, merged, loop, "a: *nothing\n"]))))


def references(rng: random.Random, place: Place) -> Case:
    """``${key}`` in circles, of nothing, and that multiply."""
    _, text = _tiny(rng, place)
    text = (place.made / "classification.yaml").read_text()
    levels = rng.choice([4, 30, 60])
    laughs = {"a0": "lol"} | {f"a{n}": f"${{model.norm_options.a{n - 1}}}" * 9 for n in range(1, levels)}
    overrides = rng.choice(
        [
            [f"model.norm_options={_yaml(laughs)}"],
            [f"model.norm_options={_yaml(laughs)}", f"data.train.path=${{model.norm_options.a{levels - 1}}}"],
            ["seed=${leakage.seed}", "leakage.seed=${seed}"],
            ["seed=${seed}"],
            ["optimizer.lr=${optimizer}"],
            ["data.train.path=${oc.env:HOME}"],
            ["data.train.path=${oc.decode:1}"],
            ["data.train.path=${.val.path}"],
            ["data.train.path=${data[val][path]}"],
            ["data.train.path=\\${seed}"],
            ["data.train.path=${}"],
            ["data.train.path=" + "${data.val.path" * 500],
            ["data.train.corruptions=[${seed}]"],
            ["data.train.corruptions=['${data.train.corruptions}']"],
        ]
    )
    return Case(f"references {overrides!r:.60}", _line(rng, place, _written(place, text), *overrides), codes=(0, 2))


def bases(rng: random.Random, place: Place) -> Case:
    """``_BASE_`` in a circle, of what is no config, or not there."""
    _written(place, "_BASE_: config.yaml\n", "other.yaml")
    deep = "/".join(["x"] * 3000)
    base = rng.choice(
        [
            "config.yaml", "other.yaml", "./../inputs/config.yaml", "nothing.yaml", ".", "..", "/dev/null/x",
            "/etc/passwd",
            "/dev/zero", str(place.made / "images/cat/0.png"), ["config.yaml"], [["other.yaml"]], {"a": 1}, 3, None,
            True, "", "a\0b",
            "x" * 5000, deep, "~nobody_here/x.yaml", "\ud800", "*", "http://localhost:1/x.yaml", [""] * 3,
        ]
    )  # fmt: skip
    _, text = _tiny(rng, place)
    return Case(f"_BASE_ {base!r:.40}", _line(rng, place, _written(place, f"_BASE_: {_yaml(base)}\n{text}")))


def a_document(rng: random.Random, place: Place) -> Case:
    """Documents that are no mapping, or too much of one."""
    _, text = _tiny(rng, place)
    deep = rng.choice([60, 500, 3000, 200_000])
    documents: list[str | bytes] = [
        "[1, 2]", "text", "3", "- a\n- b", "null: 1", "[]: 1", "{}: 1", "1: 2", "true: 1", "? [a, b]\n: 1",
        "seed: 1\nseed: 2",
        f"{text}\n---\n{text}", "%YAML 1.2\n%TAG ! tag:x,2000:\n---\nseed: !a 1", "seed: [1, 2", "seed: {a: 1",
        "seed: 'x",
        "\tseed: 1", "seed:\t1\n\ttrainer:\t2", "seed: |\n  1\n 2", "a: b: c", "@seed: 1", "`seed: 1", "seed: \x07",
        "{" * deep, "[" * deep, "seed: " + "[" * deep + "]" * deep, "a: {" * deep + "}" * deep,
        "\n".join(" " * n + "a:" for n in range(min(deep, 800))), f"seed: {'9' * 10_000}", f"seed: 1{'_' * 10_000}1",
        f"seed: 0x{'f' * 10_000}", "seed: 1e999999", "x" * 100_000, "seed: " + "x" * 1_000_000, "? " * 2000,
        "- " * 2000,
        b"\xff\xfe" + "seed: 1".encode("utf-16-le"), b"\xfe\xff" + "seed: 1".encode("utf-16-be"), b"seed: \xff\xfe",
        b"\x00" * 100, b"seed: 1\x00", "\ufeff" * 3 + "seed: 1", text.encode() + b"\x80",
        b"\x1f\x8b\x08\x00" + b"\x00" * 40,
        b"\x89PNG\r\n\x1a\n" + bytes(100), text.replace("\n", "\r\n\x00"), text.replace(":", "\uff1a"),
        "<<: {seed: 1}",
        "seed: 1\n" * 2000, "=: 1", "seed: ! 1", "seed: &a 1", "seed: *a", "'': 1", "~: 1", "!!str: 1",
        "seed: \ud800",
    ]  # fmt: skip
    number = rng.randrange(len(documents))
    return Case(f"document {number}: {documents[number]!r:.40}", _line(rng, place, _written(place, documents[number])))


def sound_but_odd(rng: random.Random, place: Place) -> Case:
    """What may be: a byte order mark, other line ends, no config at all."""
    text = (place.made / "classification.yaml").read_text()
    documents = [
        "\ufeff" + text, text.replace("\n", "\r\n"), text + "\n...\n", "---\n" + text, "", "# nothing\n", "{}",
        "null\n", text.rstrip("\n"), text + " " * 10_000, "_BASE_: []\n" + text,
    ]  # fmt: skip
    document = rng.choice(documents)
    return Case(f"odd {document!r:.30}", _line(rng, place, _written(place, document), command="check"), codes=(0, 2))


def shuffled_bytes(rng: random.Random, place: Place) -> Case:
    """A shipped config, or a tiny one, with a few edits of its text."""
    shipped = rng.random() < 0.6
    if shipped:
        path = rng.choice(sorted(CONFIGS.rglob("*.yaml")))
        folder = shutil.copytree(path.parent, place.inputs / "configs")
        path = folder / path.name
    else:
        path = _written(place, _tiny(rng, place)[1])
    text = path.read_text()
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice([*":{}[],&*!|>%@`'\"#-?\t\n ", "\x00", "${", "!!", "<<: ", "é", "\ud800", "0x", "1e9", "~"])
        edit = rng.randrange(4)
        if edit == 0:
            text = text[:at] + piece + text[at:]
        elif edit == 1:
            text = text[:at] + text[at + rng.randint(1, 8) :]
        elif edit == 2:
            lines = text.split("\n")
            rng.shuffle(lines)
            text = "\n".join(lines)
        else:
            text = text[:at] + text[rng.randrange(len(text) + 1) :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    command = "check" if shipped else rng.choice(["check", "train"])
    line = [command, "--config-file", str(path), f"output_dir={place.output}", *SHORT]
    if not shipped:  # an edit may have lost what keeps it small
        line += [f"data.root={place.made / 'data'}", "data.num_workers=0"]
        line = line if command == "check" else ["check", *line[1:]] if "digit_scenes" in text else line
    return Case(f"edits of {path.name}", line, codes=(0, 2), writes=(str(place.sandbox / "cwd"),))


# -------------------------------------------------------------------------------------------- lines


def a_config_file(rng: random.Random, place: Place) -> Case:
    """A config file that is none."""
    pipe, loop, gone = (place.inputs / name for name in ("pipe", "loop", "gone"))
    import os

    os.mkfifo(pipe)
    loop.symlink_to(loop)
    gone.symlink_to(place.inputs / "nothing")
    path = rng.choice(
        [
            pipe, loop, gone, place.inputs, place.made / "images/cat/0.png", "/dev/null/x", "/dev/zero", "",
            "x" * 5000, "a\0b",
            "\udcff", ".",
            "-", "/proc/self/mem", f"{place.secret}/x", "~", "\n", "config.yaml\nleakfree: done",
            place.inputs / ("x/" * 3000),
        ]
    )  # fmt: skip
    return Case(f"--config-file {str(path)[-30:]!r}", _line(rng, place, str(path)))


def a_command_line(rng: random.Random, place: Place) -> Case:
    """Overrides and flags that cannot be read."""
    config = str(place.made / rng.choice(["classification.yaml", "contrastive.yaml"]))
    words = rng.choice(
        [
            ["=1"], ["="], ["seed"], ["seed=="], ["seed=[1"], ["seed={a: 1"], ["seed=!!python/name:os.system"],
            [".=1"],
            ["..=1"], ["seed.=1"], [".seed=1"], ["model..norm=BN"], ["model=1"], ["model=[]"], ["a" * 50_000 + "=1"],
            ["seed=" + "1" * 20_000], ["model.norm_options.a.b=1"], ["model.norm_options.=1"], ["task=nope"],
            ["task="],
            ["task=[detection]"], ["seed=\0"], ["seed=\udcff"], ["\udcff=1"], ["seed=&a 1"], ["seed=*a"],
            ["seed={<<: {}}"],
            ["--seed=1"], ["--num-gpus"], ["--num-gpus", "-1"], ["--num-gpus", "1e3"], ["--num-processes", "0"],
            ["--num-processes", "99999999999999999999"], ["--num-machines", "0"], ["--num-machines", "x"], ["--",
            "--seed"],
            ["--config-file"], ["--config-file", ""], ["--resume=1"], ["_BASE_=x.yaml"],
            ["model.norm_options={a: {b: 1}}"],
            ["trainer.num_processes=100000", "trainer.total_batch_size=100000000000000000"], ["seed=\x1b[31m"],
            ["train=1"], ["data.train=digits"], ["trainer.total_batch_size=1000000000000007",
            "model.images_per_group=5"],
            ["a." * 5000 + "b=1"], ["model.norm_options." + "a." * 3000 + "b=1"], ["@file"], ["\x00"], [""],
        ]
    )  # fmt: skip
    command = rng.choice(["train", "check", "evaluate"])
    line = [command, "--config-file", config, f"output_dir={place.output}", *SHORT, *words]
    return Case(f"words {words!r:.50}", line)


def a_long_line_of_another_command(rng: random.Random, place: Place) -> Case:
    """Other commands with words they cannot use."""
    run = str(place.made / "finished_classification")
    line = rng.choice(
        [
            ["compare", "a\0b"], ["compare", "x" * 5000], ["compare", ""], ["compare", "/dev/null"], ["compare",
            "/dev/zero"],
            ["compare", run, run], ["compare", run, "--baseline", "x" * 50_000], ["compare", run, "--baseline",
            "a\0b"],
            ["compare", run, "-o", "/dev/null"], ["compare", run, "-o", "/proc/nothing/x.html"], ["compare", run,
            "-o", ""],
            ["compare", run, "-o", "x" * 300 + ".html"], ["compare", run, "-o", "a\0b.html"],
            ["compare", run, "-o", str(place.inputs)], ["compare", run, "-o", f"{place.secret}/x.html"],
            ["export", run, "--format", "torchvision", "-o", str(place.output)], ["export", "a\0b", "--format",
            "timm", "-o", "x"],
            ["export", "x" * 5000, "--format", "timm", "-o", "x"], ["export", run, "--format", "nope", "-o", "x"],
            ["export", str(place.made / "exported"), "--format", "torchvision", "-o", "/proc/nothing/x.pt"],
            ["export", str(place.made / "exported"), "--format", "torchvision", "-o", str(place.inputs)],
            ["export", str(place.made / "exported"), "--format", "torchvision", "-o", "a\0b"],
            ["export", str(place.made / "exported"), "--format", "torchvision", "-o", "x" * 300],
            ["x" * 50_000], ["\0"], ["train", "x" * 50_000], ["check\n"], ["\udcff"], ["-\udcff"],
            ["--config-file=x"],
        ]
    )  # fmt: skip
    return Case(f"line {' '.join(line)!r:.50}", line, writes=(str(place.sandbox / "cwd"), str(place.secret), "/proc"))


MAKERS: list[Make] = [
    a_key, tags, a_document, an_override, output_dir, norm_options, bases, a_command_line, anchors, shuffled_bytes,
    a_key, a_section, references, an_unknown_key, a_config_file, a_document, norm_options, sound_but_odd, an_override,
    a_long_line_of_another_command,
]  # fmt: skip
