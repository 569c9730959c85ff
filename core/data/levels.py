"""Pixels of more than 8 bits as 8 bits, by the range that their file states."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.data.source import CorruptImage

LEAST = 16  # a picture below white / LEAST is taken for fewer bits in a wider number, as cameras store 12 in 16
_BITS, _KIND, _SIGNED = 258, 339, 2  # TIFF's BitsPerSample and SampleFormat
_HOW = "its range is not known and guessing would make it black; convert it to 8 bits, or to floats from 0 to 1"


def eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) of an image of any kind.

    Whole numbers are scaled by the bits a pixel that the file states, floats from 0 to 1 by 255.  Raises CorruptImage
    for what does not say its range: other floats, negative numbers, numbers that use few of their bits.
    """
    if image.mode == "F":
        return _from_floats(np.asarray(image))
    if image.mode.startswith("I"):
        return _from_whole(image)
    halved = ";16" in str(getattr(image, "tile", ""))  # Pillow keeps the upper byte of each channel
    pixels = np.asarray(image.convert("RGB"))
    if halved and pixels.max() < 256 // LEAST:
        raise CorruptImage(f"16 bits a channel of which the upper {LEAST.bit_length() - 1} are not used: {_HOW}")
    return pixels


def _from_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # nor NaN
        raise CorruptImage(f"floats from {low:g} to {high:g}: {_HOW}")
    return (values * 255).round().astype(np.uint8)


def _from_whole(image: Image.Image) -> NDArray[np.uint8]:
    bits, certain = _stated_bits(image)
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or (not certain and 0 < high < (1 << bits) // LEAST):
        raise CorruptImage(f"whole numbers of {bits} bits from {low} to {high}: {_HOW}")
    return (values >> (bits - 8)).clip(0, 255).astype(np.uint8)


def _stated_bits(image: Image.Image) -> tuple[int, bool]:
    """Bits of white, and whether that is more than the width of the numbers."""
    if image.format != "TIFF":
        return 16, image.format == "PPM"  # whose white Pillow has brought to 16 bits
    tags = getattr(image, "tag_v2", {})
    bits, signed = int(tags.get(_BITS, (16,))[0]), tags.get(_KIND, (1,))[0] == _SIGNED
    return bits - signed, bits % 8 > 0
