"""Indexed tar shards: files of some hundred megabytes that any webdataset reader understands, with random access.

PREFIX/shard-000000.tar  members KEY.EXT (the image file) and KEY.cls (its label in digits, if it has one)
PREFIX/shard-000000.idx  one row of three little-endian int64 a sample: offset and size of the image in the tar, label
PREFIX/index.json        {format, schema, classes, samples, shards: [{name, samples, bytes, crc32c, idx_crc32c}]}
Nothing is ever unpacked: images are read by offset, so names inside a tar have no power.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from core.data.source import SHARD_FORMAT, DataError
from core.storage import Store, crc32c

SCHEMA = 1
ROW = np.dtype([("values", "<i8", 3)])  # offset, size, label
_TAR_BLOCK = 512  # bytes


def write_shards(
    samples: Iterable[tuple[str, bytes, str, int]], store: Store, prefix: str, shard_bytes: int, classes: list[str]
) -> dict[str, Any]:
    """Write samples (key, image file's bytes, suffix, label or -1) in the given order; returns the index.

    A shard is closed when it has reached `shard_bytes`.  The same samples give the same bytes.  index.json comes
    last, so that a write that was cut off leaves nothing that reads as a data set.  Raises DataError: no samples, a bad
    key or label.
    """
    target = store.sub(prefix) if prefix else store
    shards: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        shard = _Shard(Path(folder) / "0.tar")
        for key, data, suffix, label in samples:
            if not -1 <= label < max(len(classes), 1):
                raise DataError(f"sample {key!r}: label {label} is neither -1 nor one of {len(classes)} classes")
            shard.add(_member(key), data, suffix.removeprefix(".").lower(), label)
            if shard.size >= shard_bytes:
                shards.append(shard.close(target, len(shards)))
                shard = _Shard(Path(folder) / f"{len(shards)}.tar")
        if shard.rows:
            shards.append(shard.close(target, len(shards)))
    if not shards:
        raise DataError(f"{target.uri}: no samples to write; check the source of the shards")
    total = sum(s["samples"] for s in shards)
    index = {"format": SHARD_FORMAT, "schema": SCHEMA, "classes": classes, "samples": total, "shards": shards}
    target.put("index.json", json.dumps(index, indent=1).encode())
    return index


@dataclass
class _Shard:
    """A tar in the making, on local disk."""

    path: Path
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    size: int = 0  # bytes so far
    file: BinaryIO = field(init=False)
    checksum: Any = field(default_factory=google_crc32c.Checksum)

    def __post_init__(self) -> None:
        self.file = self.path.open("wb")

    def add(self, member: str, data: bytes, suffix: str, label: int) -> None:
        offset = self._write_member(f"{member}.{suffix}", data)
        self.rows.append((offset, len(data), label))
        if label >= 0:
            self._write_member(f"{member}.cls", str(label).encode())

    def close(self, store: Store, number: int) -> dict[str, Any]:
        """Upload tar and index rows, drop the local file, return the shard's entry for index.json."""
        self._write(b"\0" * 2 * _TAR_BLOCK)
        self.file.close()
        rows = np.array(self.rows, "<i8").tobytes()
        name = f"shard-{number:06d}"
        store.put_file(f"{name}.tar", self.path)
        store.put(f"{name}.idx", rows)
        self.path.unlink()
        crc = int.from_bytes(self.checksum.digest(), "big")
        return {"name": name, "samples": len(self.rows), "bytes": self.size, "crc32c": crc, "idx_crc32c": crc32c(rows)}

    def _write_member(self, name: str, data: bytes) -> int:
        """Returns the offset of the data.  Owner, mode and time are TarInfo's constants."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self.size
        self._write(data)
        self._write(b"\0" * (-len(data) % _TAR_BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.checksum.update(data)
        self.size += len(data)


def _member(key: str) -> str:
    """A name that webdataset splits where we do: it takes the first dot for the start of the suffix."""
    if not key or key.startswith("/") or "\0" in key:
        raise DataError(f"sample key {key!r}: give a relative path such as n01440764/n01440764_18")
    return key.replace("%", "%25").replace(".", "%2E")
