"""CIFAR's own files: as torchvision reads them, whoever wrote the pickle; and files that are broken or hostile."""

import io
import os
import pickle
import struct
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakfree.config.schema import ClassificationDataConfig, ImagesConfig
from leakfree.data import build_image_loader, build_images
from leakfree.errors import DataError

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Texts and bytes as Python 2 wrote them, which is how the official files are: strings of bytes."""

    dispatch: typing.ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(content: typing.Any) -> bytes:
    out = io.BytesIO()
    _Python2Pickler(out, protocol=2).dump(content)
    return out.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")  # the name of its time


WRITERS = {"python2": python2, **{f"protocol{n}": lambda c, n=n: pickle.dumps(c, protocol=n) for n in (2, 4, 5)}}


def part(rng: np.random.Generator, count: int, classes: int, key: str) -> dict[str, typing.Any]:
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [int(value) for value in rng.integers(0, classes, count)]
    return {"batch_label": "a part", key: labels, "data": pixels, "filenames": ["x.png"] * count}


def write(root: Path, name: str, write_one=python2) -> Path:
    """A small CIFAR in the official layout; the folder."""
    rng = np.random.default_rng(0)
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    if name == "cifar10":
        files = {f"data_batch_{n}": part(rng, n, 10, "labels") for n in range(1, 6)}
        files["test_batch"] = part(rng, 4, 10, "labels")
        files["batches.meta"] = {"num_cases_per_batch": 5, "label_names": [f"kind {n}" for n in range(10)]}
    else:
        files = {"train": part(rng, 7, 100, "fine_labels"), "test": part(rng, 3, 100, "fine_labels")}
        files["meta"] = {"fine_label_names": [f"kind {n}" for n in range(100)], "coarse_label_names": ["a", "b"]}
    for file, content in files.items():
        (folder / file).write_bytes(write_one(content))
    return folder


def config(root: Path, name: str = "cifar10", path: str = "", **changes: typing.Any) -> ClassificationDataConfig:
    train, val = (ImagesConfig(name=name, path=path) for _ in range(2))
    return ClassificationDataConfig(
        root=str(root), train=train, val=val, image_size=32, **{"num_workers": 0, **changes}
    )


class _Unchecked10(torchvision.datasets.CIFAR10):
    """Torchvision's reader without the checksums of the official files."""

    train_list: typing.ClassVar = [[name, None] for name, _ in torchvision.datasets.CIFAR10.train_list]
    test_list: typing.ClassVar = [["test_batch", None]]
    meta: typing.ClassVar = {"filename": "batches.meta", "key": "label_names", "md5": None}


class _Unchecked100(torchvision.datasets.CIFAR100):
    train_list: typing.ClassVar = [["train", None]]
    test_list: typing.ClassVar = [["test", None]]
    meta: typing.ClassVar = {"filename": "meta", "key": "fine_label_names", "md5": None}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_what_torchvision_reads(tmp_path, name, writer):
    write(tmp_path, name, WRITERS[writer])
    theirs = _Unchecked10 if name == "cifar10" else _Unchecked100
    for split in ("train", "val"):
        images = build_images(config(tmp_path, name), split)
        expected = theirs(str(tmp_path), train=split == "train")
        assert images.classes == expected.classes
        assert images.labels.tolist() == expected.targets
        assert images.labels.dtype == np.int64
        assert len(images) == len(expected) == {"cifar10": (15, 4), "cifar100": (7, 3)}[name][split == "val"]
        for index, (picture, _) in enumerate(expected):
            found = images.read(index)
            assert (found.dtype, found.shape) == (torch.float32, (3, 32, 32))
            torch.testing.assert_close(found, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("path", ["", "deep/cifar-10-batches-py", "deep", "absolute"])
def test_the_path_is_the_folder_or_where_it_lies(tmp_path, path):
    folder = write(tmp_path / ("deep" if path else ""), "cifar10")
    assert len(build_images(config(tmp_path, path=str(folder) if path == "absolute" else path), "train")) == 15


def test_a_fortran_array_and_labels_as_an_array_are_read(tmp_path):
    folder = write(tmp_path, "cifar10")
    content = part(np.random.default_rng(3), 6, 10, "labels")
    expected = content["data"].copy()
    content["data"], content["labels"] = np.asfortranarray(content["data"]), np.array(content["labels"], dtype=">i4")
    (folder / "test_batch").write_bytes(python2(content))
    images = build_images(config(tmp_path), "val")
    assert images.labels.tolist() == content["labels"].tolist()
    for index in range(6):
        torch.testing.assert_close(images.read(index).flatten(), torch.from_numpy(expected[index]) / 255)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_share_the_bytes(tmp_path, context):
    write(tmp_path, "cifar10")
    settings = config(tmp_path, num_workers=1)
    images = build_images(settings, "train")
    assert images.read.pixels.dtype == torch.uint8
    assert images.read.pixels.untyped_storage().nbytes() == 15 * 3072  # nothing else is kept alive
    loader = build_image_loader(images, settings, [[3, 0], [14]])
    loader.multiprocessing_context = context
    pixels = torch.cat([batch for batch, _, _ in loader])
    assert torch.equal(pixels, torch.stack([images.read(index) for index in (3, 0, 14)]))


# ---------------------------------------------------------------------------------------- what is wrong


def fails(root: Path, *words: str, split: typing.Any = "train") -> None:
    with pytest.raises(DataError) as caught:
        build_images(config(root), split)
    message = str(caught.value)
    assert message.startswith(f"data.{split}.path: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_missing_is_told(tmp_path):
    fails(tmp_path, "cifar-10-batches-py: no such folder; unpack cifar-10-python.tar.gz in")
    folder = write(tmp_path, "cifar10")
    (folder / "data_batch_3").unlink()
    fails(tmp_path, "data_batch_3: No such file", "cifar-10-python.tar.gz again")
    build_images(config(tmp_path), "val")
    (folder / "batches.meta").unlink()
    fails(tmp_path, "batches.meta: No such file", split="val")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None}, ["data should be uint8 (images, 3072), got NoneType"]),
        ({"data": np.zeros((4, 3071), np.uint8)}, ["got uint8 (4, 3071)"]),
        ({"data": np.zeros((4, 3072), np.float32)}, ["got float32 (4, 3072)"]),
        ({"data": np.zeros((3, 3072), np.uint8)}, ["3 images and 4 labels"]),
        ({"data": np.array([None] * 4)}, ["broken file", "other than plain numbers"]),
        ({"labels": [0, 1, 2]}, ["4 images and 3 labels"]),
        ({"labels": [0, 1, 2, 10]}, ["labels should be from 0 to 9, got 0 to 10"]),
        ({"labels": [0, 1, 2, -1]}, ["got -1 to 2"]),
        ({"labels": [0, 1, 2, [3]]}, ["a list of integers"]),
        ({"labels": "0123"}, ["a list of integers"]),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, change, words):
    folder = write(tmp_path, "cifar10")
    (folder / "test_batch").write_bytes(python2({**part(np.random.default_rng(0), 4, 10, "labels"), **change}))
    fails(tmp_path, "test_batch: ", *words, split="val")


