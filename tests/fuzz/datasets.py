"""Malformed data: COCO annotations, images, CIFAR's pickles, folders of images; records of runs to compare."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.checkpoints import bomb
from tests.fuzz.place import SHORT, Case, Make, Place

__all__ = ["MAKERS"]

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, -(10**30), 0.5, math.nan, math.inf, -math.inf, 1e-300, 1e300,
    "",
    "1", "a\0b", "\ud800", "x" * 100_000, "é", [], {}, [[]], [None], {"a": 1}, [1, 2, 3, 4], ["a", "b", "c", "d"],
]  # fmt: skip


def _dump(value: Any) -> str:
    return json.dumps(value)


def _detect(place: Place, rng: random.Random, *more: str, masks: bool = True) -> list[str]:
    """Train on, and evaluate, the data in ``inputs``."""
    images, annotations = place.inputs / "coco" / "images", place.inputs / "coco" / "instances.json"
    data = [
        f"data.{split}={{name: coco, images: {json.dumps(str(images))}, annotations: {json.dumps(str(annotations))}}}"
        for split in ("train", "val")
    ]
    line = ["train", "--config-file", str(place.made / "detection.yaml"), f"output_dir={place.output}", *data, *SHORT]
    line += ["trainer.total_batch_size=4", "evaluation.max_images=8"]
    return [*line, *more] if masks else [*line, "model.mask_head.enabled=false", *more]


def _copied(place: Place) -> tuple[Path, dict[str, Any]]:
    folder = shutil.copytree(place.made / "coco", place.inputs / "coco")
    return folder, json.loads((folder / "instances.json").read_text())


def _coco(rng: random.Random, place: Place, what: str, content: dict[str, Any], *, refused: bool = False) -> Case:
    (place.inputs / "coco" / "instances.json").write_text(_dump(content))
    skip = rng.random() < 0.3
    line = _detect(place, rng, *(["data.on_error=skip"] if skip else []), masks=rng.random() < 0.8)
    return Case(f"{what}{' (skip)' if skip else ''}", line, codes=(0, 2) if skip or not refused else (2,))


# ---------------------------------------------------------------------------------------------- COCO


def a_field(rng: random.Random, place: Place) -> Case:
    """A field of an image, an annotation or a category is another thing, or is not there."""
    _, content = _copied(place)
    section = rng.choice(["images", "annotations", "annotations", "categories"])
    item = rng.choice(content[section])
    key = rng.choice(list(item))
    if rng.random() < 0.2:
        del item[key]
        return _coco(rng, place, f"{section}.{key} gone", content)
    item[key] = rng.choice(JUNK)
    return _coco(rng, place, f"{section}.{key}={item[key]!r:.30}", content)


def a_section_of_coco(rng: random.Random, place: Place) -> Case:
    _, content = _copied(place)
    key = rng.choice(["images", "annotations", "categories"])
    how = rng.randrange(4)
    if how == 0:
        content[key] = rng.choice([None, {}, 3, "text", [None], [[]], [3], ["a"], [{}]])
    elif how == 1:
        del content[key]
    elif how == 2:
        content[key] = []
    else:
        content[key].insert(rng.randrange(len(content[key])), rng.choice(JUNK))
    return _coco(rng, place, f"{key} ({how})", content)


def a_box(rng: random.Random, place: Place) -> Case:
    _, content = _copied(place)
    side = 64
    boxes: list[Any] = [
        [math.nan, 1, 2, 3], [1, 1, math.inf, 3], [1, 1, -5, 3], [1, 1, 0, 3], [500, 500, 5, 5], [-100, -100, 50, 50],
        [1, 2, 3], [1, 2, 3, 4, 5], ["1", 2, 3, 4], [None] * 4, [[1], 2, 3, 4], [True, True, 5, 5], [10**400, 1, 1,
        1],
        [1e17, 1, 1e17, 1], [side - 1e-9, 1, 1e-9, 5], [5, 5, 1e-30, 1e-30], [33.3, 33.3, 1e-7, 9], [-1e-9, -1e-9, 5,
        5],
        [0, 0, 1e9, 1e9], [side, 0, 5, 5], [0, side - 1e-12, 5, 5], [63.9999999, 3, 0.00000001, 5], [0, 0, 5e-324, 5],
        {"x": 1}, "1 2 3 4", None,
    ]  # fmt: skip
    items = content["annotations"] if rng.random() < 0.5 else [rng.choice(content["annotations"])]
    box = rng.choice(boxes)
    for item in items:
        item["bbox"] = box
    return _coco(rng, place, f"box {box!r:.40} in {len(items)}", content)


def a_mask(rng: random.Random, place: Place) -> Case:
    _, content = _copied(place)
    item = rng.choice(content["annotations"])
    masks: list[Any] = [
        [[1, 1, 20, 1, 20]], [[1, 1]], [[1, 1, 2, 2]], [[]], [], None, 3, "text", {}, [[math.nan] * 6], [["a"] * 6],
        [[1e300] * 6], [[1, 1, 1, 1, 1, 1]], [[-500, 0, 500, 0, 0, 500]], [[[1, 2]] * 3], [{}], [None], [[1, 2, 3, 4,
        5, 6], None],
        [[10**400, 1, 2, 3, 4, 5]], [[True] * 6], [[1, 1, 20, 1, 20, 20]] * 3000, [[1.5, 2] * 20_000],
        {"size": [64, 64], "counts": [-1, 4097]}, {"size": [64, 64], "counts": [4096]}, {"size": [64, 64],
        "counts": []},
        {"size": [64, 64], "counts": [0, 4096]}, {"size": [64, 64], "counts": [1e3, 96]}, {"size": [64, 64],
        "counts": ["a"]},
        {"size": [64.0, 64.0], "counts": [0, 4096]}, {"size": [64, True], "counts": [64]}, {"size": [10**9, 10**9],
        "counts": [1]},
        {"size": [64, 64], "counts": [2**63, 1]}, {"size": [64, 64], "counts": [2**32, 1, -(2**32) + 4095]},
        {"size": [64, 64], "counts": [True, 4095]}, {"size": [64, 64], "counts": [0, 1] * 2048}, {"size": None,
        "counts": "a"},
        {"size": [64, 64], "counts": "x" * 10_000}, {"size": [64, 64], "counts": "\x00\x01"}, {"size": [64, 64],
        "counts": ""},
        {"size": [64, 64], "counts": "eh22_1b0M000000000b0^OXg"}, {"size": [64, 64], "counts": "oooooooooooo"},
        {"counts": "a"},
        {"size": [64, 64], "counts": "é\ud800"}, {"size": [64, 64]}, {"size": [64], "counts": [1]}, {"size": 64,
        "counts": [1]},
        {"size": [64, 64], "counts": None}, {"size": [64, 64], "counts": {"a": 1}}, {"size": [64, 64],
        "counts": "0" * 5000},
        {"size": [64, 64], "counts": "P`0"}, {"size": [-64, -64], "counts": [4096]}, {"size": ["64", "64"],
        "counts": "P`0"},
    ]  # fmt: skip
    item["segmentation"] = rng.choice(masks)
    return _coco(rng, place, f"mask {item['segmentation']!r:.40}", content)


def an_identity(rng: random.Random, place: Place) -> Case:
    """Ids that repeat, are missing, of nobody, or no integers."""
    _, content = _copied(place)
    section = rng.choice(["images", "annotations", "categories"])
    how = rng.choice(["repeat", "huge", "text", "negative", "nobody", "all", "crowd", "float"])
    item = rng.choice(content[section])
    if how == "repeat":
        item["id"] = rng.choice(content[section])["id"]
    elif how == "nobody":
        rng.choice(content["annotations"])[rng.choice(["image_id", "category_id"])] = rng.choice([0, -5, 99999, 2**62])
    elif how == "all":
        shift = rng.choice([2**62, -100, 2**31, 2**53])
        for image in content["images"]:
            image["id"] += shift
        for annotation in content["annotations"]:
            annotation["image_id"] += shift
    elif how == "crowd":
        for annotation in content["annotations"]:
            annotation["iscrowd"] = rng.choice([1, True, 1.0, 2, -1, "1", None, [], 0.5])
    else:
        item["id"] = {"huge": 2**63 - 1, "text": str(item["id"]), "negative": -7, "float": 1.0}[how]
    return _coco(rng, place, f"{section} ids: {how}", content)


def a_file_name(rng: random.Random, place: Place) -> Case:
    """Images that lie elsewhere: refused, whatever is there."""
    folder, content = _copied(place)
    (folder / "images" / "sub").mkdir()
    (folder / "outside.png").write_bytes(place.secret.read_bytes())
    item = content["images"][0]
    secret = str(place.secret)
    item["file_name"] = name = rng.choice(
        [
            secret, "../outside.png", "../../secret.png", f"../../../{place.sandbox.name}/secret.png",
            "./../../../secret.png",
            "sub/../../../../secret.png", f"//{secret}", "/etc/passwd", "../" * 60 + "etc/passwd", "..", ".", "/",
            "sub",
            f"{folder}/images/000001.png", "sub/../../images/../../../secret.png",
            "000001.png/../../../../secret.png",
        ]
    )  # fmt: skip
    (folder / "instances.json").write_text(_dump(content))
    return Case(f"file_name {name[-30:]!r}", _detect(place, rng))


def an_odd_name(rng: random.Random, place: Place) -> Case:
    folder, content = _copied(place)
    (folder / "images" / "loop.png").symlink_to("loop.png")
    (folder / "images" / "gone.png").symlink_to("nothing.png")
    (folder / "images" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "images" / "pipe.png")
    item = content["images"][0]
    item["file_name"] = name = rng.choice(
        ["a\0b.png", "\ud800.png", "x" * 5000, "x/" * 3000, "loop.png", "gone.png", "zero.png", "pipe.png", "~/x.png",
         "C:\\x.png", "000001.png\n", "\x1b[31m.png", "http://localhost:1/x.png", "file:///etc/passwd", "000001.PNG",
         "*.png",
         "000001.png\0.txt", " ", "000001.png/", "pipe:0"]
    )  # fmt: skip
    (folder / "instances.json").write_text(_dump(content))
    return Case(f"file_name {name[:30]!r}", _detect(place, rng))


def a_json(rng: random.Random, place: Place) -> Case:
    """What is no JSON, or not of instances."""
    folder, content = _copied(place)
    text = _dump(content).encode()
    deep = rng.choice([900, 100_000])
    texts = [
        text[: rng.randrange(len(text))], b"", b"{}", b"[]", b"null", b"3", b"NaN", b'"text"', text + b"}",
        text + b"\0", b"\xff\xfe",
        text.replace(b'"images"', b'"image"'), text.replace(b":", b"=", 1), b"[" * deep, b'{"a":' * deep,
        text.decode().encode("utf-16"),
        b"9" * 10_000, b'{"images": [], "annotations": [], "categories": []}', text.replace(b"64", b"6" * 5000, 1),
        b"\x00" * 500,
        b'{"images": ' + b"[" * deep + b"]" * deep + b', "annotations": [], "categories": []}', text.replace(b'"',
        b"'"),
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        place.secret.read_bytes(), text.replace(b"},", b"}", 1), b"\xef\xbb\xbf" * 2 + text,
        b"{" + b'"x": 1,' * 50_000 + b'"y": 1}',
    ]  # fmt: skip
    data = rng.choice(texts)
    (folder / "instances.json").write_bytes(data)
    return Case(f"json {data[:25]!r}, {len(data)} bytes", _detect(place, rng))


# -------------------------------------------------------------------------------------------- images


def _png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _image(rng: random.Random, sound: bytes, canary: Path) -> tuple[str, bytes]:
    """A file that is no image of this size."""
    other = io.BytesIO()
    Image.new(rng.choice(["1", "P", "LA", "CMYK", "F", "I;16", "YCbCr"]), (9, 9)).save(other, "TIFF")
    flipped = bytearray(sound)
    for _ in range(5):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    kinds = {
        "empty": b"",
        "truncated": sound[: rng.randrange(len(sound))],
        "flipped": bytes(flipped),
        "text": b"not an image",
        "pickle": bomb(rng, canary),
        "html": b"<!DOCTYPE html><p>404",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
        "bomb": _png(30_000, 30_000, bytes(1000)),
        "large": _png(12_000, 12_000, bytes(1000)),
        "declared": _png(2**31 - 1, 2**31 - 1, b""),
        "nothing": _png(0, 0, b""),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(touch " + os.fsencode(canary) + b") run\n",
        "gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "other mode": other.getvalue(),
        "zeros": bytes(5000),
        "jpeg": b"\xff\xd8\xff\xe0" + rng.randbytes(300),
        "noise": rng.randbytes(3000),
    }
    name = rng.choice(list(kinds))
    return name, kinds[name]


def an_image(rng: random.Random, place: Place) -> Case:
    """Every image, or one, of a COCO data set is broken."""
    folder, _ = _copied(place)
    files = sorted((folder / "images").iterdir())
    files = files if rng.random() < 0.7 else files[:1]
    name, data = _image(rng, files[0].read_bytes(), place.canary)
    for path in files:
        path.write_bytes(data)
    skip = rng.random() < 0.4
    line = _detect(place, rng, *(["data.on_error=skip"] if skip else []))
    return Case(f"{len(files)} images: {name}{' (skip)' if skip else ''}", line, codes=(0, 2))


def a_missing_image(rng: random.Random, place: Place) -> Case:
    folder, _ = _copied(place)
    path = rng.choice(sorted((folder / "images").iterdir()))
    path.unlink()
    if rng.random() < 0.4:
        path.mkdir()
    if rng.random() < 0.2:
        shutil.rmtree(folder / "images")
    return Case("an image is not there", _detect(place, rng))


# ---------------------------------------------------------------------------- CIFAR, folders of images


def _classify(place: Place, *data: str) -> list[str]:
    task = ["train", "--config-file", str(place.made / "classification.yaml"), f"output_dir={place.output}", *SHORT]
    return [*task, "trainer.total_batch_size=8", "evaluation.precise_images=8", "evaluation.max_images=200", *data]


def a_cifar_file(rng: random.Random, place: Place) -> Case:
    """A file of CIFAR is hostile, damaged, or of another shape."""
    folder = shutil.copytree(place.made / "cifar-10-batches-py", place.inputs / "cifar-10-batches-py")
    path = folder / rng.choice(["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
    sound = pickle.loads(path.read_bytes())
    pixels = np.zeros((20, 3072), np.uint8)
    key = rng.choice(list(sound))
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    shared: list[Any] = []
    for _ in range(60):
        shared = [shared, shared]
    values: list[Any] = [
        None, 3, [], {}, "text", b"bytes", [1] * 20, [99] * 20, [-1] * 20, [2**70] * 20, [None] * 20, ["a"] * 20,
        [1.5] * 20,
        pixels[:5], pixels.astype(np.float64), pixels.reshape(20, 3, 1024), pixels[:, :100], np.zeros((0, 3072),
        np.uint8),
        np.array([{"a": 1}], dtype=object), np.array(["x"]), np.zeros(20, dtype="M8[s]"), np.zeros((), np.uint8),
        [True] * 20,
        np.zeros(2, dtype=[("a", "i4")]), pixels.T, shared, dict.fromkeys(("a", b"a", 1), 1), [[1]] * 20,
    ]  # fmt: skip
    data = path.read_bytes()
    how = rng.choice(
        ["hostile", "hostile", "value", "value", "gone", "truncated", "flipped", "key", "pipe", "folder", "empty"]
    )
    if how == "hostile":
        path.write_bytes(bomb(rng, place.canary))
    elif how == "value":
        value = rng.choice(values)
        how = f"{key!r} is {'shared lists' if value is shared else repr(value):.30}"
        path.write_bytes(pickle.dumps({**sound, key: value}, protocol=2))
    elif how == "gone":
        path.write_bytes(pickle.dumps({name: item for name, item in sound.items() if name != key}, protocol=2))
    elif how == "key":
        path.write_bytes(_nested_key(sound))
    elif how == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "flipped":  # of the pickle's words, not of a pixel
        head = 150 if len(data) > 150 else len(data)
        path.write_bytes(bytes([*data[: (at := rng.randrange(head))], data[at] ^ 0x55, *data[at + 1 :]]))
    else:
        path.unlink()
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        else:
            path.write_bytes(b"")
    root = json.dumps(str(place.inputs))
    line = _classify(place, *(f"data.{split}={{name: cifar10, path: {root}}}" for split in ("train", "val")))
    sound_too = how == "flipped" or "True" in how or "shared" in how or "array" in how or how.startswith(repr(key))
    return Case(f"cifar {path.name}: {how}", line, codes=(0, 2) if sound_too else (2,))


def _nested_key(sound: dict[Any, Any]) -> bytes:
    """A key whose hash takes 2**60 steps: a tuple of a tuple twice, and so on."""
    key = b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    return b"\x80\x02}(" + key + b"K\x01u."


def a_folder_of_images(rng: random.Random, place: Place) -> Case:
    folder = place.inputs / "images"
    how = rng.choice(
        ["empty", "no class", "empty class", "broken", "broken", "broken", "loop", "two loops", "pipe", "file",
        "text", "names",
         "link", "missing", "device"]
    )  # fmt: skip
    if how != "missing":
        shutil.copytree(place.made / "images", folder)
    first = folder / "cat" / "0.png"
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no class":
        shutil.move(folder / "cat" / "1.png", folder / "1.png")
        shutil.rmtree(folder / "cat")
        shutil.rmtree(folder / "dog")
    elif how == "empty class":
        (folder / "bird").mkdir()
    elif how == "broken":
        name, data = _image(rng, first.read_bytes(), place.canary)
        how = f"broken: {name}"
        for path in folder.rglob("*.png"):
            path.write_bytes(data)
    elif how == "loop":
        (folder / "cat" / "cat").symlink_to(folder / "cat")
    elif how == "two loops":
        for name in "ab":
            (folder / "cat" / name).symlink_to(folder / "cat")
    elif how == "pipe":
        for path in list(folder.rglob("*.png")):
            path.unlink()
            os.mkfifo(path)
    elif how == "device":
        first.unlink()
        first.symlink_to("/dev/zero")
    elif how == "link":
        first.unlink()
        first.symlink_to("0.png")
    elif how == "file":
        shutil.rmtree(folder)
        folder.write_text("a file")
    elif how == "text":
        for path in list(folder.rglob("*.png")):
            path.rename(path.with_suffix(".txt"))
    elif how == "names":
        (folder / "a\nb\x1b[31m").mkdir()
        shutil.copy(first, folder / "a\nb\x1b[31m" / "\udcff\n.png")
    root = json.dumps(str(folder))
    line = _classify(place, *(f"data.{split}={{name: image_folder, path: {root}}}" for split in ("train", "val")))
    return Case(f"folder: {how}", line, codes=(0, 2))


# ------------------------------------------------------------------------------------- runs to compare


def a_record(rng: random.Random, place: Place) -> Case:
    """A record or rows that were edited or torn; page and console show texts of it and run none."""
    runs = [place.inputs / name for name in ("one", "two")]
    task = rng.choice(["detection", "classification", "contrastive"])
    for run in runs:
        shutil.copytree(place.made / f"finished_{task}", run)
    record = json.loads((runs[0] / "record.json").read_text())
    how = rng.choice(["value", "value", "value", "deep", "text", "rows", "row", "pipe", "script", "config", "config"])
    if how in ("value", "deep"):
        section, key = record, rng.choice(list(record))
        if how == "deep":
            while isinstance(section[key], dict) and section[key]:
                section = section[key]
                key = rng.choice(list(section))
        section[key] = rng.choice(JUNK)
        how = f"{how} {key}={section[key]!r:.30}"
    elif how == "config":
        section = record["config"]
        key = rng.choice(list(section))
        while isinstance(section[key], dict) and section[key] and rng.random() < 0.8:
            section = section[key]
            key = rng.choice(list(section))
        if rng.random() < 0.3:
            del section[key]
        else:
            section[key] = rng.choice(JUNK)
        how = f"config {key}"
    elif how == "script":
        evil = "<script>alert(1)</script>\x1b]0;x\x07\ud800"
        record |= {"name": evil, "task": rng.choice([evil, record["task"]]), "notes": [evil]}
        record["results"] = {evil: {evil: 0.5}}
    (runs[0] / "record.json").write_text(json.dumps(record))
    if how == "text":
        texts = [
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff",
            b"9" * 10_000,
            b'{"a":' * 100_000,
            json.dumps(record).encode()[:-40],
            b"\0",
        ]
        (runs[0] / "record.json").write_bytes(rng.choice(texts))
    elif how in ("rows", "row"):
        rows = [b"3", b"[]", b"null", b'{"step": "x", "loss": []}', b'{"step": 1, "loss": "x"}', b"\xff",
        b'{"step": -1, "loss": 1e999}',
                b'{"step": 1, "loss": ' + b"9" * 400 + b"}", b"9" * 5000, b"[" * 100_000,
                b'{"step": 1e308}', b"{}"]  # fmt: skip
        row = rng.choice(rows)
        how = f"rows {row[:20]!r}"
        (runs[0] / "metrics.json").write_bytes(b"\n".join([row, row, b'{"step": 1, "loss": 0.5}', b""]))
    elif how == "pipe":
        name = rng.choice(["record.json", "metrics.json"])
        (runs[0] / name).unlink()
        os.mkfifo(runs[0] / name)
    page = place.output / "page.html"
    line = ["compare", *map(str, copy.copy(runs))]
    return Case(f"compare ({task}): {how}", [*line, "-o", str(page)] if rng.random() < 0.7 else line, codes=(0, 2))


MAKERS: list[Make] = [
    a_field, a_box, a_mask, a_cifar_file, a_record, a_json, an_image, a_file_name, an_identity, a_field,
    a_folder_of_images,
    a_record, a_section_of_coco, an_odd_name, a_mask, a_cifar_file, a_missing_image, an_image, a_box,
    a_folder_of_images,
]  # fmt: skip
