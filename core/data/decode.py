"""Bytes to pixels: any usual image file as uint8 RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from core.data.levels import eight_bits
from core.data.source import CorruptImage as CorruptImage

MAX_PIXELS = 1 << 27  # 134 million: 400 MB decoded; beyond it, one file could take down a node
MAX_RATIO = 500  # a strip, whose short side is brought to some hundred pixels, would take gigabytes
MAX_SCANNED = 16 * MAX_PIXELS  # pixels times scans of a JPEG, a second of work: some kilobytes can hold 500 scans
SCAN = b"\xff\xda"  # begins a scan, and occurs in none
SHRINKS = (1, 2, 4, 8)  # that a JPEG decoder can do on the way
# Only plain pixel formats: Pillow's list also holds ones that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def decode(data: bytes, least: int = 0) -> torch.Tensor:
    """One image file as uint8 (3, H, W) RGB.

    least: pixels that are enough; above 0, a larger image may come at 1/2, 1/4 or 1/8 of its sides, with no fewer.
    Grey, palette, CMYK, 16-bit and float images are converted, alpha is dropped without compositing and EXIF
    orientation is not applied, as is usual for ImageNet.  Raises CorruptImage: empty, truncated, not an image, above
    MAX_PIXELS, MAX_RATIO or MAX_SCANNED, of a range that is not known.
    """
    if not data:
        raise CorruptImage("empty file")
    plain = _plain_jpeg(data, least)
    if plain is not None:
        return plain
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if reason := _refused(image.height, image.width, data.count(SCAN) if image.format == "JPEG" else 1):
                raise CorruptImage(reason)
            shrink = shrinking(image.width * image.height, least)
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return _decode_jpeg(data) if shrink == 1 else _draft(image, shrink)
            return shrunk(_from_pixels(eight_bits(image)), shrink)
    except CorruptImage:
        raise
    except UnidentifiedImageError:  # whose text holds an address in memory
        raise CorruptImage(f"no image file of a known kind ({', '.join(FORMATS)})") from None
    except Exception as error:  # bad bytes make decoders raise anything: OSError, SyntaxError, struct.error ...
        raise CorruptImage(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _refused(height: int, width: int, scans: int) -> str:
    """Why an image of this size is not decoded; nothing where it is."""
    if height * width > MAX_PIXELS:
        return f"{width} x {height} pixels are more than {MAX_PIXELS}"
    if height * width * scans > MAX_SCANNED:
        return f"{scans} scans of {width} x {height} pixels are more than {MAX_SCANNED} in all"
    strip = max(height, width) > MAX_RATIO * min(height, width)
    return f"{width} x {height}: over {MAX_RATIO} times as long as wide" if strip else ""


def shrinking(pixels: int, least: int) -> int:
    """By how much an image's sides can be divided (1, 2, 4 or 8) with no fewer than `least` pixels left; 0: by 1."""
    return max(k for k in SHRINKS if k == 1 or (least and pixels >= least * k * k))


def shrunk(image: torch.Tensor, shrink: int) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, H / shrink, W / shrink), averaged."""
    if shrink == 1:
        return image
    size = [-(-side // shrink) for side in image.shape[1:]]
    small: torch.Tensor = functional.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
    return small


def to_tensor(data: bytes | NDArray[np.uint8], least: int = 0) -> torch.Tensor:
    """A sample's data as uint8 (3, H, W): file bytes are decoded, pixels (H, W) or (H, W, 3) rearranged.

    least: as in `decode`.
    """
    if isinstance(data, bytes):
        return decode(data, least)
    if data.dtype != np.uint8 or data.ndim not in (2, 3) or (data.ndim == 3 and data.shape[2] != 3):
        raise CorruptImage(f"pixels of type {data.dtype} and shape {data.shape} are not uint8 (H, W) or (H, W, 3)")
    return shrunk(_from_pixels(data), shrinking(data.shape[0] * data.shape[1], least))


def _plain_jpeg(data: bytes, least: int) -> torch.Tensor | None:
    """A JPEG file without fault, read by simplejpeg: the same pixels as the other ways', all by libjpeg-turbo, sooner.

    None for anything else, and where simplejpeg is not installed.
    """
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray", "RGB") or _refused(height, width, data.count(SCAN)):
            return None
        shrink = shrinking(height * width, least)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink))
    except ValueError:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _draft(image: Image.Image, shrink: int) -> torch.Tensor:
    image.draft("RGB", (image.width // shrink, image.height // shrink))
    return _from_pixels(np.asarray(image.convert("RGB")))


def _decode_jpeg(data: bytes) -> torch.Tensor:
    """The same pixels as Pillow's (both call libjpeg-turbo) at about 1.4 times the speed."""
    image: torch.Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


def _from_pixels(pixels: NDArray[np.uint8]) -> torch.Tensor:
    grey = pixels.ndim == 2
    image = torch.from_numpy(pixels.copy())
    return image.expand(3, -1, -1) if grey else image.permute(2, 0, 1)
