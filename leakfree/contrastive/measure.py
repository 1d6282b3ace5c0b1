"""What a contrastive run has learned, and how: features under several statistics, and the pretext task under a swap
of the keys' batch-mates.

Weights and images are the same for every kind of statistics. Nothing here changes the model.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leakfree.config.schema import ContrastiveRunConfig
from leakfree.contrastive.batches import Row, feature_batches, pair_rows, paired_views, training_views
from leakfree.contrastive.methods import ContrastiveMethod, Views
from leakfree.data import LabelledImages
from leakfree.distributed import all_gather_rows, get_rank, get_world_size
from leakfree.errors import DataError
from leakfree.evaluation import Features, extract_features, few_label_knn_accuracy, knn_accuracy, linear_probe
from leakfree.leakage import batchmate_probe, cross_sample_influence
from leakfree.population import precise_bn
from leakfree.records import Evaluation
from leakfree.state import as_in_training, buffers_kept, has_running_statistics, modes_kept, random_numbers_kept

__all__ = [
    "PretextSwap",
    "estimate_statistics",
    "evaluate_contrastive",
    "pretext_swap",
    "validate",
]

LOG = logging.getLogger("leakfree.contrastive")
Track = Callable[[Iterable[Any], str], Iterable[Any]]  # a progress bar: (batches, what) -> batches
Images = dict[str, LabelledImages]
_HELD_OUT = 2  # the stream of views that training never sees


def evaluate_contrastive(
    model: ContrastiveMethod,
    config: ContrastiveRunConfig,
    images: Images,
    *,
    track: Track = lambda batches, what: batches,
) -> Evaluation:
    """kNN and linear probe under each of ``config.evaluation.statistics``; the pretext swap, probes and influence.

    Across ranks: every rank calls it and returns the same.

    Args:
        images: "train" (the bank) and "val" (the queries).
        track: shows progress over batches, on the ranks that should.
    """
    found = Evaluation()
    wanted = config.evaluation.statistics
    precise = has_running_statistics(model.query)
    if "population" in wanted or not precise:
        found.results["population"] = _judged(model, config, images, track, "population", found.notes)
    if "precise" in wanted and precise:
        with buffers_kept(model):
            estimate_statistics(model, config, images["train"], layers="query")
            found.results["precise"] = _judged(model, config, images, track, "precise", found.notes)
    elif "precise" in wanted:
        found.notes.append("precise: no statistics to re-estimate (none, or frozen), so it is population")
        found.results["precise"] = found.results["population"]
    found.results = {mode: found.results[mode] for mode in wanted}
    if config.leakage.enabled:
        try:
            swap = pretext_swap(model, config, images["val"], track=track)
        except DataError as error:
            found.notes.append(f"pretext: n.a., {error}")
        else:
            found.leakage["pretext"] = {**asdict(swap), "gap": swap.gap}
        found.leakage["influence"] = _influence(model, config, images["train"], track)
    return found


def validate(
    model: ContrastiveMethod,
    config: ContrastiveRunConfig,
    images: Images,
    *,
    track: Track = lambda batches, what: batches,
) -> dict[str, float | None]:
    """One point of the pretext-gap curves: kNN and a linear probe in closed form of ``evaluation.online_images`` images
    of each split under the stored statistics, and the pretext accuracy of held-out images with and without their
    batch-mates."""
    online = config.evaluation.online_images
    bank, queries = (_features(model, config, images[part], online, track) for part in ("train", "val"))
    row: dict[str, float | None] = {"knn": None, "linear": None}
    try:
        row["knn"] = _knn(config, bank, queries)
        row["linear"] = linear_probe(*_own_rows(bank), *_own_rows(queries), closed_form=True).accuracy
    except DataError as error:  # collapsed, perhaps not for good: told, and the training goes on
        if get_rank() == 0:
            LOG.warning("features cannot be judged: %s", error)
    if config.leakage.enabled:
        count = 3 * config.trainer.total_batch_size
        try:
            swap = pretext_swap(model, config, images["val"], max_images=count, probes=False, track=track)
        except DataError:
            return row  # the evaluation at the end says why
        row |= {"pretext/same": swap.same, "pretext/other": swap.other}
    return row


# ----------------------------------------------------------------------------------------- statistics


def estimate_statistics(
    model: ContrastiveMethod, config: ContrastiveRunConfig, images: LabelledImages, *, layers: str = "all"
) -> None:
    """Fill the batch norm buffers with precise population statistics of ``evaluation.precise_images`` views.

    The batches are composed as in training, but are not those that training saw. Every rank calls it.

    Args:
        layers: "all", or "query": the query encoder only. A key encoder that takes its statistics from the query's
            is left alone: it follows them.
    """
    with_keys = layers == "all" and model.key_has_own_statistics
    steps = math.ceil(config.evaluation.precise_images / config.trainer.total_batch_size)
    views = training_views(config, images, model.key_mitigation, max_steps=steps, stream=1)

    @torch.no_grad()
    def forward(part: nn.Module, batch: Views) -> None:
        with as_in_training(part):
            index = 2**40 + batch.step
            model.encode_queries(_on(model, batch.query), index)
            if with_keys:
                model.encode_keys(_on(model, batch.key), index, len(batch.query))

    with random_numbers_kept(model, config.seed):
        precise_bn(model if with_keys else model.query, views, forward=forward, progress=False)


def _on(model: nn.Module, images: Tensor) -> Tensor:
    """On the model's device, in its dtype and layout."""
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype, non_blocking=True)
    if any(item.ndim == 4 and not item.is_contiguous() for item in model.parameters()):
        images = images.contiguous(memory_format=torch.channels_last)
    return images


