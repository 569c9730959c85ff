"""Small real image files for the data tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 (height, width, 3): a smooth random picture, so that JPEG keeps it roughly."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, height: int = 24, width: int = 32) -> bytes:
    return encode(pixels(seed, height, width), quality=90)
