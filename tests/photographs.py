"""Photographs for tests and measurements: parts of the two that scikit-learn brings, always the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from core.data.fingerprint import fingerprint
from core.data.source import Raw, Source
from tests.core.data.images import encode

Size = tuple[int, int]


def photographs(count: int, size: Size = (375, 500)) -> list[Image.Image]:
    """Each with its own part of a photograph, at height and width `size`; every third one upright."""
    originals = [Image.fromarray(image) for image in load_sample_images().images]
    draw = np.random.default_rng(7)
    found = []
    for k in range(count):
        image, wanted = originals[k % 2], size if k % 3 else size[::-1]
        scale = draw.uniform(0.7, 1.0) * min(image.width / wanted[1], image.height / wanted[0])
        height, width = (int(scale * side) for side in wanted)
        left, top = draw.integers(image.width - width + 1), draw.integers(image.height - height + 1)
        part = image.crop((left, top, left + width, top + height))
        found.append(part.resize(wanted[::-1], Image.Resampling.BICUBIC))
    return found


def files(images: Sequence[Image.Image], quality: int) -> list[bytes]:
    return [encode(image, quality=quality) for image in images]


class Repeated(Source):
    """The same few files again and again: a data set as long as wanted that costs no reading."""

    def __init__(self, data: Sequence[bytes], length: int) -> None:
        self.data, self.shard_sizes, self.classes = data, np.array([length]), []

    def read(self, i: int) -> Raw:
        return Raw(str(i), self.data[i % len(self.data)])

    def label(self, i: int) -> int:
        return -1

    def fingerprint(self) -> str:
        return fingerprint("photographs", *self.data, str(len(self)))
