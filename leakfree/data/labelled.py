"""Labelled images: the embedded digits, CIFAR, or a folder of images for each class; and their batches.

A batch is (images float32 (N, 3, S, S), labels int64 (N,), domains int64 (N,)). Pixels are in [0, 1] before they are
corrupted, made noisy and standardized, in this order. A domain is the corruption of an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional

from leakfree.config.schema import ClassificationDataConfig, ImagesConfig, LabelledDataConfig
from leakfree.data.cifar import CIFAR, cifar_folder, read_cifar
from leakfree.data.digits import SPLITS, Split, digit_images, digits_of
from leakfree.data.images import read_image
from leakfree.data.samplers import SameClassBatchSampler, TrainingBatchSampler
from leakfree.data.transforms import mirrored, sample_generator
from leakfree.data.workers import Loader
from leakfree.errors import DataError

__all__ = [
    "CORRUPTIONS",
    "LabelledImages",
    "LabelledLoader",
    "build_image_loader",
    "build_images",
    "compose_batches",
    "images_path",
    "training_sampler",
]

Composition = Literal["random", "same_class"]
Key = int | tuple[int, int]  # the index of an image; in training with its position in the stream


# ------------------------------------------------------------------------------------------ images


class _Reader(Protocol):
    def __call__(self, index: int) -> Tensor: ...


class _DigitReader:
    def __init__(self, split: Split) -> None:
        self.pixels = torch.from_numpy(digit_images()[0][digits_of(split)].astype(np.float32))

    def __call__(self, index: int) -> Tensor:
        return self.pixels[index].expand(3, -1, -1)


class _PixelReader:
    """Images in memory, 1 byte a value: of one block, which loader processes share."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __call__(self, index: int) -> Tensor:
        return functional.to_dtype(self.pixels[index], torch.float32, scale=True)


class _FileReader:
    """Files by path: of one block, which loader processes share, 1 byte a character."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths])

    def __call__(self, index: int) -> Tensor:
        return functional.to_dtype(read_image(os.fsdecode(self.paths[index])), torch.float32, scale=True)


@dataclass(frozen=True)
class LabelledImages:
    """One split.

    Attributes:
        classes: their names; the label of an image is a position here.
        labels: int64 (n,).
        config: of the split: corruptions and noise.
        domains: names of the corruptions of the training split, then of those that only validation has.
        split: "train" or "val".
        read: index -> float32 (3, H, W) in [0, 1]; raises DataError for a file that cannot be read.
    """

    classes: list[str]
    labels: np.ndarray
    config: ImagesConfig
    domains: list[str]
    split: Split
    read: _Reader

    def __len__(self) -> int:
        return len(self.labels)

    def corruption_of(self, index: int) -> str:
        return self.config.corruptions[index % len(self.config.corruptions)]


def build_images(config: LabelledDataConfig, split: Split) -> LabelledImages:
    """Open one split of ``data``. No digit is in both splits; they are those of the digit scenes.

    CIFAR is read into memory; the ``val`` split is its official test set. Of a folder only the names are read here.

    Raises:
        DataError: a folder that is missing, has no folder of a class, or a class without an image; a file of CIFAR
            that is missing, damaged or another one. Names the key.
    """
    part: ImagesConfig = getattr(config, split)
    domains = list(dict.fromkeys([*config.train.corruptions, *config.val.corruptions]))
    if part.name == "digits":
        labels = digit_images()[1][digits_of(split)].astype(np.int64)
        return LabelledImages([str(value) for value in range(10)], labels, part, domains, split, _DigitReader(split))
    key, path = f"data.{split}.path", images_path(config, split)
    if part.name in CIFAR:
        return _cifar(part, path, key, domains, split)
    try:
        files = _image_files(path)
    except OSError as error:
        raise DataError(f"{key}: {error.filename or path}: {error.strerror}") from None
    empty = [name for name, found in files.items() if not found]
    if empty or not files:
        what = f"no image of the classes {', '.join(empty[:5])}" if empty else "no folder of a class in it"
        raise DataError(
            f"{key}: {path}: {what}; expected a subfolder of images for each class, like {path}/cat/1.jpg "
            f"(names end in {', '.join(IMG_EXTENSIONS)})"
        )
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files.values()]).astype(np.int64)
    reader = _FileReader([file for found in files.values() for file in found])
    return LabelledImages(list(files), labels, part, domains, split, reader)


def _image_files(folder: Path) -> dict[str, list[str]]:
    """Class -> its images, in the order of torchvision's ImageFolder, which follows links that go round for ever."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return {name: [file for _, files in sorted(_below(str(folder / name), ())) for file in files] for name in classes}


