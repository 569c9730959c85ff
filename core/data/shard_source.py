"""Reading indexed tar shards by sample number, from a folder, through the node's cache, or by ranged gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.data.files import Files
from core.data.fingerprint import fingerprint
from core.data.shards import ROW, SCHEMA
from core.data.source import DataError, Raw, Source
from core.folder import FileStore
from core.storage import AccessDenied, Store, crc32c

if TYPE_CHECKING:
    from core.cache import ShardCache

Rows = NDArray[np.void]
_KEPT_INDICES = 256


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    crc32c: int
    idx_crc32c: int

    def sizes(self) -> dict[str, int]:
        """Files of the shard and their bytes."""
        return {f"{self.name}.tar": self.bytes, f"{self.name}.idx": self.samples * ROW.itemsize}


class ShardSource(Source):
    """Samples of indexed tar shards.

    Files are read as core.data.files says.  Every sample is compared with its CRC32C.
    index: the parsed index.json.  Raises DataError when index and store differ.
    """

    run = 64

    def __init__(self, store: Store, index: dict[str, Any], cache: ShardCache | None = None) -> None:
        self._hold(store, _parse(index, store.uri), cache)
        self._check_sizes()
        self.classes = [str(name) for name in index["classes"]]
        self.licence = str(index.get("licence", ""))
        self.ahead = 0 if cache is None or isinstance(store, FileStore) else cache.ahead

    def _hold(self, store: Store, shards: list[Shard], cache: ShardCache | None) -> None:
        self._store, self._shards, self._cache, self._files = store, shards, cache, Files(store, cache)
        self.shard_sizes = np.array([shard.samples for shard in shards], np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self._keep()

    def read(self, i: int) -> Raw:
        shard, row = self._find(i)
        found = self._rows(shard)[row]
        data = self._checked(shard, row, int(found["offset"]), int(found["size"]), int(found["crc32c"]))
        return Raw(f"{self._shards[shard].name}.tar:{row}", data, int(found["label"]))

    def label(self, i: int) -> int:
        shard, row = self._find(i)
        return int(self._rows(shard)[row]["label"])

    def text(self, i: int) -> str:
        shard, row = self._find(i)
        found = self._rows(shard)[row]
        offset, size = int(found["offset"]) + int(found["text_gap"]), int(found["text_size"])
        return self._checked(shard, row, offset, size, int(found["text_crc32c"])).decode() if size else ""

    def fingerprint(self) -> str:
        """Of the checksums in the index."""
        entries = (f"{s.samples} {s.bytes} {s.crc32c} {s.idx_crc32c}" for s in self._shards)
        return fingerprint("shards", json.dumps(self.classes), *entries)

    def fetch(self, i: int) -> bool:
        if self._cache is None or not self.ahead:
            return False
        entry = self._shards[self._find(i)[0]]
        name = entry.name
        new = self._cache.fetch_ahead(self._store, f"{name}.idx", entry.sizes()[f"{name}.idx"], entry.idx_crc32c)
        return self._cache.fetch_ahead(self._store, f"{name}.tar", entry.bytes, entry.crc32c) or new

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, int(i - self._ends[shard] + self.shard_sizes[shard])

    def _checked(self, shard: int, row: int, offset: int, size: int, crc: int) -> bytes:
        """Bytes of a sample.  Raises DataError when they are not those that were indexed."""
        data = self._bytes(shard, offset, size)
        if len(data) != size or crc32c(data) != crc:
            raise DataError(
                f"{self._store.uri}/{self._shards[shard].name}.tar: sample {row} has changed since the shard was "
                "indexed (its CRC32C differs); bring back the shard that index.json belongs to, or write them again"
            )
        return data

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        entry = self._shards[shard]
        return self._files.read(f"{entry.name}.tar", entry.bytes, entry.crc32c, offset, size)

    def _index(self, entry: Shard) -> bytes:
        """Content of the shard's .idx file."""
        key, size = f"{entry.name}.idx", entry.samples * ROW.itemsize
        if self._cache is None or isinstance(self._store, FileStore):
            return self._store.get(key)
        return self._files.read(key, size, entry.idx_crc32c, 0, size)

    def _rows(self, shard: int) -> Rows:
        """(samples,) ROW of a shard."""
        return self._kept(shard)

    def _load_rows(self, shard: int) -> Rows:
        entry = self._shards[shard]
        where = f"{self._store.uri}/{entry.name}.idx"
        data = self._index(entry)
        if len(data) != entry.samples * ROW.itemsize or crc32c(data) != entry.idx_crc32c:
            raise DataError(f"{where}: does not match index.json; write the shards again")
        rows = np.frombuffer(data, ROW)
        texts = rows["offset"] + rows["text_gap"]
        spans = (rows["offset"], rows["size"]), (texts, rows["text_size"])
        outside = any((start < 0).any() or (start > entry.bytes - size.astype(np.int64)).any() for start, size in spans)
        if outside or (rows["label"] < -1).any():
            raise DataError(f"{where}: points outside of {entry.name}.tar; write the shards again")
        return rows

    def _check_sizes(self) -> None:
        try:
            found = {entry.key: entry.size for entry in self._store.list("shard-")}
        except AccessDenied:
            return  # no right to list: checksums tell of what differs when it is read
        wanted = {key: size for shard in self._shards for key, size in shard.sizes().items()}
        wrong = [f"{key} ({found.get(key, 'no')} bytes, not {n})" for key, n in wanted.items() if found.get(key) != n]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise DataError(f"{self._store.uri}: files do not match index.json: {shown}; write the shards again")

    def _keep(self) -> None:
        self._kept = lru_cache(_KEPT_INDICES)(self._load_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep()


def _parse(index: dict[str, Any], uri: str) -> list[Shard]:
    """The shards of an index.json.  Raises DataError."""
    if index.get("schema") != SCHEMA:
        raise DataError(f"{uri}/index.json: schema {index.get('schema')!r} instead of {SCHEMA}; write the shards again")
    try:
        shards = [Shard(**entry) for entry in index["shards"]]
        counts = [n for s in shards for n in (s.samples, s.bytes, s.crc32c, s.idx_crc32c)]
        sound = all(isinstance(n, int) and n >= 0 for n in counts) and isinstance(index["classes"], list)
        sound &= all(s.name == f"shard-{i:06d}" for i, s in enumerate(shards))
        sound &= 0 < sum(s.samples for s in shards) == index["samples"]
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{uri}/index.json: fields are missing or do not fit each other; write the shards again")
    return shards
