"""Every fault that the JSON shows, under both policies: the message names the file and the id."""

import json
import re

import numpy as np
import pytest

from leakfree.data.annotations import read_annotations
from leakfree.data.problems import Problems
from leakfree.errors import DataError

from .conftest import HEIGHT, WIDTH


def change(position, **values):
    return lambda content: content["annotations"][position].update(values)


def change_image(position, **values):
    return lambda content: content["images"][position].update(values)


def append(section, item):
    return lambda content: content[section].append(item)


def drop(section, position, key):
    return lambda content: content[section][position].pop(key)


# kind, damage, pattern of the message, image ids left, number of objects left (of 4)
ITEM_FAULTS = [
    ("box_no_area", change(0, bbox=[5, 5, 0, 20]), r"id 101, image 11 11\.png\): .*no area", 4, 3),
    ("box_no_area", change(0, bbox=[5, 5, 20, -1]), r"id 101, .*no area", 4, 3),
    ("box_not_finite", change(0, bbox=[float("nan"), 5, 20, 20]), r"id 101, .*nan.* not finite", 4, 3),
    ("box_not_finite", change(0, bbox=[5, 5, float("inf"), 20]), r"id 101, .*not finite", 4, 3),
    ("box_not_finite", change(0, bbox=[5, 5, 10**400, 20]), r"id 101, .*not finite", 4, 3),
    ("box_outside", change(0, bbox=[WIDTH + 3, 5, 9, 9]), r"id 101, .*outside the image \(40 x 30\)", 4, 3),
    ("box_outside", change(0, bbox=[5, -20, 9, 20]), r"id 101, .*outside the image", 4, 3),
    ("box_clipped", change(0, bbox=[25, 5, 20, 20]), r"id 101, .*reaches 5\.0 px over the edge", 4, 4),
    ("box_invalid", change(0, bbox=[5, 5, 20]), r"id 101, .*\[x, y, .*, but is \[5, 5, 20\]", 4, 3),
    ("box_invalid", change(0, bbox=[5, 5, "20", 20]), r"id 101, .*bbox must be", 4, 3),
    ("box_invalid", drop("annotations", 0, "bbox"), r"id 101, .*bbox must be .* None", 4, 3),
    ("annotation_unknown_category", change(0, category_id=9), r"id 101, .*category 9 .*: 3, 7", 4, 3),
    ("annotation_unknown_category", drop("annotations", 0, "category_id"), r"id 101, .*category None", 4, 3),
    ("annotation_unknown_image", change(0, image_id=99), r"id 101, image 99\): belongs to image 99", 4, 3),
    ("annotation_duplicate_id", change(2, id=101), r"annotations\[2\] \(id 101, .*first .*s\[0\]", 4, 3),
    ("annotation_invalid", change(0, id="101"), r"annotations\[0\] \(id '101'.*must be integers", 4, 3),
    ("annotation_invalid", change(0, iscrowd=2), r"id 101, .*iscrowd must be 0 or 1, but is 2", 4, 3),
    ("annotation_invalid", change(0, area=float("nan")), r"id 101, .*area .* nan", 4, 3),
    ("annotation_invalid", change(0, area=-3), r"id 101, .*area .* -3", 4, 3),
    ("annotation_invalid", append("annotations", 5), r"annotations\[4\]: is a int", 4, 4),
    ("mask_missing", drop("annotations", 0, "segmentation"), r"id 101, .*no segmentation", 4, 3),
    ("mask_malformed", change(0, segmentation=[]), r"id 101, .*malformed: an empty list of polygons", 4, 3),
    ("mask_malformed", change(0, segmentation={"size": [40, 30], "counts": [1200]}), r"id 101, .*\[40, 30\]", 4, 3),
    ("mask_malformed", change(0, segmentation={"size": [30, 40], "counts": [7]}), r"id 101, .*add up", 4, 3),
    ("mask_malformed", change(0, segmentation={"size": [30, 40], "counts": "zz"}), r"id 101, .*damaged", 4, 3),
    ("mask_empty", change(0, segmentation={"size": [30, 40], "counts": [1200]}), r"id 101, .*no pixel", 4, 3),
    ("image_duplicate_id", change_image(1, id=11), r"images\[1\] \(image 11\): duplicate id 11", 3, 3),
    ("image_missing", change_image(0, file_name="no.png"), r"image 11\): .*no\.png: no such", 3, 2),
    ("image_missing", change_image(0, file_name="sub/no.png"), r"image 11\): .*sub/no\.png", 3, 2),
    ("box_no_area", change(0, bbox=[39.99999999, 2, 1e-8, 5]), r"id 101.*no area inside the image \(40 x 30\)", 4, 3),
    ("box_no_area", change(0, bbox=[5, 30 - 1e-12, 5, 5]), r"id 101.*has no area inside the image", 4, 3),
    ("image_outside", change_image(0, file_name="../12.png"), r"file_name '\.\./12\.png' leads out of", 3, 2),
    ("image_outside", change_image(0, file_name="a/../../b.png"), r"image 11\): file_name .* leads out", 3, 2),
    ("image_outside", change_image(0, file_name="/etc/passwd"), r"file_name '/etc/passwd' leads out", 3, 2),
    ("image_invalid", drop("images", 0, "height"), r"image 11\): height and width .* None and 40", 3, 2),
    ("image_invalid", change_image(0, width=0), r"image 11\): .* 30 and 0", 3, 2),
    ("image_invalid", change_image(0, width=float("inf")), r"image 11\): .*inf", 3, 2),
    ("image_invalid", drop("images", 0, "file_name"), r"image 11\): has no file_name", 3, 2),
    ("image_invalid", append("images", {"file_name": "11.png"}), r"images\[4\]: has no integer id", 4, 4),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "message", "images", "objects"), ITEM_FAULTS)