# ------------------------------------------------------------------------------------------- features


_IN_MEMORY = 2**30  # bytes: larger features lie in a file of the output folder, for as long as they are judged


@contextmanager
def _room(model: ContrastiveMethod, config: ContrastiveRunConfig, num_images: int) -> Iterator[Path | None]:
    """Where features of so many images are kept: in memory, or in this folder."""
    width = next(layer.in_features for layer in model.query.head.modules() if isinstance(layer, nn.Linear))
    if num_images * width * 4 <= _IN_MEMORY:
        yield None
        return
    folder = Path(config.output_dir) / "features"
    try:
        yield folder
    finally:
        if get_rank() == 0:  # others may have it mapped: it goes when they let go
            shutil.rmtree(folder, ignore_errors=True)


def _features(
    model: ContrastiveMethod,
    config: ContrastiveRunConfig,
    images: LabelledImages,
    most: int,
    track: Track,
    folder: Path | None = None,
) -> Features:
    count = min(most or len(images), len(images))
    chosen = (np.arange(count) * len(images) // count).tolist()  # a folder is sorted by class
    batches = track(feature_batches(config, images, chosen), f"features of {images.split}")

    def backbone(pixels: Tensor) -> Tensor:
        return model.query.backbone(_on(model, pixels))

    with modes_kept(model):
        model.eval()
        return extract_features(backbone, batches, folder=folder)


def _own_rows(features: Features) -> tuple[Tensor, Tensor]:
    """This rank's rows: every rank has all, and the probe wants each once."""
    mine = slice(get_rank(), None, get_world_size())
    return features.x[mine], features.y[mine]


def _knn(config: ContrastiveRunConfig, bank: Features, queries: Features) -> float:
    settings = config.evaluation
    k = min(settings.knn_k, len(bank))
    return knn_accuracy(
        bank.x,
        bank.y,
        queries.x,
        queries.y,
        k=k,
        temperature=settings.knn_temperature,
        backend=settings.backend,
        over_ranks=True,
    )


def _judged(
    model: ContrastiveMethod, config: ContrastiveRunConfig, images: Images, track: Track, mode: str, notes: list[str]
) -> dict[str, float | None]:
    """Empty, with the reason in ``notes``, where a feature is zero or not finite."""
    most = config.evaluation.max_images
    with _room(model, config, min(most or len(images["train"]), len(images["train"]))) as folder:
        bank, queries = (_features(model, config, images[part], most, track, folder) for part in ("train", "val"))
        try:
            return {
                "knn": _knn(config, bank, queries),
                "knn_few": _few_label_knn(config, bank, queries),
                "linear": linear_probe(*_own_rows(bank), *_own_rows(queries)).accuracy,
            }
        except DataError as error:
            notes.append(f"{mode}: n.a., {error}")
            return {}


def _few_label_knn(config: ContrastiveRunConfig, bank: Features, queries: Features) -> float | None:
    """None where a class of the bank has fewer images than ``evaluation.few_labels``."""
    labels = config.evaluation.few_labels
    _, counts = bank.y.unique(return_counts=True)
    if int(counts.min()) < labels:
        return None
    return few_label_knn_accuracy(
        bank.x,
        bank.y,
        queries.x,
        queries.y,
        labels_per_class=labels,
        k=min(5, labels * len(counts)),
        temperature=config.evaluation.knn_temperature,
        seed=config.leakage.seed,
        backend=config.evaluation.backend,
    )


# ------------------------------------------------------------------------------------------ the shortcut


@dataclass(frozen=True)
class PretextSwap:
    """The pretext task on held-out images in training mode, with the queue as it is.

    Attributes:
        same: share of queries whose key wins, keys encoded with the batch as in training.
        other: the same when the key is encoded among other batch-mates.
        loss: mean loss of the queries, keys as in training. Near log(1 + K) the accuracy says nothing.
        moved: mean length of (key among other mates - key), keys have length 1.
        query_probe, key_probe: how well one tells from two features whether they shared statistics (AUC, 0.5 is
            silence); None where nothing is shared, or where it was not asked for.
    """

    same: float
    other: float
    loss: float
    moved: float
    query_probe: float | None = None
    key_probe: float | None = None

    @property
    def gap(self) -> float:
        """The part of the pretext accuracy that is owed to batch-mates."""
        return self.same - self.other


@torch.no_grad()
def pretext_swap(
    model: ContrastiveMethod,
    config: ContrastiveRunConfig,
    images: LabelledImages,
    *,
    max_images: int = 0,
    probes: bool = True,
    track: Track = lambda batches, what: batches,
) -> PretextSwap:
    """Judge held-out queries against their keys, encoded in their own batch and among other mates.

    M batches of ``trainer.total_batch_size`` images; for the swap row r of batch b goes to batch (b + r) mod M, at a
    random place, so that 1 of M mates stays by chance where the whole batch shares statistics. Every rank calls it,
    and gets the same.

    Args:
        max_images: at most so many; 0 = ``leakage.max_images``.
        probes: fit the batch-mate probes too.

    Raises:
        DataError: fewer images than two batches.
    """
    total = config.trainer.total_batch_size
    count = min(max_images or config.leakage.max_images, len(images)) // total
    if count < 2:
        raise DataError(
            f"the swap of batch-mates needs two batches of {total} images (trainer.total_batch_size), and data.val has "
            f"{len(images)} (leakage.max_images={config.leakage.max_images})"
        )
    random = np.random.default_rng([7, config.leakage.seed])
    order = random.permutation(len(images))[: count * total].reshape(count, total)
    batches = [[Row(int(index), int(index)) for index in batch] for batch in order]
    dealt = _dealt(count, total, random)
    flat = [row for batch in batches for row in batch]
    others = [[flat[position] for position in rows] for rows in dealt]
    with modes_kept(model), buffers_kept(model), random_numbers_kept(model, config.leakage.seed):
        model.train()
        queries, keys, cells = _encoded(model, config, images, batches, track, "pretext")
        _, swapped, _ = _encoded(model, config, images, others, track, "pretext among other mates", queries=False)
    home = torch.empty_like(keys)
    home[torch.from_numpy(dealt.ravel()).to(home.device)] = swapped
    hits, moved_hits, losses = [], [], []
    for b in range(count):
        rows = slice(b * total, (b + 1) * total)
        loss, hit = model.judge(queries[rows], keys[rows], keys[rows])
        losses.append(loss)
        hits.append(hit)
        moved_hits.append(model.judge(queries[rows], home[rows], keys[rows])[1])
    found = {}
    if probes:
        found = {
            "query_probe": _probe(queries, cells[0]) if model.query_mitigation.shares else None,
            "key_probe": _probe(keys, cells[1]) if model.key_mitigation.shares else None,
        }
    return PretextSwap(
        float(torch.cat(hits).mean()),
        float(torch.cat(moved_hits).mean()),
        float(torch.cat(losses).double().mean()),
        float((home - keys).norm(dim=1).double().mean()),
        **found,
    )


def _dealt(count: int, total: int, random: np.random.Generator) -> np.ndarray:
    """(M, B) which rows, of all batches laid end to end, meet in each new batch."""
    place = np.arange(count * total).reshape(count, total)
    rows = np.arange(total)
    return np.stack([random.permutation(place[(batch - rows) % count, rows]) for batch in range(count)])


def _encoded(
    model: ContrastiveMethod,
    config: ContrastiveRunConfig,
    images: LabelledImages,
    batches: list[list[Row]],
    track: Track,
    what: str,
    *,
    queries: bool = True,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries and keys (M * B, D) of all ranks, and the group in which each was normalized."""
    paired = [pair_rows(batch, 2**41 + number, model.key_mitigation) for number, batch in enumerate(batches)]
    found: list[list[Tensor]] = [[], [], [], []]
    for views in track(paired_views(config, images, paired, stream=_HELD_OUT), what):
        index = views.step
        encoded = model.encode_keys(_on(model, views.key), index, len(views.query))
        found[1].append(all_gather_rows(encoded)[0])
        if queries:
            found[0].append(all_gather_rows(model.encode_queries(_on(model, views.query), index))[0])
            for place, mitigation in ((2, model.query_mitigation), (3, model.key_mitigation)):
                cells, _ = all_gather_rows(mitigation.cells(len(views.indices), index))
                found[place].append(cells + len(found[place]) * config.trainer.total_batch_size)
    q, k, one, two = (torch.cat(parts) if parts else torch.empty(0) for parts in found)
    return q, k, (one, two)


def _probe(features: Tensor, cells: Tensor) -> float | None:
    try:
        return batchmate_probe(features, cells).auc
    except DataError:  # too few groups to fit and to test one
        return None


def _influence(
    model: ContrastiveMethod, config: ContrastiveRunConfig, images: LabelledImages, track: Track
) -> dict[str, float | None]:
    """Cross-sample influence of the query encoder in training mode: on images of the same group, and of others."""
    leakage = config.leakage
    shares = []
    steps = leakage.influence_batches
    views = training_views(config, images, model.key_mitigation, max_steps=steps, stream=1)
    with modes_kept(model), buffers_kept(model), random_numbers_kept(model, leakage.seed):
        model.train()
        for batch in track(views, "influence"):
            index = 2**40 + batch.step
            result = cross_sample_influence(
                lambda pixels, index=index: model.encode_queries(pixels, index),  # type: ignore[misc]
                _on(model, batch.query),
                num_probes=leakage.influence_probes,
                groups=model.query_mitigation.cells(len(batch.query), index),
                seed=leakage.seed,
            )
            shares.append((result.within, result.between, result.total))
    within, between, total = (sum(column) / len(shares) for column in zip(*shares, strict=True))
    return {"within_group": within, "between_groups": between, "total": total}
