"""Image files to RGB tensors, the same way whatever the file holds."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from leakfree.errors import DataError

__all__ = ["read_image"]

# Not all that Pillow knows: for PostScript it starts a program, and others have decoders that nobody looks after.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file as RGB: uint8 (3, H, W).

    The EXIF orientation is applied (detectron2's convention). Grayscale is repeated, palettes and CMYK are
    converted, transparency is dropped, 16 bits per channel keep their upper 8.

    Raises:
        DataError: the file is missing, truncated, damaged, of floating-point pixels, of none of ``FORMATS``, or no
            regular file.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for a writer
            raise ValueError("no regular file")
        with Image.open(path, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            if image.mode == "I" or image.mode.startswith("I;16"):
                pixels = _upper_bits(np.asarray(image))
            elif image.mode == "F":
                raise ValueError("floating-point pixels have no agreed range")
            else:
                pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except Exception as error:  # whatever a decoder raises on damaged bytes: the file is at fault
        raise DataError(f"{path}: broken image file: {' '.join(str(error).split()) or type(error).__name__}") from None
    if pixels.ndim == 2:
        return torch.from_numpy(pixels).expand(3, -1, -1).contiguous()
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _upper_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("integer pixels beyond 16 bits have no agreed range")
    return (pixels.astype(np.int32) >> 8).astype(np.uint8)