def test_a_fault_stops_or_is_left_out_and_counted(write_coco, kind, damage, message, images, objects):
    folder, file = write_coco(damage)
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(file, folder, Problems("raise"))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)

    problems = Problems("skip")
    table = read_annotations(file, folder, problems)
    orphans = {"annotation_unknown_image": 1} if kind == "image_duplicate_id" else {}  # of image 12, now a second 11
    assert problems.counts == {kind: 1, **orphans}
    assert re.search(message, problems.examples[kind][0])
    assert (len(table.image_ids), len(table.labels)) == (images, objects)


def test_a_sound_file_has_no_faults_and_every_number_arrives(write_coco):
    folder, file = write_coco()
    table = read_annotations(file, folder, Problems("raise"))
    assert table.image_ids == [11, 12, 13, 14]
    assert table.categories == {1: "dog", 2: "cat"}
    assert table.category_ids == {1: 3, 2: 7}
    assert table.starts.tolist() == [0, 2, 3, 3, 4]
    assert table.boxes.tolist() == [[5, 5, 25, 25], [30, 2, 35, 8], [2, 3, 6, 8], [1, 1, 9, 10]]
    assert table.labels.tolist() == [2, 1, 1, 2]
    assert table.areas.tolist() == [200, 30, 20, 72]
    assert table.crowd.tolist() == [0, 0, 0, 1]
    assert table.sizes.tolist() == [[HEIGHT, WIDTH]] * 4


def test_a_box_up_to_one_pixel_over_the_edge_is_clipped_silently(write_coco):
    folder, file = write_coco(change(0, bbox=[-0.5, 5, 20, HEIGHT - 4.2]))
    table = read_annotations(file, folder, Problems("raise"))
    np.testing.assert_allclose(table.boxes[0], [0, 5, 19.5, HEIGHT])


def test_a_clipped_box_stays_inside_the_image(write_coco):
    folder, file = write_coco(change(0, bbox=[-10, -10, 100, 100]))
    assert read_annotations(file, folder, Problems("skip")).boxes[0].tolist() == [0, 0, WIDTH, HEIGHT]


def test_missing_area_is_the_masks_and_missing_iscrowd_is_zero(write_coco):
    def shorten(content):
        del content["annotations"][1]["area"], content["annotations"][1]["iscrowd"]

    folder, file = write_coco(shorten)
    table = read_annotations(file, folder, Problems("raise"))
    assert (table.areas[2], table.crowd[2]) == (20, 0)


def test_without_masks_segmentations_are_not_needed(write_coco):
    folder, file = write_coco(drop("annotations", 0, "segmentation"))
    assert len(read_annotations(file, folder, Problems("raise"), masks=False).labels) == 4


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "broken JSON at line 1, column 1: it ends too early, at 0 bytes"),
        ('{"images": [\n  {"id": 1, "file_na', "broken JSON at line 2, column 13: it ends too early"),
        ('{"images": [{"id": 1}], "annot', "broken JSON at line 1, column 25: it ends too early"),
        ('{"images": [], \n "annotations" []}', "broken JSON at line 2, column 16: Expecting ':' delimiter"),
        ('{"images": ' + "9" * 5000 + "}", "not a JSON text"),
        ("[" * 100_000, "not a JSON text"),
        ("[]", "not COCO instances: the top level is a list"),
        ('{"images": [], "info": {}}', "lacks the lists annotations, categories; it has images, info"),
        ('{"images": [], "annotations": {}, "categories": []}', "lacks the list annotations"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
        ('{"images": [], "annotations": [], "categories": [{"name": "a"}]}', r"categories\[0\] has no integer id"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 1}]}', r"categories\[1\]: duplicate id 1"),
    ],
)
def test_a_file_that_is_not_coco_instances_stops_under_both_policies(tmp_path, text, message, on_error):
    file = tmp_path / "instances.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(file, tmp_path, Problems(on_error))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_every_truncation_of_a_real_file_is_a_data_error(write_coco):
    folder, file = write_coco()
    text = file.read_text()
    for end in range(0, len(text), 7):
        file.write_text(text[:end])
        with pytest.raises(DataError, match=r"broken JSON at line 1, column \d+: it ends too early"):
            read_annotations(file, folder, Problems("skip"))


def test_binary_rubbish_and_a_missing_file_are_named(tmp_path):
    file = tmp_path / "instances.json"
    with pytest.raises(DataError, match=r"instances\.json: cannot read the annotation file: No such file"):
        read_annotations(file, tmp_path, Problems())
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match=r"instances\.json: not a JSON text"):
        read_annotations(file, tmp_path, Problems())


def test_images_in_subfolders_are_found(write_coco):
    folder, file = write_coco(lambda content: content["images"][0].update(file_name="a/b/11.png"))
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "11.png").rename(folder / "a" / "b" / "11.png")
    assert read_annotations(file, folder, Problems()).file_names[0] == "a/b/11.png"


def test_a_byte_order_mark_is_no_fault(write_coco):
    folder, file = write_coco()
    file.write_text("\ufeff" + json.dumps(json.loads(file.read_text())), encoding="utf-8")
    assert len(read_annotations(file, folder, Problems()).labels) == 4
