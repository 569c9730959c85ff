"""An object of a store as a file that can be read anywhere in, with as much read ahead as pays."""

from __future__ import annotations

import io
from typing import Any

from core.folder import FileStore
from core.storage import Store

WINDOW = 8 << 20  # bytes of a request where what is wanted lies close together
PROBE, LOCAL_PROBE = 32 << 10, 4 << 10  # bytes of a request at least; of a file on this machine
JUMP = 2 << 20  # what a connection brings while a further request is under way (20 ms at 90 MB/s): skip no less


class RangedFile(io.RawIOBase):
    """`size` bytes under `key`.  One request for what is wanted, larger ones while it is read nearly in order."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size = store, key, size
        local = isinstance(store, FileStore)
        self._least, self._jump = (LOCAL_PROBE, 0) if local else (PROBE, JUMP)
        self._place = self._start = 0
        self._held = b""

    def at(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count), cut at the file's end."""
        if start >= self._size:
            return b""
        count = max(0, min(count, self._size - start))
        if start < self._start or start + count > self._start + len(self._held):
            near = 0 <= start - (self._start + len(self._held)) < self._jump
            ahead = min(WINDOW, 4 * len(self._held)) if near else 0  # grows, so that the first request is small
            size = min(max(count, self._least, ahead), self._size - start)
            self._held = self._store.get_range(self._key, start, size)
            self._start = start
        return self._held[start - self._start : start - self._start + count]

    def forget(self) -> None:
        """Hold nothing of what was read."""
        self._held = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self._place = place + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, count: int | None = -1) -> bytes:
        data = self.at(self._place, self._size if count is None or count < 0 else count)
        self._place += len(data)
        return data

    def readinto(self, into: Any) -> int:
        data = self.read(len(into))
        into[: len(data)] = data
        return len(data)
