"""A folder that keeps what a store holds while the store is not there."""

from __future__ import annotations

from core.storage import Entry, Store, crc32c


class Mirror:
    """The folder may hold files of others too, or links: it gives up only what it brought itself and nobody changed."""

    def __init__(self, folder: Store, store: Store) -> None:
        self._folder, self._store = folder.confined(), store
        self._brought: dict[str, tuple[Entry, int]] = {}  # with the checksum

    def load(self) -> int:
        """Put into the store what the folder holds; how many objects that were."""
        for entry in self._folder.list():
            data = self._folder.get(entry.key)
            self._store.put(entry.key, data)
            self._brought[entry.key] = entry, crc32c(data)
        return len(self._brought)

    def save(self) -> None:
        """Bring the folder in line with the store."""
        here = {entry.key for entry in self._store.list()}
        for key in here:
            data = self._store.get(key)
            if key not in self._brought or self._brought[key][1] != crc32c(data):
                self._folder.put(key, data)
        there = {entry.key: entry for entry in self._folder.list()}
        gone = [key for key, (entry, _) in self._brought.items() if key not in here and there.get(key) == entry]
        self._folder.delete(*gone)
