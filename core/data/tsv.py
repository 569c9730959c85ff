"""Tables of pictures, features and sentences as text: one row a line, with an index of byte offsets beside it.

`x.tsv` holds rows of cells apart by TAB: a key, then a payload.  `x.lineidx` holds each row's byte offset, one decimal
a line.  `x.linelist`, where it is not empty, names the rows to expose.  Several tables one after the other are numbered
through; a feature belongs to the picture of the same number.
"""

from __future__ import annotations

import base64
import binascii
import os
import posixpath
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from core.data.fingerprint import fingerprint
from core.data.source import DataError
from core.folder import FileStore
from core.storage import ABSENT, MissingObject, Store, local_errors

Ints = NDArray[np.int64]
READ_BYTES = 1 << 24
# What a base name must hold for a table to be one of pictures or of sentences; it may be both.
IMAGE_NAMES = ("image-", "images_", "img", "image_", "_image", "-image")
TEXT_NAMES = ("text-", "caption", "text_", "_text", "-text")
ROLES = ("image", "image_feat", "text", "text_feat")


def route(files: Sequence[str], root: str) -> dict[str, list[str]]:
    """Role -> paths of its tables in order: `files` relative to `root` (absolute ones stay), sorted by whole path.

    The base name alone decides: `feat` makes it a table of features; a table that is neither is left out.
    """
    paths = sorted(posixpath.join(root, file) for file in files if file)
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for path in paths:
        name = posixpath.basename(path)
        suffix = "_feat" if "feat" in name else ""
        for role, marks in (("image", IMAGE_NAMES), ("text", TEXT_NAMES)):
            if any(mark in name for mark in marks):
                found[role + suffix].append(path)
    return found


def row_offsets(chunks: Iterator[bytes]) -> Ints:
    """Byte offsets of the rows of a table that comes in pieces: after every LF but a last one, and at 0."""
    starts, at = [np.zeros(1, np.int64)], 0
    for chunk in chunks:
        starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at + 1)
        at += len(chunk)
    offsets = np.concatenate(starts)
    return offsets[offsets < at]


def format_index(offsets: Ints) -> bytes:
    """Content of a `.lineidx` file."""
    return b"".join(b"%d\n" % offset for offset in offsets.tolist())


def write_index(store: Store, key: str) -> None:
    """Write the index of a table next to it; replaces one that does not match."""
    size = _size(store, key)
    chunks = (store.get_range(key, at, min(READ_BYTES, size - at)) for at in range(0, size, READ_BYTES))
    store.put(_beside(key, ".lineidx"), format_index(row_offsets(chunks)))


def _beside(key: str, suffix: str) -> str:
    return posixpath.splitext(key)[0] + suffix


def _size(store: Store, key: str) -> int:
    size = store.size(key)
    if size is None:
        raise DataError(f"{store.uri}/{key}: no such table")
    return size


def _numbers(store: Store, key: str) -> Ints | None:
    """Decimals of a file, one a line; None without the file.  Raises DataError for anything else."""
    try:
        lines = store.get(key).split()
    except MissingObject:
        return None
    try:
        return np.array(lines).astype(np.int64)
    except (ValueError, OverflowError):
        raise DataError(f"{store.uri}/{key}: holds something else than one decimal number a line") from None


