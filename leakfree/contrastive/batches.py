"""The batches of a contrastive run on this rank: which images, which views of them, and where keys are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from leakfree.config.schema import ContrastiveRunConfig
from leakfree.contrastive.methods import Views
from leakfree.contrastive.mitigation import Mitigation
from leakfree.contrastive.views import ViewMaker, build_views
from leakfree.data import LabelledImages, Loader, TrainingBatchSampler
from leakfree.distributed import get_rank, get_world_size
from leakfree.errors import DataError

__all__ = ["PairedRows", "Row", "feature_batches", "pair_rows", "paired_views", "training_views"]


class Row(NamedTuple):
    """An image at a place of the training stream, which selects its views."""

    image: int
    position: int


class PairedRows(NamedTuple):
    """What a rank loads for a batch: images as queries, images as keys, and the number of the draw."""

    queries: list[Row]
    keys: list[Row]
    draw: int


def pair_rows(rows: Sequence[Row], index: int, key: Mitigation) -> PairedRows:
    """This rank's share of a batch: its slice of ``rows`` as queries and keys; under ``loader_shuffle`` its keys are
    those that meet here.

    Args:
        rows: of all ranks; dealt to them in order, as evenly as can be.
        index: of the draw.
        key: how keys share statistics.
    """
    world_size, rank = get_world_size(), get_rank()
    bounds = [len(rows) * r // world_size for r in range(world_size + 1)]
    queries = list(rows[bounds[rank] : bounds[rank + 1]])
    if key.name != "loader_shuffle":
        return PairedRows(queries, queries, index)
    draw = key.draw([bounds[r + 1] - bounds[r] for r in range(world_size)], index)
    return PairedRows(queries, [rows[source] for source in draw.sources], index)


class _Steps:
    """The batches of a training: a function of (seed, step) and the total batch size alone."""

    def __init__(self, sampler: TrainingBatchSampler, key: Mitigation, start_step: int, max_steps: int) -> None:
        self.sampler, self.key, self.steps = sampler, key, range(start_step, max_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[PairedRows]:
        for step in self.steps:
            yield pair_rows([Row(*pair) for pair in self.sampler.batch(step)], step, self.key)


class _Paired(Dataset[Any]):
    """Both views of a batch, made at once; or a line that tells which image cannot be read."""

    def __init__(self, images: LabelledImages, views: ViewMaker, make: Callable[..., Any]) -> None:
        self.images, self.views, self.make = images, views, make

    def __getitem__(self, batch: Any) -> Any:
        try:
            return self.make(self.images, self.views, batch)
        except DataError as error:
            return f"data.{self.images.split}: {error}"


class _Loader(Loader):
    """An image that cannot be read is one DataError, in this process."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


def _loader(
    config: ContrastiveRunConfig, images: LabelledImages, seed: int, batches: Any, make: Callable[..., Any]
) -> Iterable[Any]:
    return _Loader(
        _Paired(images, build_views(config.data, seed, images.split), make),
        sampler=batches,
        batch_size=None,  # the views of a batch are drawn at once
        num_workers=config.data.num_workers,
    )


def _both(images: LabelledImages, views: ViewMaker, batch: PairedRows) -> Views:
    seen = {row.image for row in (*batch.queries, *batch.keys)}
    pixels = {image: images.read(image) for image in sorted(seen)}  # decoded once for both views
    queries, keys = (
        views.distorted(
            [pixels[row.image] for row in rows],
            [row.image for row in rows],
            [(row.position, which) for row in rows],
        )
        for which, rows in enumerate((batch.queries, batch.keys))
    )
    indices = torch.tensor([row.image for row in batch.queries], dtype=torch.int64)
    labels = torch.from_numpy(images.labels)[indices]
    return Views(queries, keys, labels, indices, batch.draw)


def training_views(
    config: ContrastiveRunConfig,
    images: LabelledImages,
    key: Mitigation,
    *,
    max_steps: int,
    start_step: int = 0,
    stream: int = 0,
) -> Iterable[Views]:
    """Batches as in training, the same number on every rank.

    Args:
        stream: 0 is the one that training sees; another number gives other draws from the same images.
    """
    seed = config.seed + stream * 2**32
    sampler = TrainingBatchSampler(len(images), config.trainer.total_batch_size, 0, 1, seed)
    return _loader(config, images, seed, _Steps(sampler, key, start_step, max_steps), _both)


def paired_views(
    config: ContrastiveRunConfig, images: LabelledImages, batches: Sequence[PairedRows], *, stream: int
) -> Iterable[Views]:
    """The views of batches that were composed with :func:`pair_rows`."""
    return _loader(config, images, config.seed + stream * 2**32, batches, _both)


def feature_batches(
    config: ContrastiveRunConfig, images: LabelledImages, indices: Sequence[int]
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, place in ``indices``) for features of these images, dealt to the ranks; each once.

    What is seen of an image is ``evaluation.views``: itself, or one fixed view.
    """
    size, world_size = config.evaluation.images_per_batch, get_world_size()
    starts = range(get_rank() * size, len(indices), size * world_size)
    batches = [list(range(start, min(start + size, len(indices)))) for start in starts]
    make = partial(_of_features, list(indices), config.evaluation.views == "augmented")
    return _loader(config, images, config.leakage.seed + 3 * 2**32, batches, make)


def _of_features(
    indices: list[int], augmented: bool, images: LabelledImages, views: ViewMaker, places: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = [indices[place] for place in places]
    pixels = [images.read(index) for index in chosen]
    if augmented:
        seen = views.distorted(pixels, chosen, [(index, 0) for index in chosen])
    else:
        seen = views.plain(pixels, chosen)
    return seen, torch.from_numpy(images.labels[chosen]), torch.tensor(places)
