"""Images from tars of webdataset's kind that have no index: scanned once, then read by sample number."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from core.data.fingerprint import fingerprint
from core.data.shard_source import Rows, Shard, ShardSource
from core.data.source import DataError, Raw
from core.data.tar_scan import BLOCK
from core.data.tar_table import tar_table
from core.storage import Entry, Store, crc32c

PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def find_tars(store: Store) -> list[Entry]:
    """All tars there.  Raises DataError when they are indexed shards whose writing has not finished."""
    seen = list(store.list())
    tars = [entry for entry in seen if entry.key.endswith(".tar")]
    if any(re.fullmatch(r"shard-\d{6}\.idx", entry.key) for entry in seen):  # other tools' tars have *.idx too
        raise DataError(
            f"{store.uri}: shards, but no index.json: their writing has not finished; give the command that began "
            "them again, or remove them"
        )
    return tars


def _packed(store: Store) -> list[tuple[str, str]]:
    """Tars that are compressed, in which no sample can be found by its place."""
    why = "a compressed tar cannot be read by the sample: unpack it, or compress it no more"
    return [(entry.key, why) for entry in store.list() if entry.key.lower().endswith(PACKED)]


class TarSource(ShardSource):
    """Samples of the tars in a folder or below a prefix.

    Every read is one ranged get of header and image; the header must be the one that was scanned.
    Raises DataError: no sample, labels that do not fit each other, a tar that is cut short.
    """

    def __init__(self, store: Store, tars: Sequence[Entry]) -> None:
        self._table = table = tar_table(store, tars)
        self.classes, self.skipped = table.classes, [*_packed(store), *table.skipped]
        kept = [(tar, samples) for tar, samples in zip(tars, table.samples, strict=True) if samples]
        shards = [Shard(tar.key.removesuffix(".tar"), samples, tar.size, 0, 0) for tar, samples in kept]
        self._hold(store, shards, cache=None)

    def read(self, i: int) -> Raw:
        shard, row = self._find(i)
        found = self._rows(shard)[row]
        offset, size, header = (int(found[name]) for name in ("offset", "size", "crc32c"))
        return Raw(self._table.key(i), self._behind_header(shard, row, offset, size, header), int(found["label"]))

    def text(self, i: int) -> str:
        shard, row = self._find(i)
        found = self._rows(shard)[row]
        offset, size, header = (int(found[name]) for name in ("text_gap", "text_size", "text_crc32c"))
        if not size:
            return ""
        try:
            return self._behind_header(shard, row, int(found["offset"]) + offset, size, header).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name(shard)}: the text of {self._table.key(i)!r} is not UTF-8: {error}") from None

    def fingerprint(self) -> str:
        """Of names, sizes, labels and headers of all members that samples are made of."""
        shards = (f"{shard.name} {shard.bytes} {shard.samples}" for shard in self._shards)
        return fingerprint("tars", json.dumps(self.classes), self._table.keys, self._table.rows.tobytes(), *shards)

    def _name(self, shard: int) -> str:
        return f"{self._store.uri}/{self._shards[shard].name}.tar"

    def _behind_header(self, shard: int, row: int, offset: int, size: int, header: int) -> bytes:
        data = self._bytes(shard, offset - BLOCK, BLOCK + size)
        if len(data) != BLOCK + size or crc32c(data[:BLOCK]) != header:
            raise DataError(f"{self._name(shard)}: sample {row} is not where it was found; the tar has changed since: "
                            "start again")  # fmt: skip
        return data[BLOCK:]

    def _rows(self, shard: int) -> Rows:
        end = int(self._ends[shard])
        return self._table.rows[end - int(self.shard_sizes[shard]) : end]
