"""Labelled images: splits, corruptions, noise, files on disk, and how batches are composed."""

import collections
import itertools
import os
import typing

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from leakfree.config.schema import ClassificationDataConfig, ImagesConfig
from leakfree.data import (
    CORRUPTIONS,
    SameClassBatchSampler,
    build_image_loader,
    build_images,
    compose_batches,
    training_sampler,
)
from leakfree.data.digits import digits_by_class
from leakfree.errors import DataError

small = st.integers(1, 5)


def data_config(**changes: typing.Any) -> ClassificationDataConfig:
    return ClassificationDataConfig(num_workers=0, **changes)


def batch_of(config: ClassificationDataConfig, split: typing.Any, indices: list[typing.Any], seed: int = 0):
    loader = build_image_loader(build_images(config, split), config, [indices], seed=seed)
    return next(iter(loader))


# ------------------------------------------------------------------------------------------ images


def test_the_digits_are_those_of_the_scenes_and_in_one_split_only():
    train, val = (build_images(data_config(), split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (1200, 597, [str(value) for value in range(10)])
    for images, split in ((train, "train"), (val, "val")):
        counts = np.bincount(images.labels)
        assert counts.tolist() == [len(rows) for rows in digits_by_class(split)]
    pixels, labels, domains = batch_of(data_config(), "train", list(range(1200)))
    others = batch_of(data_config(), "val", list(range(597)))[0]
    assert pixels.shape == (1200, 3, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert labels.tolist() == train.labels.tolist()
    assert not domains.any()
    both = torch.cat([pixels, others])[:, 0].flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_pixels_are_standardized_last():
    config = data_config(mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    plain, _, _ = batch_of(data_config(), "val", [3])
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    torch.testing.assert_close(batch_of(config, "val", [3])[0], (plain - mean) / std)


def test_noise_is_of_its_strength_fixed_for_an_image_and_gray():
    noisy = data_config(train=ImagesConfig(noise=0.5), val=ImagesConfig(noise=0.5))
    clean = batch_of(data_config(), "train", list(range(400)))[0]
    first = batch_of(noisy, "train", list(range(400)))[0] - clean
    assert torch.equal(first, batch_of(noisy, "train", [(i, 900 + i) for i in range(400)])[0] - clean)
    assert torch.equal(first[:, 0], first[:, 1])
    assert first[:, 0].std().item() == pytest.approx(0.5, rel=0.01)  # of 25,600 draws
    assert abs(first[:, 0].mean().item()) < 0.01
    assert len(first[:, 0].flatten(1).unique(dim=0)) == 400
    other = data_config(train=ImagesConfig(noise=0.5, seed=1))
    assert not torch.equal(first, batch_of(other, "train", list(range(400)))[0] - clean)
    val = batch_of(noisy, "val", [0])[0] - batch_of(data_config(), "val", [0])[0]
    assert not torch.equal(val[0], first[0])


def test_corruptions_are_those_of_the_schema_and_number_the_domains():
    valid = ImagesConfig.__dataclass_fields__["corruptions"].metadata["valid"]["one_of"]
    assert set(CORRUPTIONS) == set(valid)
    config = data_config(
        train=ImagesConfig(corruptions=["none", "invert", "none", "blur"]),
        val=ImagesConfig(corruptions=["contrast", "invert"]),
    )
    plain = batch_of(data_config(), "train", list(range(8)))[0]
    pixels, _, domains = batch_of(config, "train", list(range(8)))
    assert domains.tolist() == [0, 1, 0, 2] * 2
    assert torch.equal(pixels[domains == 0], plain[domains == 0])
    assert torch.equal(pixels[domains == 1], 1 - plain[domains == 1])
    assert batch_of(config, "val", [0, 1, 2, 3])[2].tolist() == [3, 1, 3, 1]  # by name, those of training first


def test_blur_keeps_constants_and_spreads_a_point():
    image = torch.full((3, 5, 5), 0.3)
    torch.testing.assert_close(CORRUPTIONS["blur"](image), image)
    point = torch.zeros(3, 5, 5)
    point[:, 2, 2] = 16
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 3, 3)
    torch.testing.assert_close(CORRUPTIONS["blur"](point)[:, 1:4, 1:4], expected)


def test_crops_and_flips_are_functions_of_seed_position_and_image():
    config = data_config(min_crop=0.3, flip=0.5, image_size=12)
    keys = [(index, 70 + index) for index in range(32)]
    state = torch.get_rng_state()
    first = batch_of(config, "train", keys)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert first.shape == (32, 3, 12, 12)
    assert torch.equal(first, batch_of(config, "train", keys)[0])
    assert not torch.equal(first, batch_of(config, "train", keys, seed=1)[0])
    assert not torch.equal(first, batch_of(config, "train", [(index, 0) for index, _ in keys])[0])
    whole = batch_of(data_config(image_size=12), "train", list(range(32)))[0]
    assert torch.equal(whole, batch_of(config, "train", list(range(32)))[0])  # outside training: neither


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in (("cat", 3), ("dog", 2)):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return tmp_path


def folder_config(root, **changes):
    train, val = (ImagesConfig(name="image_folder", path=split) for split in ("train", "val"))
    return data_config(root=str(root), train=train, val=val, image_size=16, **changes)


def test_a_folder_of_classes_is_read_as_squares_from_the_middle(folder):
    config = folder_config(folder)
    images = build_images(config, "train")
    assert (images.classes, images.labels.tolist()) == (["cat", "dog"], [0, 0, 0, 1, 1])
    pixels, labels, _ = batch_of(config, "train", [4, 0])
    assert labels.tolist() == [1, 0]
    assert pixels.shape == (2, 3, 16, 16)
    raw = np.asarray(Image.open(folder / "train/dog/1.png"))[:, 5:25].astype(np.float32) / 255
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(raw).permute(2, 0, 1)[None], (16, 16), mode="bilinear", antialias=True
    )[0]
    torch.testing.assert_close(pixels[0], expected)


def test_a_tree_like_imagenets_is_a_folder_of_classes(tmp_path):
    rng = np.random.default_rng(0)
    for split, size in (("train", (40, 30)), ("val", (30, 50))):
        for synset in ("n01440764", "n01443537", "n15075141"):
            place = tmp_path / "imagenet" / split / synset
            place.mkdir(parents=True)
            for name, mode in ((f"{synset}_10026.JPEG", "RGB"), (f"{synset}_7.JPEG", "L")):
                image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
                image.save(place / name, format="JPEG")
    train, val = (ImagesConfig(name="image_folder", path=f"imagenet/{split}") for split in ("train", "val"))
    config = data_config(root=str(tmp_path), train=train, val=val, image_size=16)
    for split in ("train", "val"):
        images = build_images(config, split)
        assert images.classes == ["n01440764", "n01443537", "n15075141"]
        assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert images.read(1).shape == ((3, 40, 30) if split == "train" else (3, 30, 50))
        pixels, labels, _ = batch_of(config, split, [0, 5])
        assert (pixels.shape, labels.tolist()) == ((2, 3, 16, 16), [0, 2])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_one_line_with_its_file(folder, num_workers):
    config = folder_config(folder)
    config.num_workers = num_workers
    (folder / "train/cat/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.train: .*cat/1\.png: broken image file") as caught:
        batch_of(config, "train", [0, 1, 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, root: setattr(config.train, "path", ""), r"data\.train\.path is empty"),
        (
            lambda config, root: setattr(config.train, "path", "nowhere"),
            r"data\.train\.path: .*nowhere: it does not exist",
        ),
        (lambda config, root: setattr(config.train, "path", "train/cat/0.png"), "it is not a folder"),
        (lambda config, root: setattr(config.train, "path", "train/cat"), "no folder of a class in it"),
        (lambda config, root: (root / "train/cow").mkdir(), "no image of the classes cow"),
    ],
)
def test_a_folder_that_holds_no_classes_is_told_by_key(folder, change, words):
    config = folder_config(folder)
    change(config, folder)
    with pytest.raises(DataError, match=words) as caught:
        build_images(config, "train")
    assert "\n" not in str(caught.value)
    assert "data.train.path" in str(caught.value)


def test_images_are_those_of_torchvision_in_its_order(folder):
    (folder / "train/dog/b.png").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "train/dog/b.png/1.PNG")
    Image.new("RGB", (9, 9)).save(folder / "train/cat/.hidden.webp")
    (folder / "train/cat/a.txt").write_text("no image")
    (folder / "train/linked").symlink_to(folder / "val/cat")
    Image.new("RGB", (9, 9)).save(folder / "train/beside.png")
    expected = torchvision.datasets.ImageFolder(str(folder / "train"))
    images = build_images(folder_config(folder), "train")
    assert [os.fsdecode(path) for path in images.read.paths] == [path for path, _ in expected.samples]
    assert images.labels.tolist() == expected.targets
    assert images.classes == expected.classes