def test_another_file_is_told(tmp_path):
    folder = write(tmp_path, "cifar10")
    (folder / "test_batch").write_bytes(python2(part(np.random.default_rng(0), 4, 10, "fine_labels")))
    fails(tmp_path, "has no 'labels', only batch_label, data, filenames, fine_labels", split="val")
    (folder / "test_batch").write_bytes(python2([1, 2]))
    fails(tmp_path, "holds a list, and no dictionary", split="val")
    (folder / "batches.meta").write_bytes(python2({"label_names": ["cat", "cat"]}))
    fails(tmp_path, "batches.meta: label_names should be a list")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_or_damaged_file_is_one_line_or_still_images(tmp_path, data):
    folder = tmp_path / FOLDERS["cifar10"]
    if not folder.exists():
        write(tmp_path, "cifar10")
    whole = python2(part(np.random.default_rng(0), 4, 10, "labels"))
    cut = data.draw(st.integers(0, len(whole) - 1))
    (folder / "test_batch").write_bytes(whole[:cut])
    fails(tmp_path, "test_batch: broken file: ", "unpack cifar-10-python.tar.gz again", split="val")
    damaged = bytearray(whole)
    heads = [place for place in range(len(whole)) if not 300 < place < len(whole) - 300]  # not only pixels
    damaged[data.draw(st.sampled_from(heads))] ^= 1 << data.draw(st.integers(0, 3))
    (folder / "test_batch").write_bytes(damaged)
    try:
        images = build_images(config(tmp_path), "val")
    except DataError as error:
        assert "test_batch: " in str(error)  # noqa: PT017  (most changes, not all, can be seen)
    else:
        assert images.read(0).shape == (3, 32, 32)


class _Runs:
    """What a hostile file would run."""

    def __init__(self, function: typing.Any, *args: typing.Any) -> None:
        self.made = function, args

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, Path, getattr, np.load])
def test_a_file_cannot_run_anything(tmp_path, function, protocol):
    folder = write(tmp_path, "cifar10")
    args = (tmp_path, "name") if function is getattr else (str(tmp_path / "made"),)
    content = {**part(np.random.default_rng(0), 4, 10, "labels"), "more": _Runs(function, *args)}
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
    fails(tmp_path, "test_batch: broken file: it names ", "was not looked up", split="val")
    assert not (tmp_path / "made").exists()


def test_a_file_cannot_change_what_reads_it(tmp_path):
    """The opcode BUILD sets attributes of whatever is on the stack: of a class too."""
    folder = write(tmp_path, "cifar10")
    hostile = b"\x80\x02cnumpy\nndarray\nN}X\x04\x00\x00\x00nameX\x05\x00\x00\x00dtypes\x86b."
    (folder / "test_batch").write_bytes(hostile)
    fails(tmp_path, "test_batch: broken file", split="val")
    (folder / "test_batch").write_bytes(python2(part(np.random.default_rng(0), 4, 10, "labels")))
    assert len(build_images(config(tmp_path), "val")) == 4


@pytest.mark.parametrize(
    "hostile",
    [
        # a key whose hash takes 2**60 steps: a tuple of a tuple twice, and so on
        b"\x80\x02}()" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60)) + b"K\x01u.",
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a table of 2**31 places
    ],
)
def test_a_few_bytes_that_would_take_for_ever_are_refused(tmp_path, hostile):
    folder = tmp_path / FOLDERS["cifar10"]
    folder.mkdir()
    (folder / "batches.meta").write_bytes(hostile)
    part = ImagesConfig(name="cifar10", path=str(tmp_path))
    with pytest.raises(DataError, match=r"batches\.meta: broken file: it has (TUPLE2|LONG_BINPUT) in a way"):
        build_images(ClassificationDataConfig(train=part, val=part), "train")


def test_a_pipe_is_no_file_of_cifar(tmp_path):
    folder = tmp_path / FOLDERS["cifar10"]
    folder.mkdir()
    os.mkfifo(folder / "batches.meta")
    part = ImagesConfig(name="cifar10", path=str(tmp_path))
    with pytest.raises(DataError, match="it is no regular file"):
        build_images(ClassificationDataConfig(train=part, val=part), "train")
