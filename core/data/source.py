"""Where samples come from: a length and random access, whatever lies behind (folder, shards, arrays)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core import small_json
from core.data.fingerprint import fingerprint
from core.data.order import Order
from core.folder import FileStore
from core.storage import MissingObject, Store, open_store

if TYPE_CHECKING:
    from core.cache import ShardCache

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SHARD_FORMAT = "retort-shards"


class DataError(ValueError):
    """Data that cannot be used as asked. The message says what is wrong, where, and what to do next."""


class CorruptImage(DataError):  # noqa: N818 (says what it is)
    """One sample's bytes are not a readable image."""


@dataclass(frozen=True)
class Raw:
    """One undecoded sample. data: a file's bytes, or pixels as uint8 (H, W) or (H, W, 3). label: -1 without one."""

    key: str
    data: bytes | NDArray[np.uint8]
    label: int = -1


class Source(ABC):
    """Samples by number.  Can be pickled and survives a fork: handles are opened by the process that reads.

    shard_sizes: (shards,) int64, samples that are stored together, in index order; sums to the length.
    classes: names of the labels, empty without labels.
    run: samples in a row that are best read together.
    licence: a note that came with the data.  skipped: (name, reason) of what lies there and is no sample.
    ahead: shards that whoever reads in a known order should `fetch` before they are needed; 0 where reading needs none.
    """

    shard_sizes: NDArray[np.int64]
    classes: list[str]
    run = 1
    licence = ""
    skipped: Sequence[tuple[str, str]] = ()
    ahead = 0

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    @abstractmethod
    def read(self, i: int) -> Raw:
        """Sample `i`.  Raises core.storage.StoreError when the store fails."""

    @abstractmethod
    def label(self, i: int) -> int:
        """Label of sample `i` without reading its image; -1 without one."""

    def text(self, i: int) -> str:
        """What is said about sample `i`, as core.data.sentences reads it; empty without.  Raises DataError."""
        return ""

    @abstractmethod
    def fingerprint(self) -> str:
        """Names the data by what is known without reading all of it: 64 hexadecimal digits, wherever the data lie.

        Raises core.storage.StoreError.
        """

    def order(self, seed: int, streams: int, block: int) -> Order:
        """In which training reads the samples; an index beyond the length is a copy of the sample that it leaves."""
        return Order(self.shard_sizes, seed, streams, block)

    def fetch(self, i: int) -> bool:
        """Fetch the shard of sample `i` ahead of its reading; whether it was downloaded now.

        Raises core.cache.CacheFull where the node's cache holds nothing that could be dropped, and StoreError.
        """
        return False


class ArraySource(Source):
    """Images in memory.

    images: uint8 (N, H, W) or (N, H, W, 3), or a sequence of (H, W) or (H, W, 3) of any sizes.  labels: (N,) or None.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
        labels: NDArray[Any] | Sequence[int] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.images = images
        self.labels = np.full(len(images), -1) if labels is None else np.asarray(labels, np.int64)
        if len(self.labels) != len(images):
            raise DataError(f"arrays: {len(images)} images but {len(self.labels)} labels; give one label per image")
        self.classes = list(classes)
        self.shard_sizes = np.ones(len(images), np.int64)

    def read(self, i: int) -> Raw:
        return Raw(f"array:{i}", self.images[i], self.label(i))

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def fingerprint(self) -> str:
        arrays = (np.ascontiguousarray(image) for image in self.images)
        images = (fingerprint("image", str(image.shape), image.tobytes()) for image in arrays)
        return fingerprint("arrays", *self.classes, self.labels.astype("<i8").tobytes(), *images)


class FolderSource(Source):
    """Image files under a prefix of a store, at any depth, in key order; names that start with a dot are ignored.

    The first folder below the prefix is the class, classes are numbered in sorted order; a file outside of any folder
    has no label.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        seen = list(store.list())
        sizes = {entry.key: entry.size for entry in seen if is_image(entry.key)}
        keys = sorted(sizes)
        if not keys:
            raise DataError(
                f"{store.uri}: none of the {len(seen)} files found here is an image ({', '.join(SUFFIXES)}) and there "
                "is no index.json of shards; give a folder of images (class folders are optional) or write shards here "
                "(the hub's parquet files become shards by make shards)"
            )
        folders = [key.partition("/")[0] if "/" in key else "" for key in keys]
        self.classes = sorted(set(folders) - {""})
        number = {name: i for i, name in enumerate(self.classes)}
        self._labels = np.array([number.get(folder, -1) for folder in folders], np.int32)
        # One blob instead of a million strings: forked workers would copy every string's page as they count references.
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        self._keys = b"".join(encoded)
        self._ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        self._sizes = np.array([sizes[key] for key in keys], np.int64)
        self.shard_sizes = np.ones(len(keys), np.int64)

    def read(self, i: int) -> Raw:
        key = self._key(i)
        try:
            return Raw(key, self._store.get(key), self.label(i))
        except MissingObject:
            return Raw(key, b"", self.label(i))  # deleted since it was listed: as unreadable as an empty file

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def fingerprint(self) -> str:
        """Of the sorted names and their sizes."""
        return fingerprint(
            "folder", self._keys, self._ends.astype("<i8").tobytes(), self._sizes.astype("<i8").tobytes()
        )

    def _key(self, i: int) -> str:
        start = int(self._ends[i - 1]) if i else 0
        return self._keys[start : int(self._ends[i])].decode("utf-8", "surrogateescape")


def open_source(uri: str, cache: ShardCache | None = None) -> Source:
    """The samples at a resolved URI (file:///x or s3://bucket/x).

    Indexed shards, the tables that an image.list names, a folder of images; where there is no image file, tars of
    webdataset's kind, else tables by their names.
    cache: node-local cache of shards that are not on this machine; without one they are read by ranged gets.
    Raises DataError (nothing usable there) and core.storage.StoreError.
    """
    from core.data.shard_source import ShardSource  # which build on this file
    from core.data.tar_source import TarSource, find_tars
    from core.data.tsv_source import LIST, open_tsv_source

    store = open_store(uri)
    if isinstance(store, FileStore) and not store.root.is_dir():
        raise DataError(f"{uri}: no such folder; give the absolute path of a folder as file:///path/to/images")
    index = _shard_index(store)
    if index is not None:
        return ShardSource(store, index, cache)
    tables = open_tsv_source(store) if store.size(LIST) is not None else None
    try:
        return tables or FolderSource(store)
    except DataError:
        tars = find_tars(store)
        found = TarSource(store, tars) if tars else open_tsv_source(store)
        if found is None:
            raise
        return found


def _shard_index(store: Store) -> dict[str, Any] | None:
    """index.json when it is one of shards (people's image folders may hold another file of that name)."""
    try:
        index = small_json.read(store, "index.json", object, small_json.LARGE)
    except MissingObject:
        return None
    except small_json.Unreadable as error:
        why = f"{store.uri}/index.json: not valid JSON ({error.why})"
        raise DataError(f"{why}; write the shards again or remove it") from None
    return index if isinstance(index, dict) and index.get("format") == SHARD_FORMAT else None


def is_image(key: str) -> bool:
    # Buckets may hold keys with empty parts, which no store hands out.
    return key.lower().endswith(SUFFIXES) and not any(part[:1] in ("", ".") for part in key.split("/"))