def test_links_that_go_round_are_followed_once(folder):
    """torchvision follows them 2**40 times."""
    for split in ("cat", "dog"):
        for other in ("cat", "dog"):
            (folder / "train" / split / f"to_{other}").symlink_to(folder / "train" / other)
    images = build_images(folder_config(folder), "train")
    assert len(images) == 2 * (3 + 2)  # of each class its own, and those of the other


# ------------------------------------------------------------------------------------- composition


def labels_of(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def stream(labels, group_size, images_per_rank, world_size, seed, steps, start=0):
    """The global batches, put together from the ranks."""
    samplers = [SameClassBatchSampler(labels, group_size, images_per_rank, rank, world_size, seed, start, steps)
                for rank in range(world_size)]  # fmt: skip
    return [list(itertools.chain(*parts)) for parts in zip(*samplers, strict=True)]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), small, small, small, st.integers(0, 99), st.integers(0, 9))
def test_groups_are_of_one_class_and_depend_on_neither_ranks_nor_resumes(counts, size, groups, world_size, seed, start):
    labels = labels_of(counts)
    whole = stream(labels, size, size * groups * world_size, 1, seed, start + 4)
    assert whole == stream(labels, size, size * groups, world_size, seed, start + 4)
    assert whole[start:] == stream(labels, size, size * groups, world_size, seed, start + 4, start)
    for batch in whole:
        classes = [labels[index] for index, _ in batch]
        for at in range(0, len(batch), size):
            assert len(set(classes[at : at + size])) == 1


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), small, small, st.integers(0, 99))
def test_a_batch_of_whole_turns_is_balanced_and_every_image_comes_once_an_epoch(counts, size, turns, seed):
    labels = labels_of(counts)
    seen: dict[int, list[int]] = collections.defaultdict(list)
    for batch in stream(labels, size, size * len(counts) * turns, 1, seed, 8):
        classes = collections.Counter(int(labels[index]) for index, _ in batch)
        assert set(classes.values()) == {size * turns}
        for index, _ in batch:
            seen[int(labels[index])].append(index)
    for value, indices in seen.items():
        of_class = np.flatnonzero(labels == value).tolist()
        for at in range(0, len(indices) - len(of_class) + 1, len(of_class)):
            assert sorted(indices[at : at + len(of_class)]) == of_class


