"""One sample on its way from a source into a shard: read, checked by decoding it, made smaller where asked."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from core.data.decode import FORMATS, to_tensor
from core.data.shards import Sample
from core.data.source import SUFFIXES, CorruptImage, DataError, Raw, Source

SUFFIX = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm",
    "AVIF": "avif",
}  # fmt: skip
LONGEST = 65500  # side of a JPEG that libjpeg writes
_READERS = 4  # threads of a worker: one waits for the store while others decode


@dataclass(frozen=True)
class Outcome:
    """What became of a sample.

    digest: of the content it came with.  problem: why there is no sample, or no text.  black: every pixel is.
    """

    key: str
    digest: str
    sample: Sample | None = None
    problem: str = ""
    black: bool = False

    @property
    def stored(self) -> int:
        return self.sample.stored if self.sample else 0


@dataclass(frozen=True)
class Converter:
    """short: pixels; larger images are resized to this short side, 0 keeps every file as it is.  quality: of JPEG."""

    source: Source
    short: int
    quality: int

    def __call__(self, index: Sequence[int]) -> list[Outcome]:
        """Outcomes of some samples, in their order.  Raises core.storage.StoreError."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._convert, index))

    def _convert(self, i: int) -> Outcome:
        raw = self.source.read(i)
        digest = _digest(raw.data)
        try:
            data, suffix, black = converted(raw, self.short, self.quality)
        except CorruptImage as reason:
            return Outcome(raw.key, digest, problem=str(reason))
        try:
            text, problem = self.source.text(i), ""
        except DataError as error:
            text, problem = "", str(error)
        return Outcome(raw.key, digest, Sample(_key(raw.key, i), data, suffix, raw.label, text), problem, black)


def converted(raw: Raw, short: int, quality: int) -> tuple[bytes, str, bool]:
    """A sample's file as it is or as JPEG at the wanted size, its suffix, whether it is black.  Raises CorruptImage."""
    pixels = to_tensor(raw.data)  # (3, H, W)
    black = not pixels.any()
    height, width = pixels.shape[1:]
    scale = short / min(height, width) if short else 1.0
    if isinstance(raw.data, bytes) and scale >= 1:
        with Image.open(io.BytesIO(raw.data), formats=FORMATS) as file_image:
            return raw.data, SUFFIX[str(file_image.format)], black
    if scale < 1:  # within 2 of 255 of Pillow's resize, in a quarter of its time
        size = (round(height * scale), round(width * scale))
        if max(size) > LONGEST:
            raise CorruptImage(f"{width} x {height} with {short} pixels across is longer than the {LONGEST} of a JPEG")
        pixels = interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue(), "jpg", black


def _key(name: str, i: int) -> str:
    """What a sample is called in a tar: its name without the suffix of images."""
    path = PurePosixPath(name.replace("\0", "").lstrip("/") or f"sample-{i}")
    return str(path.with_suffix("") if path.suffix.lower() in SUFFIXES else path)


def _digest(data: bytes | NDArray[np.uint8]) -> str:
    content = data if isinstance(data, bytes) else str(data.shape).encode() + data.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
