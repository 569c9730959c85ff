"""Ranges of large files: from a folder, from a bucket through the node's cache, or by ranged gets."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

from core.data.source import DataError
from core.folder import FileStore
from core.storage import ABSENT, Store, local_errors

if TYPE_CHECKING:
    from core.cache import ShardCache

_OPEN_FILES = 16  # per process; a file that is open keeps its disk space, even when the cache has dropped it
_FETCHES = 5


class Files:
    """Files of known size and CRC32C below a store.  For any number of threads; can be pickled and survives a fork.

    Those in a folder are read where they lie.  Others are fetched whole into `cache` when first touched; without a
    cache, every range is one ranged get.
    """

    def __init__(self, store: Store, cache: ShardCache | None) -> None:
        self.store, self._cache = store, cache
        self._keep()

    def read(self, key: str, size: int, crc: int, start: int, count: int) -> bytes:
        """`count` bytes of a file of `size` bytes.  Raises StoreError, DataError."""
        if self._cache is None and not isinstance(self.store, FileStore):
            return self.store.get_range(key, start, count)
        file = self._file(key, size, crc)  # held while it is read: other threads may let go of it, and it would close
        return os.pread(file.fileno(), count, start)

    def _opened(self, key: str, size: int, crc: int) -> BinaryIO:
        with local_errors(f"{self.store.uri}/{key}", *ABSENT):
            if isinstance(self.store, FileStore):
                return (self.store.root / key).open("rb", buffering=0)
            assert self._cache is not None
            for _ in range(_FETCHES):
                with suppress(FileNotFoundError):  # another process has made room for its own file
                    return self._cache.fetch(self.store, key, size, crc).open("rb", buffering=0)
        raise DataError(f"{self._cache.folder}: files are dropped before they can be opened; raise loader.cache_gb")

    def _keep(self) -> None:
        """What was opened stays open, so that a cache may drop the file while it is being read."""
        self._file = lru_cache(_OPEN_FILES)(self._opened)

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep()