def _below(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(folder, its images) of a folder and those in it. ``above``: the folders, by their real names, that led here."""
    real = os.path.realpath(folder)
    if real in above:
        return
    inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    folders = [entry.path for entry in inside if entry.is_dir()]
    yield folder, [item.path for item in inside if item.name.lower().endswith(IMG_EXTENSIONS) and not item.is_dir()]
    for path in folders:
        yield from _below(path, (*above, real))


def images_path(config: LabelledDataConfig, split: Split) -> Path:
    """The folder of a split on disk; nothing in it is read.

    Raises:
        DataError: it is not named, or not there.
    """
    part: ImagesConfig = getattr(config, split)
    key, path = f"data.{split}.path", Path(config.root) / part.path
    if part.name in CIFAR:
        try:
            return cifar_folder(part.name, path)
        except DataError as error:
            raise DataError(f"{key}: {error}") from None
    if not part.path:
        raise DataError(f"{key} is empty; give a folder, absolute or relative to data.root ({config.root})")
    if not path.is_dir():
        there = "it is not a folder" if path.exists() else "it does not exist"
        raise DataError(f"{key}: {path}: {there}; put the images there, or set {key} or data.root")
    return path


def _cifar(part: ImagesConfig, path: Path, key: str, domains: list[str], split: Split) -> LabelledImages:
    try:
        found = read_cifar(part.name, path, split)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return LabelledImages(found.classes, found.labels, part, domains, split, _PixelReader(found.pixels))


# -------------------------------------------------------------------------------------- corruptions


def _blur(image: Tensor) -> Tensor:
    """Weighted by 1, 2, 1 along both axes, edges held."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    return F.conv2d(padded[:, None], (kernel[:, None] * kernel)[None, None])[:, 0]


CORRUPTIONS = {
    "none": lambda image: image,
    "blur": _blur,
    "contrast": lambda image: 0.5 + 0.4 * (image - 0.5),
    "invert": lambda image: 1 - image,
}  # float32 (3, H, W) in [0, 1] to the same; the names that the schema knows


class _Samples(Dataset[Any]):
    """Standardized images with their labels and domains, or a line that tells which image cannot be read."""

    def __init__(self, images: LabelledImages, config: ClassificationDataConfig, seed: int) -> None:
        self.images = images
        self.config = config
        self.seed = seed
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int] | str:
        index, generator = key, None
        if isinstance(key, tuple):
            index, draw = key
            generator = sample_generator(self.seed, draw, index)
        assert isinstance(index, int)
        try:
            image = self.images.read(index)
        except DataError as error:
            return str(error)
        image = self._framed(image, generator)
        part, corruption = self.images.config, self.images.corruption_of(index)
        image = CORRUPTIONS[corruption](image)
        if part.noise:
            place = [3, part.seed, SPLITS.index(self.images.split), index]
            draws = np.random.default_rng(place).standard_normal(image.shape[1:], dtype=np.float32)
            image = image + part.noise * torch.from_numpy(draws)
        return (image - self.mean) / self.std, int(self.images.labels[index]), self.images.domains.index(corruption)

    def _framed(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        """The square that the model sees: a random crop in training if asked for, else the middle."""
        size = self.config.image_size
        height, width = image.shape[-2:]
        side = min(height, width)
        top, left, height, width = (height - side) // 2, (width - side) // 2, side, side
        flip = False
        if generator is not None:
            flip = bool(torch.rand((), generator=generator) < self.config.flip)
            if self.config.min_crop < 1:
                with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                    torch.set_rng_state(generator.get_state())
                    scale, ratio = [self.config.min_crop, 1.0], [3 / 4, 4 / 3]
                    top, left, height, width = RandomResizedCrop.get_params(image, scale, ratio)
        image = image[..., top : top + height, left : left + width]
        if (height, width) != (size, size):
            image = functional.resize(image, [size, size], InterpolationMode.BILINEAR, antialias=True)
        return mirrored(image) if flip else image


# ------------------------------------------------------------------------------------------- batches


class LabelledLoader(Loader):
    """Batches of (images, labels, domains). An image that cannot be read is one DataError, in this process."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, str):
                raise DataError(f"data.{self.dataset.images.split}: {batch}")  # type: ignore[attr-defined]
            yield batch


def _collate(items: list[tuple[Tensor, int, int] | str]) -> tuple[Tensor, Tensor, Tensor] | str:
    samples = []
    for item in items:
        if isinstance(item, str):
            return item
        samples.append(item)
    images, labels, domains = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(domains)


def build_image_loader(
    images: LabelledImages,
    config: ClassificationDataConfig,
    batches: Sampler[list[tuple[int, int]]] | list[list[int]],
    *,
    seed: int = 0,
) -> LabelledLoader:
    """A loader of the batches that a training sampler or :func:`compose_batches` names.

    Args:
        seed: of crops and flips in training.
    """
    return LabelledLoader(
        _Samples(images, config, seed),
        batch_sampler=batches,
        num_workers=config.num_workers,
        collate_fn=_collate,
        persistent_workers=config.num_workers > 0,
    )


def training_sampler(
    images: LabelledImages,
    config: ClassificationDataConfig,
    *,
    images_per_rank: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int,
    max_steps: int,
) -> TrainingBatchSampler:
    """Training batches of ``data.composition``: a function of (seed, step) and the total batch size alone."""
    place = (images_per_rank, rank, world_size, seed, start_step, max_steps)
    if config.composition == "same_class":
        return SameClassBatchSampler(images.labels, config.group_size, *place)
    return TrainingBatchSampler(len(images), *place)


def compose_batches(
    labels: np.ndarray, composition: Composition, size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Deal images into batches for an evaluation: each image once, at random or one class to a batch.

    n images (of all, or of a class) make max(1, n // size) batches whose sizes differ by at most one, so that none is
    smaller than ``size`` unless there are fewer images. Batch b goes to rank ``b % world_size``: which images meet
    does not depend on the number of ranks.
    """
    rng = np.random.default_rng([4, seed])
    pools = [np.arange(len(labels))]
    if composition == "same_class":
        pools = [np.flatnonzero(labels == value) for value in np.unique(labels)]
    batches = []
    for pool in pools:
        parts = np.array_split(rng.permutation(pool), max(1, len(pool) // size))
        batches += [part.tolist() for part in parts if len(part)]
    return batches[rank::world_size]
