"""Bytes to pixels: any usual image file as uint8 RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from core.data.source import CorruptImage as CorruptImage

MAX_PIXELS = 1 << 27  # 134 million: 400 MB decoded; beyond it, one file could take down a node
# Only plain pixel formats: Pillow's list also holds ones that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode(data: bytes) -> torch.Tensor:
    """One image file as uint8 (3, H, W) RGB.

    Grey, palette, CMYK and 16-bit images are converted, alpha is dropped without compositing and EXIF orientation is
    not applied, as is usual for ImageNet.  Raises CorruptImage: empty, truncated, not an image, above MAX_PIXELS.
    """
    if not data:
        raise CorruptImage("empty file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorruptImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return _decode_jpeg(data)
            return _decode_any(image)
    except CorruptImage:
        raise
    except Exception as error:  # bad bytes make decoders raise anything: OSError, SyntaxError, struct.error ...
        raise CorruptImage(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def to_tensor(data: bytes | NDArray[np.uint8]) -> torch.Tensor:
    """A sample's data as uint8 (3, H, W): file bytes are decoded, pixels (H, W) or (H, W, 3) rearranged."""
    if isinstance(data, bytes):
        return decode(data)
    if data.dtype != np.uint8 or data.ndim not in (2, 3) or (data.ndim == 3 and data.shape[2] != 3):
        raise CorruptImage(f"pixels of type {data.dtype} and shape {data.shape} are not uint8 (H, W) or (H, W, 3)")
    return _from_pixels(data)


def _decode_jpeg(data: bytes) -> torch.Tensor:
    """The same pixels as Pillow's (both call libjpeg-turbo) at about 1.4 times the speed."""
    image: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


def _decode_any(image: Image.Image) -> torch.Tensor:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert("RGB") would clip at 255
        return _from_pixels((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return _from_pixels(np.asarray(image.convert("RGB")))


def _from_pixels(pixels: NDArray[np.uint8]) -> torch.Tensor:
    grey = pixels.ndim == 2
    image = torch.from_numpy(pixels.copy())
    return image.expand(3, -1, -1) if grey else image.permute(2, 0, 1)
