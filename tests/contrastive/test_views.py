"""A view is a function of (image, seed, position, which) alone, and does what the config says."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakfree.config.schema import ContrastiveDataConfig, ViewsConfig
from leakfree.contrastive import build_views
from leakfree.errors import DataError

NAMES = ["digits", "simclr", "moco_v2"]


def images(count: int, side: int = 8, seed: int = 0) -> list[Tensor]:
    return list(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)))


def config(name: str, **settings: float) -> ContrastiveDataConfig:
    return ContrastiveDataConfig(image_size=12, views=ViewsConfig(name=name, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", [0.0, 0.2])
def test_a_view_depends_on_nothing_else(name: str, style: float) -> None:
    views = build_views(config(name, style=style), 5, "train")
    pixels, indices, draws = images(6), [3, 1, 4, 1, 5, 9], [(10, 0), (11, 0), (12, 1), (13, 0), (10, 1), (99, 1)]
    together = views.distorted(pixels, indices, draws)
    assert together.shape == (6, 3, 12, 12)
    assert together.dtype == torch.float32
    for row in (5, 0, 3):
        torch.manual_seed(row)
        again = build_views(config(name, style=style), 5, "train")
        alone = again.distorted(pixels[row : row + 1], indices[row : row + 1], draws[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", NAMES)
def test_seed_position_and_which_all_count(name: str) -> None:
    pixels = images(1)

    def view(seed: int, position: int, which: int) -> Tensor:
        return build_views(config(name), seed, "train").distorted(pixels, [0], [(position, which)])[0]

    seen = [view(0, 4, 0), view(1, 4, 0), view(0, 5, 0), view(0, 4, 1), view(2**33, 4, 0), view(0, 2**41, 0)]
    assert len({item.numpy().tobytes() for item in seen}) == len(seen)
    assert torch.equal(view(0, 4, 0), seen[0])


@pytest.mark.parametrize("name", NAMES)
def test_views_leave_global_random_states_untouched(name: str) -> None:
    views = build_views(config(name), 0, "train")
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    views.distorted(images(3), [0, 1, 2], [(0, 0), (1, 0), (2, 0)])
    views.plain(images(3), [0, 1, 2])
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.rand(()) == expected[2]


@pytest.mark.parametrize("name", NAMES)
def test_plain_images_are_standardized(name: str) -> None:
    settings = config(name)
    white = [torch.ones(3, 12, 12)] * 2
    settings.mean, settings.std = [0.5, 0.25, 0.0], [0.5, 0.25, 2.0]
    seen = build_views(settings, 0, "train").plain(white, [0, 1])
    assert seen.shape == (2, 3, 12, 12)
    torch.testing.assert_close(seen[:, :, 5, 5], torch.tensor([[1.0, 3.0, 0.5]] * 2))


# ------------------------------------------------------------------------------------------- digits


def test_digits_without_strength_are_plain() -> None:
    views = build_views(config("digits", strength=0.0), 0, "train")
    torch.testing.assert_close(views.distorted(images(3), [0, 1, 2], [(7, 1)] * 3), views.plain(images(3), [0, 1, 2]))


@given(st.integers(0, 10**6), st.floats(0.1, 1.0))
def test_strength_bounds_contrast_and_brightness(position: int, strength: float) -> None:
    """White images: what is left of the middle after a shift is contrast, brightness and noise, or the hole."""
    views = build_views(config("digits", strength=strength), 0, "train")
    seen = views.distorted([torch.zeros(3, 8, 8)], [0], [(position, 0)])
    assert torch.equal(seen[:, 0], seen[:, 1])  # all channels alike
    noise = 0.15 * strength * 6
    assert seen.abs().max() <= 0.25 * strength + noise


def test_a_hole_is_as_frequent_as_told() -> None:
    views = build_views(config("digits", strength=0.6), 0, "train")
    seen = views.distorted(images(600), list(range(600)), [(i, 0) for i in range(600)])
    holes = (seen == 0).all(1).flatten(1).sum(1)
    assert 0.25 < float((holes >= 16).float().mean()) < 0.35  # a probability of 0.3
    assert set(holes[holes >= 16].tolist()) == {16}  # 30% of 12 pixels are 4


def test_an_illumination_belongs_to_the_image_and_survives_the_views() -> None:
    settings = {"strength": 0.0, "style": 0.5}
    black, indices = [torch.zeros(3, 8, 8)] * 40, list(range(40))

    def seen(split: str, noise: float, which: int = 0, seed: int = 0) -> Tensor:
        views = build_views(config("digits", style_noise=noise, **settings), seed, split)
        return views.distorted(black, indices, [(row, which) for row in indices]).flatten(1)

    assert torch.equal(seen("train", 0.0), seen("train", 0.0, which=1))
    assert torch.equal(seen("train", 0.0), seen("train", 0.0, seed=1))  # it is the image's
    plain = build_views(config("digits", style_noise=0.0, **settings), 0, "train").plain(black, indices).flatten(1)
    assert torch.equal(seen("train", 0.0), plain)
    assert not torch.equal(seen("train", 0.0), seen("val", 0.0))

    def alike(one: Tensor, two: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(one, two).mean())

    near, far = (alike(seen("train", noise), seen("train", noise, which=1)) for noise in (0.3, 10.0))
    assert near > 0.8
    assert abs(far) < 0.4
    assert abs(alike(plain, plain.roll(1, 0))) < 0.4
    # cosines over the image: a constant, and waves along x and y
    field = plain[0].view(3, 12, 12)[0]
    basis = torch.cos(torch.pi * (torch.arange(12) + 0.5) / 12)
    design = torch.stack([torch.ones(12, 12), basis.expand(12, 12), basis[:, None].expand(12, 12)]).flatten(1).T
    fitted = design @ torch.linalg.lstsq(design, field.flatten()[:, None]).solution
    torch.testing.assert_close(fitted[:, 0], field.flatten(), atol=1e-5, rtol=0)


def test_digits_of_several_sizes_are_refused() -> None:
    views = build_views(config("digits"), 0, "train")
    with pytest.raises(DataError, match=r"images of one size, and image 7 is \(8, 8\), image 9 \(6, 6\); use simclr"):
        views.plain([*images(1), *images(1, 6)], [7, 9])


# ------------------------------------------------------------------------------------------ photographs


@pytest.mark.parametrize("name", NAMES[1:])
def test_photographs_of_any_size_are_squared(name: str) -> None:
    views = build_views(config(name), 0, "train")
    pixels = [torch.rand(3, 20, 31), torch.rand(3, 9, 7)]
    assert views.plain(pixels, [0, 1]).shape == (2, 3, 12, 12)
    assert views.distorted(pixels, [0, 1], [(0, 0), (1, 0)]).shape == (2, 3, 12, 12)


@pytest.mark.parametrize("name", NAMES[1:])
def test_settings_reach_lightly_s_transforms(name: str) -> None:
    """Without crop, colour jitter, grey, flip or blur a view is the image; lightly's greys and jitter are random."""
    ramp = (torch.arange(144).view(12, 12) / 143).expand(3, -1, -1)
    still = build_views(config(name, strength=0.0, min_crop=1.0, flip=0.0, blur=0.0), 0, "train")
    flipped = build_views(config(name, strength=0.0, min_crop=1.0, flip=1.0, blur=0.0), 0, "train")
    plain = still.plain([ramp], [0])
    found = [still.distorted([ramp], [0], [(position, 0)]) for position in range(8)]
    near = [view for view in found if torch.allclose(view, plain, atol=0.01)]
    assert len(near) == len(found)
    mirrored = flipped.distorted([ramp], [0], [(0, 0)])
    torch.testing.assert_close(mirrored, plain.flip(3), atol=0.01, rtol=0)
    blurred = build_views(config(name, strength=0.0, min_crop=1.0, flip=0.0, blur=1.0), 0, "train")
    impulse = torch.zeros(3, 12, 12)
    impulse[:, 6, 6] = 1.0
    assert blurred.distorted([impulse], [0], [(0, 0)]).max() < still.distorted([impulse], [0], [(0, 0)]).max()
    cropped = build_views(config(name, strength=0.0, min_crop=0.2, flip=0.0, blur=0.0), 0, "train")
    assert not torch.allclose(cropped.distorted([ramp], [0], [(0, 0)]), plain, atol=0.01)
