"""A data set rewritten once into indexed shards: shuffled, unreadable images left out, large ones made smaller."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.data.source import Raw, Source
    from core.storage import Store

SHARD_BYTES = 256 * 2**20
JPEG_QUALITY = 95
SUFFIX = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm",
}  # fmt: skip
Sample = tuple[str, bytes, str, int]  # key, bytes, suffix, label
SAY_EVERY_S, THREADS, WINDOW = 5.0, 8, 256
SEED = 0  # of the order of samples: shards of one class each could not be mixed again by shuffling blocks


@dataclass
class Reshard:
    """One rewriting.  short_side: pixels; larger images are resized to it, 0 keeps every file as it is."""

    source: Source
    short_side: int
    say: Callable[[str], None]
    bad: list[str] = field(default_factory=list)

    def write(self, store: Store) -> dict[str, Any]:
        """Write all readable samples under `store`; returns the index."""
        from core.data.shards import write_shards

        return write_shards(self.samples(), store, "", SHARD_BYTES, self.source.classes)

    def samples(self) -> Iterator[Sample]:
        """Readable samples in one fixed shuffled order."""
        import numpy as np

        order = np.random.default_rng(SEED).permutation(len(self.source))
        begun = said = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            for done in range(0, len(order), WINDOW):
                batch = order[done : done + WINDOW].tolist()
                for sample in pool.map(self._convert, batch):
                    if sample is not None:
                        yield sample
                if (now := time.monotonic()) - said > SAY_EVERY_S:
                    said, rate = now, (done + len(batch)) / (now - begun)
                    self.say(f"{done + len(batch)}/{len(order)} images, {rate:.0f} img/s")

    def _convert(self, i: int) -> Sample | None:
        from core.data.source import CorruptImage

        raw = self.source.read(i)
        try:
            data, suffix = converted(raw, self.short_side)
        except CorruptImage as reason:
            self.bad.append(f"{raw.key}: {reason}")
            return None
        return str(PurePosixPath(raw.key).with_suffix("")), data, suffix, raw.label


def converted(raw: Raw, short_side: int) -> tuple[bytes, str]:
    """A sample's file and its suffix: as it is, or as JPEG at the wanted size.  Raises CorruptImage."""
    from PIL import Image

    from core.data.decode import FORMATS, to_tensor

    pixels = to_tensor(raw.data)  # (3, H, W)
    height, width = pixels.shape[1:]
    scale = short_side / min(height, width) if short_side else 1.0
    if isinstance(raw.data, bytes) and scale >= 1:
        with Image.open(io.BytesIO(raw.data), formats=FORMATS) as file_image:
            return raw.data, SUFFIX[str(file_image.format)]
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if scale < 1:
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue(), "jpg"


def summary(index: dict[str, Any], bad: list[str], shown: int = 10) -> str:
    """What was written and what was left out."""
    size = sum(shard["bytes"] for shard in index["shards"])
    lines = [f"{index['samples']} images in {len(index['shards'])} shards, {size / 1e6:.1f} MB"]
    if bad:
        lines.append(f"{len(bad)} unreadable images left out:")
        lines += [f"  {reason}" for reason in itertools.islice(sorted(bad), shown)]
    return "\n".join(lines)
