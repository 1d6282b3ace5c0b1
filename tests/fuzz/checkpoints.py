"""Malformed checkpoints: given as weights, found by ``--resume``, evaluated, exported."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.place import SHORT, Case, Make, Place
from tests.fuzz.soundness import TASKS

__all__ = ["MAKERS", "bomb"]

Uses = Callable[[random.Random, Place, Callable[[Path], None]], tuple[str, list[str]]]


class _Runs:
    """Pickles to a call of ``function(*args)``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def bomb(rng: random.Random, canary: Path) -> bytes:
    """A pickle that would run something, or never end."""
    calls = [
        _Runs(os.system, f"touch {canary}"),
        _Runs(eval, f"open({str(canary)!r}, 'w')"),
        _Runs(exec, f"open({str(canary)!r}, 'w')"),
        _Runs(open, str(canary), "w"),
        _Runs(__import__, "leakfree_canary"),
        _Runs(Path.touch, canary),
        {"state_dict": {"a": _Runs(os.mkdir, str(canary))}},
        [_Runs(torch.load, str(canary))],
        {b"data": _Runs(os.system, f"touch {canary}")},
    ]
    texts = [
        b"cos\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR.",
        b"cposix\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c" + bytes([len(f"open({str(canary)!r},'w')")])
        + f"open({str(canary)!r},'w')".encode() + b"\x85R.",
        b"(S'touch " + os.fsencode(canary) + b"'\nios\nsystem\n.",
        b"cleakfree_canary\nanything\n.",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in lists
        b"\x80\x02" + b"(" * 1_000_000 + b".",
        b"\x80\x02r\xff\xff\xff\xff.", b"\x80\x02]r\xff\xff\xff\x0f.",  # a place in a table of 2**32 places
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes that are not there
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"\x80\x63N.", b".", b"\x80\x02N", b"N" * 10, b"\x80\x02Vabc\nQ.", b"\x80\x02\x82\x01.",
    ]  # fmt: skip
    if rng.random() < 0.5:
        return pickle.dumps(rng.choice(calls), protocol=rng.choice([0, 2, 4]))
    return rng.choice(texts)


# --------------------------------------------------------------------------- where a checkpoint is used


def _as_weights(rng: random.Random, place: Place, task: str, write: Callable[[Path], None]) -> list[str]:
    path = place.inputs / rng.choice(["weights.pt", "weights.pth", "weights.pkl", "checkpoint_0000007.pt", "weights"])
    write(path)
    command = rng.choice(["train", "evaluate", "train"])
    config = place.made / f"{task}.yaml"
    return [command, "--config-file", str(config), f"output_dir={place.output}", f"model.weights={path}", *SHORT]


def _on_resume(rng: random.Random, place: Place, task: str, write: Callable[[Path], None]) -> list[str]:
    """The only checkpoint of an interrupted run, or that of the end, of a run that was cut short after it."""
    shutil.copytree(place.made / f"interrupted_{task}", place.output)
    (newest,) = place.output.glob("checkpoint_*.pt")
    newest.unlink()
    write(newest if rng.random() < 0.8 else place.output / "model_final.pt")
    line = ["--config-file", str(place.output / "config.yaml"), f"output_dir={place.output}"]
    return ["train", "--resume", *line] if rng.random() < 0.8 else ["evaluate", *line]


def _to_export(rng: random.Random, place: Place, task: str, write: Callable[[Path], None]) -> list[str]:
    place.output.mkdir()
    if rng.random() < 0.5:
        run = place.inputs / "run"
        shutil.copytree(place.made / "exported", run)
        path = run / "model_final.pt"
        path.unlink()
    else:
        run = path = place.inputs / "checkpoint.pt"
    write(path)
    form = rng.choice(["torchvision", "timm", "detectron2"])
    name = "backbone.pkl" if form == "detectron2" else "backbone.pt"
    return ["export", str(run), "--format", form, "-o", str(place.output / name)]


def _use(
    rng: random.Random, place: Place, what: str, change: Callable[[Path, Path], None], *, codes: tuple[int, ...] = (2,)
) -> Case:
    """Give what ``change(sound checkpoint, path)`` writes to a command."""
    task = rng.choice(TASKS)
    use = rng.choice([_as_weights, _on_resume, _on_resume, _to_export])
    name = "exported" if use is _to_export else f"finished_{task}"
    sound = place.made / name / "model_final.pt"
    if use is _on_resume:
        (sound,) = (place.made / f"interrupted_{task}").glob("checkpoint_*.pt")
    line = use(rng, place, task, lambda path: change(sound, path))
    return Case(f"{what} {use.__name__.strip('_')} ({task})", line, codes=codes)