class Table:
    """One table, read by row.  Can be pickled; files are opened by the process that reads.

    The index is checked against the table when it is opened (first, last, ascending) and with every row that is read:
    a row must follow a LF.  An index of character offsets, wrong after any non-ASCII row, is so found out.
    Raises DataError when the table or its index is not there, or when they do not match.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key, self.size = store, key, _size(store, key)
        self.index_key = _beside(key, ".lineidx")
        offsets = _numbers(store, self.index_key)
        if offsets is None:
            raise DataError(f"{store.uri}/{self.index_key}: missing; core.data.tsv.write_index makes it from the table")
        if len(offsets) and (offsets[0] != 0 or offsets[-1] >= self.size or (np.diff(offsets) <= 0).any()):
            raise self._mismatch("offsets do not ascend from 0 to the table's size")
        if not len(offsets) and self.size:
            raise self._mismatch(f"it is empty, the table has {self.size} bytes")
        self._ends = np.append(offsets, self.size)
        listed = _numbers(store, _beside(key, ".linelist"))
        self.rows = np.arange(len(offsets)) if listed is None or not len(listed) else np.sort(listed)
        if len(self.rows) and (self.rows[0] < 0 or self.rows[-1] >= len(offsets)):
            raise DataError(f"{store.uri}/{_beside(key, '.linelist')}: rows outside of the table's {len(offsets)}")

    def __len__(self) -> int:
        return len(self.rows)

    def cells(self, i: int) -> list[str]:
        """Cells of the i-th exposed row, without surrounding blanks."""
        row = int(self.rows[i])
        start, end = int(self._ends[row]), int(self._ends[row + 1])
        before = 1 if start else 0
        data = self._bytes(start - before, end - start + before)
        whole = data.endswith(b"\n") or end == self.size
        if (before and data[:1] != b"\n") or not whole or b"\n" in data[before:-1]:
            raise self._mismatch(f"bytes {start} to {end} are not one row")
        try:
            return [cell.strip() for cell in data[before:].decode("utf-8").split("\t")]
        except UnicodeDecodeError as error:
            raise DataError(f"{self.store.uri}/{self.key}: row {row} is not UTF-8 text: {error.reason}") from None

    def pair(self, i: int) -> tuple[str, str]:
        """Key and payload of the i-th exposed row."""
        cells = self.cells(i)
        if len(cells) < 2:
            raise DataError(f"{self.store.uri}/{self.key}: row {int(self.rows[i])} has no second column")
        return cells[0], cells[1]

    def fingerprint(self) -> str:
        """Of name, size, offsets and exposed rows."""
        numbers = (array.astype("<i8").tobytes() for array in (self._ends, self.rows))
        return fingerprint("table", self.key, *numbers)

    def _mismatch(self, what: str) -> DataError:
        return DataError(
            f"{self.store.uri}/{self.index_key}: does not match its table: {what}; core.data.tsv.write_index makes it "
            "again, counting bytes"
        )

    def _bytes(self, start: int, size: int) -> bytes:
        if not isinstance(self.store, FileStore):
            return self.store.get_range(self.key, start, size)
        file = self._file  # held while it is read
        return os.pread(file.fileno(), size, start)

    @cached_property
    def _file(self) -> BinaryIO:
        """The table in a folder."""
        assert isinstance(self.store, FileStore)
        with local_errors(f"{self.store.uri}/{self.key}", *ABSENT):
            return (self.store.root / self.key).open("rb", buffering=0)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}


class Tables:
    """Tables one after the other, as one. sizes: (tables,) int64, their exposed rows."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        self.sizes = np.array([len(table) for table in tables], np.int64)
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def pair(self, i: int) -> tuple[str, str]:
        """Key and payload of row `i` over all tables."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        table = int(np.searchsorted(self._ends, i, side="right"))
        return self.tables[table].pair(int(i - self._ends[table] + self.sizes[table]))

    def fingerprint(self) -> str:
        return fingerprint("tables", *(table.fingerprint() for table in self.tables))

    def __repr__(self) -> str:
        return ", ".join(f"{table.store.uri}/{table.key}" for table in self.tables)


def open_tables(store: Store, role: str) -> Tables | None:
    """The tables of a role in a folder: those that `<role>.list` names, else those whose names say so; None without.

    Raises DataError.
    """
    listed = _list_file(store, f"{role}.list")
    if listed is None:
        listed = route([entry.key for entry in store.list() if entry.key.endswith(".tsv")], "")[role]
    return Tables([_open(store, path) for path in listed]) if listed else None


def _list_file(store: Store, key: str) -> list[str] | None:
    try:
        return [line.strip() for line in store.get(key).decode().splitlines() if line.strip()]
    except MissingObject:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{store.uri}/{key}: not UTF-8 text; give one path of a table a line") from None


def _open(store: Store, path: str) -> Table:
    if not path.startswith("/"):
        return Table(store, path)
    if not isinstance(store, FileStore):
        raise DataError(f"{store.uri}: a list names {path}, a file of this machine; name tables of the bucket")
    return Table(FileStore(Path(posixpath.dirname(path))), posixpath.basename(path))


def from_base64(text: str, what: str) -> bytes:
    """Raises DataError when it is not base64 of the standard alphabet with padding."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{what}: the payload is not base64") from None


def feature(text: str, what: str) -> NDArray[np.float32]:
    """(D,) from base64 of little-endian float32.  what: names the row in a DataError."""
    data = from_base64(text, what)
    if not data or len(data) % 4:
        raise DataError(f"{what}: {len(data)} bytes are no row of float32 numbers")
    return np.frombuffer(data, "<f4").astype(np.float32)