def test_steps_in_any_order_are_the_same_steps_and_seeds_differ():
    labels = labels_of([20] * 10)
    sampler = SameClassBatchSampler(labels, 4, 80, 0, 1, 0, 0, 30)
    forward = [sampler.batch(step) for step in range(30)]
    assert [sampler.batch(step) for step in reversed(range(30))] == forward[::-1]
    orders = {tuple(labels[index] for index, _ in batch[::4]) for batch in forward}
    assert len(orders) == 30
    assert SameClassBatchSampler(labels, 4, 80, 0, 1, 1).batch(0) != forward[0]


def test_groups_that_do_not_fill_the_batch_are_refused():
    with pytest.raises(ValueError, match="6 images of a batch cannot be split into groups of 4"):
        SameClassBatchSampler(labels_of([5, 5]), 4, 3, 0, 2, 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), small, small, st.integers(0, 99))
def test_evaluation_batches_hold_each_image_once_and_are_not_too_small(counts, size, world_size, seed):
    labels = labels_of(counts)
    for composition in ("random", "same_class"):
        batches = compose_batches(labels, composition, size, seed=seed)
        assert sorted(itertools.chain(*batches)) == list(range(len(labels)))
        for rank in range(world_size):
            dealt = compose_batches(labels, composition, size, seed=seed, rank=rank, world_size=world_size)
            assert dealt == batches[rank::world_size]
        for batch in batches:
            pool = len(labels) if composition == "random" else counts[labels[batch[0]]]
            assert composition == "random" or len({labels[index] for index in batch}) == 1
            assert min(size, pool) <= len(batch) < max(2 * size, 2)


def test_the_config_names_the_composition():
    images = build_images(data_config(), "train")
    place = {"images_per_rank": 160, "rank": 0, "world_size": 1, "seed": 0, "start_step": 0, "max_steps": 3}
    mixed = training_sampler(images, data_config(), **place).batch(0)
    structured = training_sampler(images, data_config(composition="same_class"), **place).batch(0)
    assert len({images.labels[index] for index, _ in mixed[:16]}) > 3
    assert [len({images.labels[index] for index, _ in structured[at : at + 16]}) for at in range(0, 160, 16)] == [
        1
    ] * 10
    assert np.bincount([images.labels[index] for index, _ in structured]).tolist() == [16] * 10