# --------------------------------------------------------------------------------------- damaged bytes


def damaged_bytes(rng: random.Random, place: Place) -> Case:
    """Truncated, flipped, overwritten: every one shows."""

    def change(sound: Path, path: Path) -> None:
        data = bytearray(sound.read_bytes())
        kind = rng.randrange(6)
        if kind == 0:
            data = data[: rng.randrange(len(data) - 30)]
        elif kind == 1:  # in the first half are members, whose sums are kept; the index is at the end
            for _ in range(rng.choice([1, 1, 3, 50])):
                with zipfile.ZipFile(io.BytesIO(sound.read_bytes())) as file:
                    member = rng.choice([item for item in file.infolist() if item.file_size])
                    head = member.header_offset
                    skip = 30 + sum(struct.unpack_from("<HH", data, head + 26))
                data[head + skip + rng.randrange(member.file_size)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            at = rng.randrange(len(data) - 4096)
            data[at : at + 4096] = bytes(4096)
        elif kind == 3:
            data = data[rng.randrange(1, len(data)) :]
        elif kind == 4:
            data[-22:] = rng.randbytes(22)
        else:
            half = len(data) // 2
            data = data[half:] + data[:half]
        path.write_bytes(data)

    return _use(rng, place, "damaged bytes", change)


def no_checkpoint(rng: random.Random, place: Place) -> Case:
    """Files that are something else."""
    contents = [
        b"", b"\0", b"text\n", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), rng.randbytes(5000), b"{}",
        b"version https://git-lfs",
        (place.secret).read_bytes(), bytes(100_000), b"\x80\x02", b"\x89HDF\r\n\x1a\n", b"<!DOCTYPE html>",
        b"\x1f\x8b\x08",
        b"ustar".rjust(262, b"\0") + bytes(300), b"\x08\x00\x00\x00\x00\x00\x00\x00{\"a\":{}}",
    ]  # fmt: skip
    content = rng.choice(contents)
    return _use(rng, place, f"{content[:12]!r}", lambda sound, path: path.write_bytes(content) and None)


def no_file(rng: random.Random, place: Place) -> Case:
    """A folder, a pipe, a link to itself or to nothing where a checkpoint should be."""
    name = rng.choice(["folder", "pipe", "loop", "nothing", "device"])

    def change(sound: Path, path: Path) -> None:
        if name == "folder":
            path.mkdir()
        elif name == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": path, "nothing": place.inputs / "nothing", "device": Path("/dev/zero")}[name])

    # What is no file in the place of the final checkpoint counts as none: the training goes on to it again.
    return _use(rng, place, f"a {name}", change, codes=(0, 2))


# ------------------------------------------------------------------------------------ hostile pickles


def hostile_pickle(rng: random.Random, place: Place) -> Case:
    """Code in a plain pickle, or in that of a sound checkpoint."""
    data = bomb(rng, place.canary)
    inside = rng.random() < 0.6

    def change(sound: Path, path: Path) -> None:
        if inside:
            _rewrite(sound, path, lambda name, content: data if name.endswith("data.pkl") else content)
        else:
            path.write_bytes(data)

    return _use(rng, place, f"pickle {data[:30]!r} {'inside' if inside else 'alone'}", change)


