"""What a rank loads: the same views with any loader processes, on any ranks, from any step; keys where they meet."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from leakfree.config import ContrastiveRunConfig, load_config
from leakfree.contrastive import Mitigation, Views, feature_batches, mitigations, training_views
from leakfree.contrastive.batches import Row, pair_rows
from leakfree.data import build_images
from leakfree.errors import DataError
from tests.contrastive.conftest import MakeConfig
from tests.ranks import run_ranks


def open_config(config_file: Path, overrides: list[str]) -> ContrastiveRunConfig:
    config = load_config(config_file, overrides)
    assert isinstance(config, ContrastiveRunConfig)
    return config


def batches(
    rank: int, world_size: int, config_file: Path, overrides: list[str], start: int = 0, stream: int = 0
) -> list[Views]:
    """This rank's batches of steps ``start`` to 3."""
    config = open_config(config_file, overrides)
    images, key = build_images(config.data, "train"), mitigations(config)[1]
    return list(training_views(config, images, key, max_steps=4, start_step=start, stream=stream))


def alike(one: Iterable[Views], two: Iterable[Views]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(a.step == b.step and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True)) for a, b in pairs)


@pytest.mark.parametrize("views", ["digits", "moco_v2"])
def test_loader_processes_and_resuming_change_nothing(config_file: Path, views: str) -> None:
    settings = [f"data.views.name={views}", "model.key=loader_shuffle"]
    whole = batches(0, 1, config_file, settings)
    assert [batch.step for batch in whole] == [0, 1, 2, 3]
    assert whole[0].query.shape == whole[0].key.shape == (24, 3, 12, 12)
    assert not alike(whole[:1], whole[1:2])
    assert alike(whole, batches(0, 1, config_file, [*settings, "data.num_workers=2"]))
    assert alike(whole[2:], batches(0, 1, config_file, settings, 2))
    assert alike(whole[3:], batches(0, 1, config_file, [*settings, "data.num_workers=2"], 3))


def test_loading_draws_nothing_from_the_training_s_random_numbers(config_file: Path) -> None:
    for workers in (0, 2):
        torch.manual_seed(1)
        batches(0, 1, config_file, [f"data.num_workers={workers}"])
        after = torch.rand(())
        torch.manual_seed(1)
        assert torch.equal(torch.rand(()), after)


def test_streams_have_other_images_and_views(config_file: Path) -> None:
    one, two = (batches(0, 1, config_file, [], stream=stream) for stream in (0, 1))
    assert not torch.equal(one[0].indices, two[0].indices)


@pytest.mark.parametrize("key", ["same", "loader_shuffle"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_load_what_one_process_does(config_file: Path, key: str, world_size: int) -> None:
    """25 images, which ranks cannot share evenly, in 4 groups, which 3 ranks cannot."""
    sizes = ["trainer.total_batch_size=25", "model.images_per_group=5"]
    settings = [f"model.key={key}", *sizes]
    whole = batches(0, 1, config_file, ["model.key=same", *sizes])
    ranks = run_ranks(batches, world_size, config_file, settings)
    config = open_config(config_file, settings)
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        for name in ("query", "labels", "indices"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        keys = torch.cat([part.key for part in parts])
        if key == "same":
            assert torch.equal(keys, batch.key)
            continue
        draw = mitigations(config)[1].draw([len(part.query) for part in parts], step)
        order = np.concatenate([dataclasses.replace(draw, rank=rank).sources for rank in range(world_size)])
        assert sorted(order.tolist()) == list(range(25))
        assert order.tolist() != list(range(25))
        assert torch.equal(keys, batch.key[torch.from_numpy(order)])
    if key == "loader_shuffle" and world_size == 3:
        assert [len(rank[0].key) for rank in ranks] != [len(rank[0].query) for rank in ranks]


def test_without_loader_shuffle_keys_are_the_queries_images() -> None:
    rows = [Row(image, 100 + image) for image in range(8)]
    for name in ("bn", "shuffle_bn", "shuffle_images", "eman"):
        found = pair_rows(rows, 3, Mitigation(name, 2))
        assert found.queries == found.keys == rows
    found = pair_rows(rows, 3, Mitigation("loader_shuffle", 2))
    assert found.keys != rows
    assert sorted(found.keys) == rows
    assert found.draw == 3


# ------------------------------------------------------------------------------------------ features


def features(rank: int, world_size: int, config_file: Path, overrides: list[str], count: int) -> list[list[Tensor]]:
    config = open_config(config_file, overrides)
    images = build_images(config.data, "val")
    indices = [3 * place for place in range(count)]
    return [list(batch) for batch in feature_batches(config, images, indices)]


@pytest.mark.parametrize("views", ["plain", "augmented"])
def test_each_image_is_seen_once_on_any_ranks(config_file: Path, views: str) -> None:
    settings = [f"evaluation.views={views}", "evaluation.images_per_batch=4"]
    expected = [torch.cat(parts) for parts in zip(*features(0, 1, config_file, settings, 9), strict=True)]
    assert expected[2].tolist() == list(range(9))
    workers = features(0, 1, config_file, [*settings, "data.num_workers=2"], 9)
    for ranks in ([workers], run_ranks(features, 3, config_file, [*settings, "evaluation.images_per_batch=5"], 9)):
        merged = [torch.cat(parts) for parts in zip(*(batch for rank in ranks for batch in rank), strict=True)]
        order = merged[2].argsort()
        assert all(torch.equal(part[order], whole) for part, whole in zip(merged, expected, strict=True))
    config = open_config(config_file, settings)
    images = build_images(config.data, "val")
    assert expected[1].tolist() == [int(images.labels[3 * place]) for place in range(9)]


def test_augmented_features_are_of_one_fixed_view(config_file: Path) -> None:
    plain, fixed, again, other = (
        features(0, 1, config_file, words, 4)[0][0]
        for words in (
            ["evaluation.views=plain"],
            ["evaluation.views=augmented"],
            ["evaluation.views=augmented", "seed=9"],
            ["evaluation.views=augmented", "leakage.seed=9"],
        )
    )
    assert torch.equal(fixed, again)  # runs of several seeds are judged on the same views
    assert not torch.equal(fixed, plain)
    assert not torch.equal(fixed, other)


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(make_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (9, 12), (number, 0, 0)).save(tmp_path / "train" / name / f"{number}.png")
    (tmp_path / "train/b/1.png").write_bytes(b"")
    config = make_config(
        "run",
        f"data.root={tmp_path}",
        "data.train={name: image_folder, path: train}",
        "data.views.name=simclr",
        "trainer.total_batch_size=4",
        f"data.num_workers={workers}",
    )
    images = build_images(config.data, "train")
    with pytest.raises(DataError, match=r"^data\.train: .*b/1\.png: broken image file"):
        list(training_views(config, images, mitigations(config)[1], max_steps=1))
