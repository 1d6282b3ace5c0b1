import collections
import dataclasses
import json
import multiprocessing
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from leakfree.config.schema import DigitScenesConfig
from leakfree.data import IMAGE_MEAN, IMAGE_STD, CocoInstances, digit_scenes_path, write_digit_scenes
from leakfree.data.digit_scenes import PIXEL_HIGH, PIXEL_LOW, compose_scene
from leakfree.data.digits import digits_by_class, resize_bilinear
from leakfree.errors import ConfigError, DataError

SMALL = DigitScenesConfig(num_images=6)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def annotations(folder):
    return json.loads((folder / "instances.json").read_text())["annotations"]


def test_same_settings_give_the_same_bytes_and_another_seed_does_not(tmp_path):
    first = contents(write_digit_scenes(tmp_path / "a", SMALL, "train"))
    assert len(first) == 7
    assert contents(write_digit_scenes(tmp_path / "b", SMALL, "train")) == first
    other = contents(write_digit_scenes(tmp_path / "c", dataclasses.replace(SMALL, seed=1), "train"))
    assert all(other[name] != first[name] for name in first)


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path):
    few = contents(write_digit_scenes(tmp_path / "few", SMALL, "val"))
    more = contents(write_digit_scenes(tmp_path / "more", dataclasses.replace(SMALL, num_images=9), "val"))
    assert all(more[name] == few[name] for name in few if name.endswith(".png"))


def test_no_digit_is_in_both_splits(tmp_path):
    pools = {split: np.concatenate(digits_by_class(split)) for split in ("train", "val")}
    assert (len(pools["train"]), len(pools["val"])) == (1200, 597)
    assert sorted([*pools["train"], *pools["val"]]) == list(range(1797))
    for split in ("train", "val"):  # and what is written keeps to them, for any seed
        folder = write_digit_scenes(tmp_path / split, dataclasses.replace(SMALL, num_images=60, seed=3), split)
        assert {item["digit_index"] for item in annotations(folder)} <= set(pools[split].tolist())


@pytest.mark.parametrize("mask_format", ["rle", "polygon"])
def test_box_mask_area_and_class_are_those_of_the_digit(tmp_path, mask_format):
    folder = write_digit_scenes(tmp_path / "a", dataclasses.replace(SMALL, mask_format=mask_format), "train")
    dataset = CocoInstances(folder / "images", folder / "instances.json")
    by_image = collections.defaultdict(list)
    for item in annotations(folder):
        by_image[item["image_id"]].append(item)
    bunch = load_digits()
    for index, image_id in enumerate(dataset.image_ids):
        _, target = dataset[index]
        assert target["masks"].sum(0).max() == 1  # no overlap
        for row, item in enumerate(by_image[image_id]):
            ys, xs = np.nonzero(target["masks"][row].numpy())
            assert target["boxes"][row].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert target["area"][row] == item["area"] == len(ys)
            assert dataset.categories[int(target["labels"][row])] == str(bunch.target[item["digit_index"]])


def test_both_mask_formats_are_the_same_masks(tmp_path):
    masks = {}
    for mask_format in ("rle", "polygon"):
        folder = write_digit_scenes(tmp_path / mask_format, DigitScenesConfig(40, mask_format=mask_format), "train")
        dataset = CocoInstances(folder / "images", folder / "instances.json")
        masks[mask_format] = torch.stack([dataset.target(index)["masks"] for index in range(len(dataset))])
    assert torch.equal(masks["rle"], masks["polygon"])


