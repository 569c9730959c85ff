"""Reading indexed tar shards by sample number, from a folder, through the node's cache, or by ranged gets."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.data.shards import ROW, SCHEMA
from core.data.source import DataError, Raw, Source
from core.storage import ABSENT, FileStore, Store, crc32c, local_errors

if TYPE_CHECKING:
    from core.cache import ShardCache

Ints = NDArray[np.int64]
Held = TypeVar("Held")
_OPEN_FILES = 16  # per process; a file that is open keeps its disk space, even when the cache has dropped it
_KEPT_INDICES = 256
_FETCHES = 5


@dataclass(frozen=True)
class _Entry:
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

    Shards in a folder are read where they lie.  Others are fetched whole into `cache` when first touched; without a
    cache, every sample is one ranged get.  index: the parsed index.json.  Raises DataError when index and store differ.
    """

    def __init__(self, store: Store, index: dict[str, Any], cache: ShardCache | None = None) -> None:
        self._store, self._cache = store, cache
        self._shards = _parse(index, store.uri)
        self._check_sizes()
        self.classes = [str(name) for name in index["classes"]]
        self.shard_sizes = np.array([shard.samples for shard in self._shards], np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self._forget()

    def read(self, i: int) -> Raw:
        shard, row = self._find(i)
        offset, size, label = (int(v) for v in self._rows(shard)[row])
        return Raw(f"{self._shards[shard].name}.tar:{row}", self._bytes(shard, offset, size), label)

    def label(self, i: int) -> int:
        shard, row = self._find(i)
        return int(self._rows(shard)[row, 2])

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, int(i - self._ends[shard] + self.shard_sizes[shard])

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if self._cache is None and not isinstance(self._store, FileStore):
            return self._store.get_range(f"{self._shards[shard].name}.tar", offset, size)
        return os.pread(self._file(shard).fileno(), size, offset)

    def _file(self, shard: int) -> BinaryIO:
        """The open tar.  Kept open, so that a cache may drop the file while it is being read."""
        if self._pid != os.getpid():
            self._forget()
        if shard not in self._files:
            self._files[shard] = self._open(self._shards[shard])
        return _latest(self._files, shard, _OPEN_FILES)

    def _open(self, entry: _Entry) -> BinaryIO:
        key = f"{entry.name}.tar"
        with local_errors(f"{self._store.uri}/{key}", *ABSENT):
            if isinstance(self._store, FileStore):
                return (self._store.root / key).open("rb", buffering=0)
            assert self._cache is not None
            for _ in range(_FETCHES):
                with suppress(FileNotFoundError):  # another process has made room for its own shard
                    return self._cache.fetch(self._store, key, entry.bytes, entry.crc32c).open("rb", buffering=0)
        raise DataError(f"{self._cache.folder}: shards are dropped before they can be opened; raise loader.cache_gb")

    def _rows(self, shard: int) -> Ints:
        if shard not in self._indices:
            self._indices[shard] = self._load_rows(self._shards[shard])
        return _latest(self._indices, shard, _KEPT_INDICES)

    def _load_rows(self, entry: _Entry) -> Ints:
        """(samples, 3) offset, size, label of a shard."""
        where = f"{self._store.uri}/{entry.name}.idx"
        data = self._store.get(f"{entry.name}.idx")
        if len(data) != entry.samples * ROW.itemsize or crc32c(data) != entry.idx_crc32c:
            raise DataError(f"{where}: does not match index.json; write the shards again")
        rows = np.frombuffer(data, ROW)["values"].astype(np.int64)
        offset, size, label = rows.T
        if (offset < 0).any() or (size < 0).any() or (offset > entry.bytes - size).any() or (label < -1).any():
            raise DataError(f"{where}: points outside of {entry.name}.tar; write the shards again")
        return rows

    def _check_sizes(self) -> None:
        found = {entry.key: entry.size for entry in self._store.list("shard-")}
        wanted = {key: size for shard in self._shards for key, size in shard.sizes().items()}
        wrong = [f"{key} ({found.get(key, 'no')} bytes, not {n})" for key, n in wanted.items() if found.get(key) != n]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise DataError(f"{self._store.uri}: files do not match index.json: {shown}; write the shards again")

    def _forget(self) -> None:
        """Start with no open file, in a new process."""
        self._pid = os.getpid()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._indices: OrderedDict[int, Ints] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pid", "_files", "_indices")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _latest(held: OrderedDict[int, Held], shard: int, limit: int) -> Held:
    """An entry, marked as just used; the one unused for longest goes (a file closes with its last reference)."""
    held.move_to_end(shard)
    if len(held) > limit:
        held.popitem(last=False)
    return held[shard]


def _parse(index: dict[str, Any], uri: str) -> list[_Entry]:
    """The shards of an index.json.  Raises DataError."""
    if index.get("schema") != SCHEMA:
        raise DataError(f"{uri}/index.json: schema {index.get('schema')!r} instead of {SCHEMA}; write the shards again")
    try:
        shards = [_Entry(**entry) for entry in index["shards"]]
        counts = [n for s in shards for n in (s.samples, s.bytes, s.crc32c, s.idx_crc32c)]
        sound = all(isinstance(n, int) and n >= 0 for n in counts) and isinstance(index["classes"], list)
        sound &= all(s.name == f"shard-{i:06d}" for i, s in enumerate(shards))
        sound &= 0 < sum(s.samples for s in shards) == index["samples"]
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{uri}/index.json: fields are missing or do not fit each other; write the shards again")
    return shards
