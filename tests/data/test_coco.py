import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image

from leakfree.config.schema import DigitScenesConfig
from leakfree.data import CocoInstances, write_digit_scenes
from leakfree.errors import DataError

from .conftest import HEIGHT, WIDTH


def test_a_sample_has_the_documented_types_and_values(write_coco):
    image, target = CocoInstances(*write_coco())[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in target.items() if key != "image_id"} == {
        "boxes": (torch.float32, (2, 4)),
        "labels": (torch.int64, (2,)),
        "masks": (torch.uint8, (2, HEIGHT, WIDTH)),
        "area": (torch.float32, (2,)),
        "iscrowd": (torch.int64, (2,)),
        "original_size": (torch.int64, (2,)),
    }
    assert target["image_id"] == 11
    assert target["boxes"].tolist() == [[5, 5, 25, 25], [30, 2, 35, 8]]
    assert target["masks"][1, 2:8, 30:35].all()
    assert target["masks"][1].sum() == 30


def test_empty_images_and_crowds_are_kept_for_validation_and_left_out_for_training(write_coco):
    paths = write_coco()
    everything, objects = CocoInstances(*paths), CocoInstances(*paths, keep_empty=False)
    assert everything.image_ids == [11, 12, 13, 14]
    assert everything[2][1]["masks"].shape == (0, HEIGHT, WIDTH)
    assert everything[2][1]["boxes"].shape == (0, 4)
    assert everything[3][1]["iscrowd"].tolist() == [1]
    assert objects.image_ids == [11, 12]
    assert [objects[index][1]["image_id"] for index in range(2)] == [11, 12]


def test_writing_to_a_target_leaves_the_data_set_as_it_is(write_coco):
    dataset = CocoInstances(*write_coco())
    for value in dataset[0][1].values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert dataset[0][1]["boxes"].tolist() == [[5, 5, 25, 25], [30, 2, 35, 8]]
    assert dataset[0][1]["labels"].tolist() == [2, 1]


def test_the_target_alone_equals_the_samples(write_coco):
    dataset = CocoInstances(*write_coco())
    alone, sample = dataset.target(0), dataset[0][1]
    assert alone.keys() == sample.keys()
    assert all(np.array_equal(alone[key], sample[key]) for key in alone)


def test_boxes_only_has_no_masks(write_coco):
    assert "masks" not in CocoInstances(*write_coco(), masks=False)[0][1]


def test_a_pickled_copy_gives_the_same_samples(write_coco):
    dataset = CocoInstances(*write_coco())
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1][0], dataset[1][0])
    assert torch.equal(copy[1][1]["masks"], dataset[1][1]["masks"])


def test_an_index_beyond_the_end_is_an_index_error(write_coco):
    with pytest.raises(IndexError):
        CocoInstances(*write_coco())[4]


@pytest.mark.parametrize("mask_format", ["rle", "polygon"])
def test_an_independent_reader_sees_the_same_objects(tmp_path, mask_format):
    config = DigitScenesConfig(num_images=12, class_sharing=0.5, mask_format=mask_format)
    folder = write_digit_scenes(tmp_path / "scenes", config, "val")
    dataset = CocoInstances(folder / "images", folder / "instances.json")
    with contextlib.redirect_stdout(io.StringIO()):
        reader = COCO(str(folder / "instances.json"))
    assert sorted(reader.getImgIds()) == dataset.image_ids
    for index, image_id in enumerate(dataset.image_ids):
        _, target = dataset[index]
        annotations = reader.loadAnns(reader.getAnnIds(imgIds=[image_id]))
        assert len(annotations) == len(target["labels"]) == 5
        for row, annotation in enumerate(annotations):
            x, y, w, h = annotation["bbox"]
            assert target["boxes"][row].tolist() == [x, y, x + w, y + h]
            assert dataset.category_ids[int(target["labels"][row])] == annotation["category_id"]
            np.testing.assert_array_equal(target["masks"][row].numpy(), reader.annToMask(annotation))


def break_image(folder):
    path = folder / "12.png"
    path.write_bytes(path.read_bytes()[:200])


def resize_image(folder):
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "12.png")


@pytest.mark.parametrize(("damage", "kind", "message"), [
    (break_image, "image_unreadable", r"12\.png: broken image file: .*\(image 12\)"),
    (resize_image, "image_size", r"12\.png: image 12 is 30 x 40 px .* say 40 x 30"),
])  # fmt: skip
def test_a_faulty_image_file_stops_or_is_none_and_counted_once(write_coco, damage, kind, message):
    paths = write_coco()
    damage(paths[0])
    with pytest.raises(DataError, match=message) as caught:
        CocoInstances(*paths)[1]
    assert "\n" not in str(caught.value)

    dataset = CocoInstances(*paths, on_error="skip")
    assert [dataset[1], dataset[1]] == [None, None]
    assert dataset[0] is not None
    assert dataset.problems.counts == {kind: 1}


def test_a_missing_folder_is_named(write_coco, tmp_path):
    _, file = write_coco()
    with pytest.raises(DataError, match=r"nowhere: no such folder of images"):
        CocoInstances(tmp_path / "nowhere", file)
