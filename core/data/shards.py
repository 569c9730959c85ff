"""Indexed tar shards: files of some hundred megabytes that any webdataset reader understands, with random access.

PREFIX/shard-000000.tar  members KEY.EXT (the image file) and, where a sample has them, KEY.cls (its label in digits)
                         and KEY.txt (its text)
PREFIX/shard-000000.idx  one ROW a sample: where image and text lie in the tar, their CRC32C, and the label
PREFIX/index.json        {format, schema, classes, split, licence, samples, shards: [{name, samples, bytes, crc32c,
                         idx_crc32c}]}, and what `make shards` adds: how it was made and what was left out
Nothing is ever unpacked: images are read by offset, so names inside a tar have no power.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import google_crc32c
import numpy as np

from core.data.source import SHARD_FORMAT, DataError
from core.storage import Store, crc32c

SCHEMA = 2
SHARD_BYTES = 256 * 2**20
ROW = np.dtype(
    [
        ("offset", "<i8"), ("size", "<u4"), ("crc32c", "<u4"),  # of the image's bytes in the tar
        ("label", "<i4"),  # -1 without one
        ("text_gap", "<i4"), ("text_size", "<u4"), ("text_crc32c", "<u4"),  # the text begins a gap behind `offset`
    ]
)  # fmt: skip
_TAR_BLOCK = 512  # bytes


class Sample(NamedTuple):
    """What goes into a shard.  data: the image file's bytes.  label: -1 without one."""

    key: str
    data: bytes
    suffix: str
    label: int
    text: str = ""

    @property
    def stored(self) -> int:
        """Bytes in a tar, but for those of very long names."""
        sizes = [len(self.data)] + [1] * (self.label >= 0) + [len(self.text)] * bool(self.text)
        return sum(_TAR_BLOCK + _whole(size) for size in sizes)


def write_shards(
    samples: Iterable[tuple[str, bytes, str, int]], store: Store, prefix: str, shard_bytes: int, classes: list[str]
) -> dict[str, Any]:
    """Write samples (key, image file's bytes, suffix, label or -1) in the given order; returns the index.

    A shard is closed when it has reached `shard_bytes`.  The same samples give the same bytes.  index.json comes
    last, so that a write that was cut off leaves nothing that reads as a data set.  Raises DataError: no samples, a bad
    key or label.
    """
    target = store.sub(prefix) if prefix else store
    full = batched((Sample(*sample) for sample in samples), shard_bytes)
    return write_index(target, [write_shard(target, i, batch, classes) for i, batch in enumerate(full)], classes)


class Stored(Protocol):
    @property
    def stored(self) -> int: ...


Some = TypeVar("Some", bound=Stored)


def batched(samples: Iterable[Some], shard_bytes: int) -> Iterator[list[Some]]:
    """Samples by shard: each has reached `shard_bytes`, but for the last."""
    batch, size = list[Some](), 0
    for sample in samples:
        batch.append(sample)
        size += sample.stored
        if size >= shard_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_index(store: Store, shards: list[dict[str, Any]], classes: list[str], **facts: Any) -> dict[str, Any]:
    """Publish the data set that `shards` are; returns its index.  Raises DataError without any."""
    if not shards:
        raise DataError(f"{store.uri}: no samples to write; check the source of the shards")
    total = sum(shard["samples"] for shard in shards)
    index = {"format": SHARD_FORMAT, "schema": SCHEMA, "classes": classes, "split": "", "licence": ""} | facts
    index |= {"samples": total, "shards": shards}
    store.put("index.json", json.dumps(index, indent=1).encode())
    return index


def write_shard(store: Store, number: int, samples: Iterable[Sample], classes: list[str]) -> dict[str, Any]:
    """Write one shard; returns its entry for the index.  Raises DataError for a bad key or label."""
    name = f"shard-{number:06d}"
    with tempfile.TemporaryDirectory() as folder:
        tar = _Tar(Path(folder) / "tar")
        for sample in samples:
            if not -1 <= sample.label < max(len(classes), 1):
                classed = f"neither -1 nor one of {len(classes)} classes"
                raise DataError(f"sample {sample.key!r}: label {sample.label} is {classed}")
            tar.add(sample)
        tar.close()
        rows = np.array(tar.rows, ROW).tobytes()
        store.put(f"{name}.idx", rows)  # first: a tar alone would pass for one of another tool's
        store.put_file(f"{name}.tar", tar.path)
    crc = int.from_bytes(tar.checksum.digest(), "big")
    return {"name": name, "samples": len(tar.rows), "bytes": tar.size, "crc32c": crc, "idx_crc32c": crc32c(rows)}


@dataclass
class _Tar:
    """A tar in the making, on local disk."""

    path: Path
    rows: list[tuple[int, ...]] = field(default_factory=list)
    size: int = 0  # bytes so far
    file: BinaryIO = field(init=False)
    checksum: Any = field(default_factory=google_crc32c.Checksum)

    def __post_init__(self) -> None:
        self.file = self.path.open("wb")

    def add(self, sample: Sample) -> None:
        member, data, text = _member(sample.key), sample.data, sample.text.encode()
        offset = self._write_member(f"{member}.{sample.suffix.removeprefix('.').lower()}", data)
        if sample.label >= 0:
            self._write_member(f"{member}.cls", str(sample.label).encode())
        gap = self._write_member(f"{member}.txt", text) - offset if text else 0
        self.rows.append((offset, len(data), crc32c(data), sample.label, gap, len(text), crc32c(text)))

    def close(self) -> None:
        self._write(b"\0" * 2 * _TAR_BLOCK)
        self.file.close()

    def _write_member(self, name: str, data: bytes) -> int:
        """Returns the offset of the data.  Owner, mode and time are TarInfo's constants."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self.size
        self._write(data)
        self._write(b"\0" * (_whole(len(data)) - len(data)))
        return offset

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.checksum.update(data)
        self.size += len(data)


def _whole(size: int) -> int:
    """Bytes of the tar's blocks that hold so many."""
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK


def _member(key: str) -> str:
    """A name that webdataset splits where we do: it takes the first dot for the start of the suffix."""
    if not key or key.startswith("/") or "\0" in key:
        raise DataError(f"sample key {key!r}: give a relative path such as n01440764/n01440764_18")
    return key.replace("%", "%25").replace(".", "%2E")
