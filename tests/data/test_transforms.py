import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.data import DetectionTransform, sample_generator
from leakfree.errors import DataError


def sample(height, width, boxes):
    """An image that shows its filled boxes in white."""
    image = torch.zeros((3, height, width), dtype=torch.uint8)
    masks = torch.zeros((len(boxes), height, width), dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
        image[:, y0:y1, x0:x1] = 255
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return image, {"boxes": corners, "masks": masks, "area": area, "labels": torch.arange(len(boxes))}


@st.composite
def samples(draw):
    height, width = draw(st.integers(12, 70)), draw(st.integers(12, 70))
    x0, y0 = draw(st.integers(0, width - 6)), draw(st.integers(0, height - 6))
    x1, y1 = draw(st.integers(x0 + 5, width)), draw(st.integers(y0 + 5, height))
    return sample(height, width, [(x0, y0, x1, y1)])


@settings(deadline=None, max_examples=150)
@given(samples(), st.lists(st.integers(10, 120), min_size=1, max_size=3), st.integers(20, 150), st.integers(0, 99))
def test_box_mask_area_and_picture_move_together(pair, min_size, max_size, draw):
    image, target = pair
    before = image.clone(), {key: value.clone() for key, value in target.items()}
    transform = DetectionTransform(min_size, max_size, flip=0.5, train=True)
    moved, after = transform(image, target, sample_generator(0, draw, 0))

    height, width = moved.shape[-2:]
    assert max(height, width) <= max_size
    assert min(height, width) in min_size or max(height, width) == max_size
    x0, y0, x1, y1 = after["boxes"][0].tolist()
    assert -1e-3 <= x0 < x1 <= width + 1e-3
    assert -1e-3 <= y0 < y1 <= height + 1e-3
    assert float(after["area"][0]) == pytest.approx((x1 - x0) * (y1 - y0), rel=1e-4)
    for picture in (after["masks"][0], moved[0] > 0.5):  # the mask, and the white of the image
        if min(x1 - x0, y1 - y0) > 1.5:
            ys, xs = np.nonzero(picture.numpy())
            np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x0, y0, x1, y1], atol=1)
    assert torch.equal(image, before[0])
    assert all(torch.equal(target[key], before[1][key]) for key in target)


def test_the_usual_sizes():
    """Shorter side to 800 unless the longer would pass 1333: COCO's 480 x 640 becomes 800 x 1067."""
    transform = DetectionTransform([640, 800], 1333)
    for given_size, expected in [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((400, 1000), (533, 1333))]:
        image, target = sample(*given_size, [(10, 10, 60, 60)])
        assert transform(image, target)[0].shape == (3, *expected)


def test_an_image_of_the_right_size_is_only_scaled_to_one():
    image, target = sample(96, 96, [(10, 20, 40, 50)])
    image[0, 0] = torch.arange(96, dtype=torch.uint8)
    moved, after = DetectionTransform([96], 96)(image, target)
    torch.testing.assert_close(moved, image / 255)
    assert all(torch.equal(after[key], target[key]) for key in target)


def test_flip_mirrors_pixels_masks_and_boxes():
    image, target = sample(20, 30, [(2, 3, 9, 8)])
    moved, after = DetectionTransform([20], 30, flip=1.0, train=True)(image, target, sample_generator(0, 0, 0))
    torch.testing.assert_close(moved, image.flip(-1) / 255)
    assert after["boxes"].tolist() == [[21, 3, 28, 8]]
    assert torch.equal(after["masks"], target["masks"].flip(-1))


def test_an_image_without_objects_is_resized_and_flipped():
    image, target = sample(20, 30, [])
    _, after = DetectionTransform([40], 100, flip=1.0, train=True)(image, target, sample_generator(0, 0, 0))
    assert after["masks"].shape == (0, 40, 60)
    assert after["boxes"].shape == (0, 4)


def test_draws_are_a_function_of_seed_draw_and_index_and_look_random():
    image, target = sample(20, 30, [(2, 3, 9, 8)])
    transform = DetectionTransform([20, 24, 28], 100, flip=0.5, train=True)

    def outcome(*key):
        torch.manual_seed(torch.seed())  # whatever the global generator holds
        moved, after = transform(image, target, sample_generator(*key))
        return moved.shape[-2], float(after["boxes"][0, 0]) > 5 * moved.shape[-2] / 20

    keys = [(seed, draw, index) for seed in range(3) for draw in range(10) for index in range(10)]
    outcomes = [outcome(*key) for key in keys]
    assert [outcome(*key) for key in keys] == outcomes
    assert {size for size, _ in outcomes} == {20, 24, 28}
    assert np.mean([flipped for _, flipped in outcomes]) == pytest.approx(0.5, abs=0.115)  # 4 standard errors
    assert np.mean([size == 20 for size, _ in outcomes]) == pytest.approx(1 / 3, abs=0.115)
    for place in range(3):  # each part of the key matters: changing it changes about half of the flips
        shifted = [outcome(*(part + 100 * (place == which) for which, part in enumerate(key)))[1] for key in keys]
        assert np.mean([a == b[1] for a, b in zip(shifted, outcomes, strict=True)]) == pytest.approx(0.5, abs=0.115)


def test_tests_take_the_last_size_and_never_flip():
    image, target = sample(20, 30, [(2, 3, 9, 8)])
    moved, after = DetectionTransform([40, 60], 100, flip=1.0)(image, target)
    assert moved.shape == (3, 60, 90)
    assert after["boxes"].tolist() == [[6, 9, 27, 24]]


def test_training_without_a_generator_and_no_size_are_refused():
    image, target = sample(20, 30, [])
    with pytest.raises(TypeError, match="generator"):
        DetectionTransform([20], 30, train=True)(image, target)
    with pytest.raises(DataError, match=r"data\.min_size is \[\]"):
        DetectionTransform([], 30)