def test_the_network_input_is_the_composed_scene_as_in_the_recipe():
    """Without clutter: the digit upsampled by torch, at its place, normalized by (x - 0.2) / 0.5."""
    config = DigitScenesConfig(objects_per_image=1, clutter=0.0, digit_size=[24, 24])
    scene = compose_scene(config, "val", 0)
    digit = torch.tensor(load_digits().images[scene.digits[0]] / 16)
    ink = torch.nn.functional.interpolate(digit[None, None], size=(24, 24), mode="bilinear", align_corners=False)[0, 0]
    expected = np.zeros((96, 96))
    ys, xs = np.nonzero(scene.masks[0])
    inside = np.argwhere(ink.numpy() > 0.3).min(0)
    top, left = ys.min() - inside[0], xs.min() - inside[1]
    expected[top : top + 24, left : left + 24] = ink.numpy()
    seen = (scene.pixels / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    np.testing.assert_allclose(seen, (expected - 0.2) / 0.5, atol=0.51 * (PIXEL_HIGH - PIXEL_LOW) / 255 / 0.5)
    np.testing.assert_array_equal(scene.masks[0], expected > 0.3)


def test_upsampling_is_torchs_bilinear():
    image = np.random.default_rng(0).normal(size=(8, 8))
    for size in (8, 20, 21, 28, 96):
        expected = torch.nn.functional.interpolate(torch.tensor(image)[None, None], size=(size, size), mode="bilinear")
        np.testing.assert_allclose(resize_bilinear(image, size), expected[0, 0].numpy(), atol=1e-12)


def test_texture_has_the_recipes_strength_and_is_hardly_clipped():
    """Bilinear upsampling by 3 leaves variance ((1 + 5/9 + 5/9) / 3)**2 of 1; divided by 0.66 it is 1.066 clutter."""
    pixels = np.stack([compose_scene(DigitScenesConfig(objects_per_image=0), "train", n).pixels for n in range(80)])
    values = pixels / 255 * (PIXEL_HIGH - PIXEL_LOW) + PIXEL_LOW
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(0.35 * (19 / 27) / 0.66, rel=0.02)
    assert np.isin(pixels, (0, 255)).mean() < 5e-4


@pytest.mark.parametrize(("sharing", "low", "high"), [(0.0, 0.0, 0.01), (0.5, 0.42, 0.58), (1.0, 1.0, 1.0)])
def test_class_sharing_is_the_share_of_one_class_images(sharing, low, high):
    """400 images: at 0.5 the standard error is 0.025; at 0 five equal classes have probability 1e-4."""
    config = DigitScenesConfig(class_sharing=sharing, clutter=0.0)
    scenes = [compose_scene(config, "train", index) for index in range(400)]
    assert low <= np.mean([len(set(scene.classes)) == 1 for scene in scenes]) <= high
    counts = np.bincount(np.concatenate([scene.classes for scene in scenes]), minlength=10) / 2000
    assert np.abs(counts - 0.1).max() < 0.06  # classes are uniform; one-class images make counts five times rougher
    assert all(len(set(scene.digits)) == 5 for scene in scenes)  # different samples


def test_class_sharing_changes_the_digits_and_nothing_else():
    shared, mixed = (compose_scene(DigitScenesConfig(class_sharing=share), "train", 7) for share in (1.0, 0.0))
    background = ~(shared.masks.any(0) | mixed.masks.any(0))
    rows = np.abs(shared.pixels.astype(int) - mixed.pixels)[background]
    assert (rows == 0).mean() > 0.5  # outside the digits' faint borders the texture is the same
    middles = [np.array([np.argwhere(mask).mean(0) for mask in scene.masks]) for scene in (shared, mixed)]
    np.testing.assert_allclose(middles[0], middles[1], atol=7)  # same cells, positions, sizes


@pytest.mark.parametrize(("size", "grid", "objects", "digit"), [(96, 3, 9, [8, 32]), (100, 3, 4, [33, 33]),
                                                               (32, 1, 1, [32, 32]), (64, 4, 0, [8, 16])])  # fmt: skip
def test_digits_stay_in_cells_of_their_own(size, grid, objects, digit):
    config = DigitScenesConfig(image_size=size, grid=grid, objects_per_image=objects, digit_size=digit)
    cell = size // grid
    for index in range(20):
        scene = compose_scene(config, "val", index)
        cells = [tuple(np.argwhere(mask).min(0) // cell) for mask in scene.masks]
        assert [tuple(np.argwhere(mask).max(0) // cell) for mask in scene.masks] == cells
        assert len(set(cells)) == objects
        assert scene.pixels.shape == (size, size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"digit_size": [20, 33]}, r"digits\.digit_size is \[20, 33\].* largest <= 32"),
        ({"digit_size": [28, 20]}, r"digits\.digit_size is \[28, 20\]"),
        ({"digit_size": [4, 20]}, r"digits\.digit_size is \[4, 20\].*8 <= smallest"),
        ({"digit_size": [20]}, r"digits\.digit_size is \[20\]"),
        ({"objects_per_image": 10}, r"objects_per_image is 10; valid: 0 to 9"),
        ({"image_size": 900, "grid": 30, "objects_per_image": 200}, r"200; valid: up to 109, as many as the rarest"),
    ],
)
def test_settings_that_fit_no_scene_are_named(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        write_digit_scenes(tmp_path / "a", dataclasses.replace(SMALL, **values), "train")
    assert not any(tmp_path.iterdir())


def test_the_path_is_readable_and_differs_with_every_setting(tmp_path):
    small = dataclasses.replace(SMALL, digit_size=[20, 24])
    base = digit_scenes_path(tmp_path, small, "train")
    assert re.fullmatch(r"digit_scenes_train_6x96px_share1_clutter0\.35_seed0_[0-9a-f]{8}", base.name)
    changes = {"num_images": 7, "image_size": 97, "objects_per_image": 4, "grid": 4, "digit_size": [20, 23],
               "class_sharing": 0.5, "clutter": 0.3, "mask_format": "polygon", "seed": 1}  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(SMALL)}
    others = {digit_scenes_path(tmp_path, dataclasses.replace(small, **{key: value}), "train")
              for key, value in changes.items()}  # fmt: skip
    assert len({base, digit_scenes_path(tmp_path, small, "val"), *others}) == len(changes) + 2
    assert digit_scenes_path(tmp_path, dataclasses.replace(small, class_sharing=1), "train") == base


def test_what_is_there_is_reused_and_not_written_again(tmp_path):
    folder = write_digit_scenes(tmp_path / "a", SMALL, "train")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_digit_scenes(folder, SMALL, "train") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    folder = write_digit_scenes(tmp_path / "a", SMALL, "train")
    with pytest.raises(DataError, match=r"a: holds digit scenes of other settings \(seed 0 instead of 5\)"):
        write_digit_scenes(folder, dataclasses.replace(SMALL, seed=5), "train")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="mine: exists, but holds no digit scenes"):
        write_digit_scenes(tmp_path / "mine", SMALL, "train")
    (folder / "images" / "000003.png").unlink()
    with pytest.raises(DataError, match="a: has 5 of its 6 images; delete the folder"):
        write_digit_scenes(folder, SMALL, "train")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the digit scenes: (Not a directory|File exists)"):
        write_digit_scenes(tmp_path / "file" / "a", SMALL, "train")


def test_an_interrupted_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(image, path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(tmp_path / "a", SMALL, "train")
    assert not any(tmp_path.iterdir())


def test_a_killed_writing_is_never_taken_for_a_data_set(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=write_digit_scenes, args=(tmp_path / "a", DigitScenesConfig(num_images=100_000), "train")
    )
    process.start()
    deadline = time.monotonic() + 60
    while not any(tmp_path.rglob("000010.png")):
        assert time.monotonic() < deadline, "no scene was written"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "a").exists()
    assert len(contents(write_digit_scenes(tmp_path / "a", SMALL, "train"))) == 7


def test_processes_that_write_at_once_all_get_the_same_complete_set(tmp_path):
    config = DigitScenesConfig(num_images=40)
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        folders = pool.starmap(write_digit_scenes, [(tmp_path / "a", config, "train")] * 8)
    assert set(folders) == {tmp_path / "a"}
    assert os.listdir(tmp_path) == ["a"]
    assert contents(tmp_path / "a") == contents(write_digit_scenes(tmp_path / "b", config, "train"))


def test_no_scene_at_all_is_a_valid_data_set(tmp_path):
    folder = write_digit_scenes(tmp_path / "a", DigitScenesConfig(num_images=0), "train")
    assert len(CocoInstances(folder / "images", folder / "instances.json")) == 0
