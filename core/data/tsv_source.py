"""Images from tables of base64-encoded picture files."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

from core.data.decode import CorruptImage, decode
from core.data.source import DataError, Raw, Source
from core.data.tsv import Tables, from_base64, open_tables
from core.storage import Store

LIST = "image.list"
PLACEHOLDER = (256, (122, 116, 104))  # side and colour of what released readers put in a broken picture's place


class TsvSource(Source):
    """Samples of the image tables in a folder, numbered through; they have no labels.

    A row whose payload is no picture counts as an unreadable sample: it is left out, reported and bounded by
    data.max_bad_share, and the next one comes with its own vector.
    """

    def __init__(self, tables: Tables) -> None:
        if not len(tables):
            raise DataError(f"{tables}: no rows")
        self.tables, self.classes = tables, list[str]()
        self.shard_sizes = tables.sizes

    def read(self, i: int) -> Raw:
        key, payload = self.tables.pair(i)
        try:
            return Raw(key, from_base64(payload, key))
        except DataError:
            return Raw(key, b"")

    def label(self, i: int) -> int:
        return -1

    def fingerprint(self) -> str:
        return self.tables.fingerprint()

    def picture(self, i: int) -> NDArray[np.uint8]:
        """(H, W, 3) as released readers have it: cut-off files as far as they go, a grey square for broken ones."""
        data = self.read(i).data
        assert isinstance(data, bytes)
        return lenient(data)


def open_tsv_source(store: Store) -> TsvSource | None:
    """The images of a folder with tables; None where it holds none.  Raises DataError."""
    tables = open_tables(store, "image")
    return None if tables is None else TsvSource(tables)


def lenient(data: bytes) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a picture file, whatever is wrong with it."""
    try:
        return _pixels(decode(data))
    except CorruptImage:
        pass
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:  # bad bytes make decoders raise anything
        side, colour = PLACEHOLDER
        return np.tile(np.array(colour, np.uint8), (side, side, 1))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _pixels(image: torch.Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = image.permute(1, 2, 0).numpy()
    return pixels