def _rewrite(sound: Path, path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(path, "w", method) as new:
        for item in old.infolist():
            new.writestr(item.filename, change(item.filename, old.read(item)))


def zip_tricks(rng: random.Random, place: Place) -> Case:
    """Members that are huge, elsewhere, twice, or not what they say."""
    trick = rng.choice(
        ["zeros", "pickle of zeros", "outside", "absolute", "twice", "no data", "lies", "script", "nested"]
    )

    def change(sound: Path, path: Path) -> None:
        if trick == "zeros":  # 1 GB in 1 MB
            _rewrite(
                sound,
                path,
                lambda name, data: bytes(1 << 28) if name.endswith("data/0") else data,
                zipfile.ZIP_DEFLATED,
            )
        elif trick == "pickle of zeros":
            _rewrite(
                sound, path, lambda name, data: bytes(1 << 28) if name.endswith(".pkl") else data, zipfile.ZIP_DEFLATED
            )
        elif trick == "no data":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("archive/version", "3\n")
        elif trick == "nested":
            with zipfile.ZipFile(path, "w") as file:
                file.write(sound, "archive/data.pkl")
        else:
            _rewrite(sound, path, lambda name, data: data)
            name = {"outside": "../../evil", "absolute": "/tmp/evil", "script": "archive/code/evil.py"}.get(trick)
            with zipfile.ZipFile(path, "a") as file:
                if name is not None:
                    file.writestr(name, "import leakfree_canary")
                elif trick == "twice":
                    item = next(item for item in file.namelist() if item.endswith("data.pkl"))
                    file.writestr(item, bomb(rng, place.canary))
            if trick == "lies":  # of how large a member is
                data = bytearray(path.read_bytes())
                at = data.rindex(b"PK\x01\x02")
                data[at + 20 : at + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
                path.write_bytes(data)

    # What lies beside the members of a checkpoint is never looked at.
    return _use(
        rng, place, f"zip: {trick}", change, codes=(0, 2) if trick in ("outside", "absolute", "script") else (2,)
    )


# ------------------------------------------------------------------------------- contents that are wrong


def another_content(rng: random.Random, place: Place) -> Case:
    """No dict, or one without weights."""
    contents: list[Any] = [
        None, 3, "text", [], [{}], torch.zeros(3), {}, {"state_dict": {}}, {"state_dict": None}, {"state_dict": []},
        {"state_dict": {"a": 1}}, {"state_dict": {1: torch.zeros(1)}}, {"model": {"state_dict": {}}}, {1: 2},
        {(): {}},
        {"state_dict": torch.zeros(2)}, {"leakfree": {}}, {"leakfree": None, "state_dict": {}},
        {"a": {"b": {"c": {}}}}, (1, 2),
        {"state_dict": {"model.": torch.zeros(1), "": torch.zeros(1)}},
        {"state_dict": {"x" * 10_000: torch.zeros(1)}},
        {"state_dict": {"a\nleakfree: done\x1b[31m": torch.zeros(1)}}, {"state_dict": {"a": {"b": torch.zeros(1)}}},
    ]  # fmt: skip
    content = rng.choice(contents)
    old = rng.random() < 0.2

    def change(sound: Path, path: Path) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=not old)

    return _use(rng, place, f"content {content!r:.30}", change)


def other_weights(rng: random.Random, place: Place) -> Case:
    """A tensor or a name of the state dict is another."""
    trick = rng.choice(
        ["shape", "name", "missing", "extra", "scalar", "int", "bool", "complex", "nan", "inf", "half", "double",
        "sparse",
         "text", "none", "number", "meta", "stretched", "empty", "list", "array", "parameter"]
    )  # fmt: skip

    def change(sound: Path, path: Path) -> None:
        content = torch.load(sound, weights_only=True)
        state = content["state_dict"]
        used = "model.query.backbone." if sound.parent.name == "exported" else ""
        found = [name for name in state if name.startswith(used)]
        name = rng.choice([name for name in found if state[name].is_floating_point() and state[name].numel() > 1])
        value = state[name]
        huge = torch.zeros(1).expand(10**6, 10**6)
        others: dict[str, Any] = {
            "shape": value[:-1], "scalar": torch.tensor(1.0), "int": value.long(), "bool": value > 0,
            "complex": value.to(torch.complex64), "nan": value * float("nan"), "inf": value + float("inf"),
            "half": value.half(), "double": value.double(), "sparse": value.to_sparse(), "text": "weights",
            "none": None,
            "number": 1.0, "meta": value.to("meta"), "stretched": huge, "empty": torch.zeros(0),
            "list": value.tolist(),
            "array": value.numpy(),
            "parameter": torch.nn.Parameter(value),
        }  # fmt: skip
        if trick == "name":
            state[f"{name}x"] = state.pop(name)
        elif trick == "missing":
            del state[name]
        elif trick == "extra":
            state["model.more.weight"] = value
        else:
            state[name] = others[trick]
        torch.save(content, path)

    sound = ("int", "bool", "half", "double", "nan", "inf", "parameter", "complex", "sparse", "meta")
    return _use(rng, place, f"weights: {trick}", change, codes=(0, 2) if trick in (*sound, "extra") else (2,))


_ENTRY: list[Any] = [
    None,
    3,
    "text",
    [],
    {},
    [1],
    {"a": 1},
    -1,
    2**70,
    float("nan"),
    True,
    torch.zeros(2),
    [None],
    [{}],
]


def another_entry(rng: random.Random, place: Place) -> Case:
    """What a leakfree training notes beside the weights is another thing."""
    key = rng.choice(
        [
            "",
            "format",
            "version",
            "step",
            "seconds",
            "world_size",
            "freeze_bn",
            "rank_buffers",
            "config",
            "freeze_bn.frozen_at",
        ]
    )
    value = rng.choice(_ENTRY)
    gone = rng.random() < 0.3

    def change(sound: Path, path: Path) -> None:
        content = torch.load(sound, weights_only=True)
        names = ["leakfree", *key.split(".")] if key else ["leakfree"]
        section = content
        for name in names[:-1]:
            section = section[name]
        if gone:
            section.pop(names[-1], None)
        else:
            section[names[-1]] = value
        torch.save(content, path)

    # Not every use looks at every entry.
    return _use(rng, place, f"leakfree.{key} {'gone' if gone else repr(value):.30}", change, codes=(0, 2))


def another_state(rng: random.Random, place: Place) -> Case:
    """What Lightning and the optimizer wrote is another thing."""
    keys = ["optimizer_states", "lr_schedulers", "loops", "global_step", "epoch", "callbacks",
    "pytorch-lightning_version",
            "state_dict", "hyper_parameters", "MixedPrecision", "hparams_name"]  # fmt: skip
    key = rng.choice(keys)
    values = [*_ENTRY, "99.9.9", [{"state": {}, "param_groups": []}],
    [{"state": {0: {"momentum_buffer": torch.zeros(1)}}}],
              {"fit_loop": {}}, {"fit_loop": 3}]  # fmt: skip
    value = rng.choice(values)
    gone = rng.random() < 0.3

    def change(sound: Path, path: Path) -> None:
        content = torch.load(sound, weights_only=True)
        if gone:
            content.pop(key, None)
        else:
            content[key] = value
        torch.save(content, path)

    return _use(rng, place, f"{key} {'gone' if gone else repr(value):.30}", change, codes=(0, 2))


def of_another_task(rng: random.Random, place: Place) -> Case:
    """A sound checkpoint of another task."""
    return _use(
        rng,
        place,
        "of another task",
        lambda sound, path: shutil.copy(_other(rng, place, sound), path) and None,
    )


def _other(rng: random.Random, place: Place, sound: Path) -> Path:
    """A finished run whose weights fit none of the uses of ``sound``."""
    own = next((task for task in TASKS if task in sound.parent.name), "contrastive")
    return place.made / f"finished_{rng.choice([task for task in TASKS if task != own])}" / "model_final.pt"


def a_broken_folder(rng: random.Random, place: Place) -> Case:
    """A run whose record, rows or names of checkpoints are another thing."""
    task = rng.choice(TASKS)
    shutil.copytree(place.made / f"interrupted_{task}", place.output)
    record = json.loads((place.output / "record.json").read_text())
    trick = rng.choice(["record", "record", "key", "key", "key", "rows", "rows", "name", "pipe", "newer"])
    what = trick
    if trick == "record":
        text = rng.choice([b"", b"{", b"[]", b"3", b"null", b"\xff", b'{"a": ' * 5000, b"9" * 5000, b"{}", b"\0" * 50])
        what = f"record {text[:10]!r}"
        (place.output / "record.json").write_bytes(text)
    elif trick == "key":
        key, value = (
            rng.choice(list(record)),
            rng.choice([None, 3, "x", [], {}, {"a": {}}, [1], -1, 1e999, {"world_size": 0}]),
        )
        what = f"record.{key}={value!r}"
        (place.output / "record.json").write_text(json.dumps({**record, key: value}))
    elif trick == "rows":
        row = rng.choice(
            [b"3", b"[]", b"null", b'{"step": "x"}', b'{"step": null}', b"\xff\xfe", b'{"step": 1e999}', b"{" * 9999]
        )
        what = f"row {row[:15]!r}"
        (place.output / "metrics.json").write_bytes(row + b"\n" + row + b'\n{"step": 1}\n')
    elif trick == "name":
        name = rng.choice(["checkpoint_9999999999999999999999.pt", "checkpoint_0000000.pt", "checkpoint_0000099.pt"])
        what = name
        shutil.copy(next(place.output.glob("checkpoint_*.pt")), place.output / name)
    elif trick == "pipe":
        name = rng.choice(["record.json", "metrics.json", "checkpoint_0000002.pt", "model_final.pt"])
        what = f"pipe {name}"
        (place.output / name).unlink(missing_ok=True)
        os.mkfifo(place.output / name)
    else:
        (place.output / "record.json").write_text(json.dumps({**record, "format": rng.choice([99, "x", None, -1])}))
    line = ["train", "--resume"] if rng.random() < 0.7 else ["evaluate"]
    line += ["--config-file", str(place.made / f"finished_{task}" / "config.yaml"), f"output_dir={place.output}"]
    return Case(f"folder: {what} ({task})", line, codes=(0, 2))


MAKERS: list[Make] = [
    damaged_bytes, hostile_pickle, other_weights, another_entry, no_file, another_state, another_content,
    a_broken_folder,
    no_checkpoint, zip_tricks, hostile_pickle, other_weights, another_entry, another_state, a_broken_folder,
    of_another_task,
]  # fmt: skip
