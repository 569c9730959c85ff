"""Other data sets made of given ones: a share of the classes, of each class's images, several together, one repeated.

The proxy data of Proteus, section 6 of its notes. Which samples are taken depends on the seed and the labels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.data.classes import numbered_as, same
from core.data.draws import permutation
from core.data.fingerprint import fingerprint
from core.data.mixture import MixtureOrder
from core.data.order import Order
from core.data.source import DataError, Raw, Source, open_source
from core.recipe import Data
from core.storage import resolve

if TYPE_CHECKING:
    from core.cache import ShardCache

Ints = NDArray[np.int64]
_CLASSES, _IMAGES = 10, 11  # what is being permuted


class Selected(Source):
    """Samples `index` of another source, in ascending order.

    index: (N,) strictly ascending.  Shards keep what is selected of them, so that reading stays as sequential.
    """

    def __init__(self, source: Source, index: Ints) -> None:
        self.source, self._index, self.classes = source, index, source.classes
        per_shard = np.diff(np.searchsorted(index, np.append(0, np.cumsum(source.shard_sizes))))
        self.shard_sizes, self.ahead, self.skipped = per_shard[per_shard > 0], source.ahead, source.skipped

    def read(self, i: int) -> Raw:
        return self.source.read(int(self._index[i]))

    def label(self, i: int) -> int:
        return self.source.label(int(self._index[i]))

    def text(self, i: int) -> str:
        return self.source.text(int(self._index[i]))

    def fingerprint(self) -> str:
        return fingerprint("selected", self.source.fingerprint(), self._index.astype("<i8").tobytes())

    def fetch(self, i: int) -> bool:
        return self.source.fetch(int(self._index[i]))


class Merged(Source):
    """Sources one after the other. Labels are lost unless all have the same classes."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.shard_sizes = np.concatenate([source.shard_sizes for source in sources])
        self._ends = np.cumsum([len(source) for source in sources])
        self.ahead = max(source.ahead for source in sources)
        self.skipped = [entry for source in sources for entry in source.skipped]
        self.classes = sources[0].classes if all(same(source, sources[0].classes) for source in sources) else []
        if self.classes:
            self.sources = [numbered_as(source, self.classes, ("data.merge", "data.source")) for source in sources]

    def _place(self, i: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self.sources[number], i - int(self._ends[number - 1] if number else 0)

    def read(self, i: int) -> Raw:
        source, own = self._place(i)
        raw = source.read(own)
        return raw if self.classes else Raw(f"{self.sources.index(source)}:{raw.key}", raw.data)

    def label(self, i: int) -> int:
        source, own = self._place(i)
        return source.label(own) if self.classes else -1

    def text(self, i: int) -> str:
        source, own = self._place(i)
        return source.text(own)

    def fingerprint(self) -> str:
        return fingerprint("merged", *(source.fingerprint() for source in self.sources))

    def fetch(self, i: int) -> bool:
        source, own = self._place(i)
        return source.fetch(own)


class Mixture(Merged):
    """Sources that have fixed shares of every epoch, of every stream of it, and so of every batch.

    weights: one above 0 for each source; only their ratios count.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        super().__init__(sources)
        self.weights = list(weights)

    def order(self, seed: int, streams: int, block: int) -> Order:
        return MixtureOrder([source.shard_sizes for source in self.sources], self.weights, seed, streams, block)


class Repeated(Source):
    """Another source again and again, up to `count` samples; each is a sample of its own, with draws of its own."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.classes, self.ahead, self.skipped = source, source.classes, source.ahead, source.skipped
        whole, rest = divmod(count, len(source))
        tiled = np.tile(source.shard_sizes, whole)
        ends = np.minimum(np.cumsum(source.shard_sizes), rest)
        last = np.diff(np.append(0, ends))
        self.shard_sizes = np.concatenate([tiled, last[last > 0]])

    def read(self, i: int) -> Raw:
        return self.source.read(i % len(self.source))

    def label(self, i: int) -> int:
        return self.source.label(i % len(self.source))

    def text(self, i: int) -> str:
        return self.source.text(i % len(self.source))

    def fingerprint(self) -> str:
        return fingerprint("repeated", self.source.fingerprint(), str(len(self)))

    def fetch(self, i: int) -> bool:
        return self.source.fetch(i % len(self.source))


def of_classes(source: Source, share: float, seed: int) -> Source:
    """All samples of round(share * classes) classes, at least one.  Raises DataError without labels."""
    labels = _labels(source, "data.classes")
    classes = np.unique(labels)
    kept = classes[permutation(len(classes), seed, _CLASSES)[: max(1, round(share * len(classes)))]]
    return Selected(source, np.flatnonzero(np.isin(labels, kept)))


def of_images(source: Source, share: float, seed: int) -> Source:
    """round(share * images) of each class, at least one.  Raises DataError without labels."""
    labels = _labels(source, "data.share")
    kept = []
    for label in np.unique(labels).tolist():
        own = np.flatnonzero(labels == label)
        kept.append(own[permutation(len(own), seed, _IMAGES, label)[: max(1, round(share * len(own)))]])
    return Selected(source, np.sort(np.concatenate(kept)))


def _labels(source: Source, field: str) -> Ints:
    labels = np.fromiter((source.label(i) for i in range(len(source))), np.int64, len(source))
    if (labels < 0).any():
        raise DataError(f"{field}: a share of it needs labels, and some images have none; use class folders")
    return labels


def composed_by(data: Data) -> str:
    """The first field that makes samples differ from the rows of `data.source`; empty if none does."""
    fields, plain = ("merge", "weights", "classes", "share", "samples", "repeats"), Data()
    return next((name for name in fields if getattr(data, name) != getattr(plain, name)), "")


def _cut(source: Source, data: Data, seed: int) -> Source:
    """Its share of the classes, and of their images."""
    source = source if data.classes == 1 else of_classes(source, data.classes, seed)
    return source if data.share == 1 else of_images(source, data.share, seed)


def compose(sources: Sequence[Source], data: Data, seed: int) -> Source:
    """The training set that `data` asks for, of its sources in order: merged, cut down, repeated.  Raises DataError.

    With weights, each source is cut down by itself, and mixed.
    """
    if data.weights:
        return Mixture([_cut(source, data, seed) for source in sources], data.weights)
    source = _cut(sources[0] if len(sources) == 1 else Merged(sources), data, seed)
    return source if data.samples <= len(source) else Repeated(source, data.samples)


def training_source(data: Data, seed: int, root: str, cache: ShardCache | None = None) -> Source:
    """The training images of a recipe; `root` is its store.  Raises DataError and core.storage.StoreError."""
    return compose([open_source(resolve(uri, root), cache) for uri in (data.source, *data.merge)], data, seed)
