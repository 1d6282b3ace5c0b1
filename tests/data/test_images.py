import contextlib
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from leakfree.data.images import read_image
from leakfree.errors import DataError

RAMP = (np.arange(6)[:, None] * 20 + np.arange(8)[None, :] * 10).astype(np.uint8)  # (6, 8), 0..170
COLOUR = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def test_rgb_is_read_as_channels_first(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").numpy(), COLOUR.transpose(2, 0, 1))


def test_grayscale_is_repeated(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").numpy(), np.stack([RAMP] * 3))


def test_sixteen_bits_keep_their_upper_eight_instead_of_clipping(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").numpy(), np.stack([RAMP] * 3))


def test_transparency_is_dropped_and_palettes_are_resolved(tmp_path):
    Image.fromarray(np.dstack([COLOUR, RAMP])).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png").numpy(), COLOUR.transpose(2, 0, 1))
    Image.fromarray(COLOUR).quantize(64).save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as image:
        assert image.mode == "P"
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png").numpy(), expected)


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # no cyan, full magenta, yellow
    red, green, blue = read_image(tmp_path / "a.jpg").float().mean((1, 2)).tolist()
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    image = Image.fromarray(COLOUR)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").numpy(), turn(COLOUR).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=rf"half\.{suffix}: broken image file: \S") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_damaged_bytes_never_raise_anything_but_a_data_error(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(COLOUR).save(path)
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with contextlib.suppress(DataError):
            assert read_image(path).shape[0] == 3


def test_float_pixels_and_missing_files_are_named(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: .*floating-point"):
        read_image(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"b\.png: no such image file"):
        read_image(tmp_path / "b.png")


def test_a_pipe_is_no_image_and_nobody_waits_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: broken image file: no regular file"):
        read_image(tmp_path / "a.png")


def test_no_program_is_started_for_postscript(tmp_path, monkeypatch):
    """Pillow would have Ghostscript run it."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\nshowpage\n")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail(f"started {args}"))
    with pytest.raises(DataError, match="broken image file"):
        read_image(tmp_path / "a.png")
