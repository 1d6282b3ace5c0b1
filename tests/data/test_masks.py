import numpy as np
import pytest
from faster_coco_eval.core import mask as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leakfree.data.masks import decode_masks, encode_mask, mask_polygons, segmentation_to_rle

masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape))


def plain_runs(mask: np.ndarray) -> list[int]:
    """Run lengths by definition: column-major, starting with background."""
    runs, value = [0], 0
    for pixel in mask.ravel(order="F"):
        if pixel == value:
            runs[-1] += 1
        else:
            runs.append(1)
            value = pixel
    return runs


@settings(deadline=None, max_examples=150)
@given(masks)
def test_three_forms_of_a_mask_decode_to_the_mask(mask):
    height, width = mask.shape
    forms = [encode_mask(mask), {"size": [height, width], "counts": plain_runs(mask)}]
    if mask.any():
        forms.append(mask_polygons(mask))
    for form in forms:
        counts, area = segmentation_to_rle(form, height, width)
        assert area == mask.sum()
        np.testing.assert_array_equal(decode_masks([counts], height, width)[0].numpy(), mask)


def test_polygons_of_a_ring_are_cut_so_that_the_hole_stays():
    ring = np.ones((7, 9), dtype=bool)
    ring[2:5, 3:6] = False
    polygons = mask_polygons(ring)
    assert len(polygons) == 2
    assert all(len(polygon) >= 8 for polygon in polygons)
    assert segmentation_to_rle(polygons, 7, 9)[1] == 63 - 9


def test_a_rectangle_is_four_corners():
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:5, 3:9] = True
    (polygon,) = mask_polygons(mask)
    assert sorted(zip(polygon[::2], polygon[1::2], strict=True)) == [(3, 2), (3, 5), (9, 2), (9, 5)]


def test_masks_come_in_order_and_none_is_an_empty_stack():
    first, second = np.eye(6, 5, dtype=np.uint8), np.ones((6, 5), dtype=np.uint8)
    counts = [segmentation_to_rle(encode_mask(mask), 6, 5)[0] for mask in (first, second)]
    np.testing.assert_array_equal(decode_masks(counts, 6, 5).numpy(), np.stack([first, second]))
    assert decode_masks([], 6, 5).shape == (0, 6, 5)


def test_large_masks_agree_with_the_reference_codec():
    rng = np.random.default_rng(0)
    mask = np.zeros((700, 900), dtype=np.uint8)
    for _ in range(20):  # long and short runs: counts of one to four characters, positive and negative differences
        y, x = rng.integers(0, 600), rng.integers(0, 800)
        mask[y : y + rng.integers(1, 100), x : x + rng.integers(1, 100)] = 1
    rle = encode_mask(mask)
    assert segmentation_to_rle(rle, 700, 900)[1] == reference.area(rle) == mask.sum()


def test_an_empty_mask_has_area_zero():
    assert segmentation_to_rle(encode_mask(np.zeros((4, 4))), 4, 4)[1] == 0
    assert segmentation_to_rle([[-3, -3, -2, -3, -2, -2]], 4, 4)[1] == 0


GOOD = encode_mask(np.eye(10))["counts"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "empty list of polygons"),
        ([[1, 2, 3, 4]], "at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least 3 points"),
        ([1, 2, 3, 4, 5, 6], "at least 3 points"),
        ([[1, 2, 3, 4, 5, "6"]], "not a number"),
        ([[1, 2, 3, 4, 5, None]], "not a number"),
        ([[1, 2, 3, 4, 5, 10**400]], "not a number"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not finite"),
        ([[1, 2, 3, 4, 5, float("inf")]], "not finite"),
        ([[1, 2, 3, 4, 5, 1e9]], "farther out than the image is large"),
        ({"size": [10, 9], "counts": GOOD}, r"size \[10, 9\]"),
        ({"counts": GOOD}, "size None"),
        ({"size": [10, 10]}, "counts are NoneType"),
        ({"size": [10, 10], "counts": GOOD[:-2]}, "damaged|add up"),
        ({"size": [10, 10], "counts": GOOD + "5"}, "add up"),
        ({"size": [10, 10], "counts": ""}, "damaged"),
        ({"size": [10, 10], "counts": "zzzz"}, "damaged"),
        ({"size": [10, 10], "counts": "o" * 20 + "0"}, "damaged"),
        ({"size": [10, 10], "counts": "ä€"}, "add up|damaged"),
        ({"size": [10, 10], "counts": [10, 20]}, "add up to 10 x 10"),
        ({"size": [10, 10], "counts": [110, -10]}, "add up"),
        ({"size": [10, 10], "counts": [2**62, 2**62, 2**62, 2**62, 100]}, "add up"),
        ({"size": [10, 10], "counts": [50.0, 50.0]}, "not an integer"),
        ({"size": [10, 10], "counts": []}, "add up"),
        ("polygon", "neither polygons nor run lengths but str"),
        (None, "neither polygons nor run lengths but NoneType"),
    ],
)
def test_malformed_segmentations_are_named(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_rle(segmentation, 10, 10)


@settings(deadline=None, max_examples=300)
@given(masks, st.integers(0, 10**6), st.integers(40, 120))
def test_no_damaged_text_passes_the_check_and_then_fails_to_decode(mask, place, code):
    height, width = mask.shape
    text = encode_mask(mask)["counts"]
    place %= len(text)
    damaged = text[:place] + chr(code) + text[place + 1 :]
    try:
        counts, area = segmentation_to_rle({"size": [height, width], "counts": damaged}, height, width)
    except ValueError:
        return
    assert int(decode_masks([counts], height, width).sum()) == area
