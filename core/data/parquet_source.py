"""Images from parquet files of the hub's kind: an Image column, a ClassLabel, perhaps captions.

Rows are read by the row group: fit to go through in order, as rewriting does, not to be read in any order.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.data.fingerprint import fingerprint
from core.data.parquet_columns import find_columns, numbered, unified
from core.data.ranged_file import RangedFile
from core.data.source import DataError, Raw, Source
from core.storage import Entry, Store

_KEPT_GROUPS = 4  # row groups in memory
_FOOT = 8  # bytes behind a footer


class ParquetSource(Source):
    """Rows of parquet files, one behind the other; row groups are the shards.

    Raises DataError: a file that is no whole parquet file or has other columns, no images, labels that do not fit.
    """

    run = 256  # at most; the hub's row groups hold 100 images

    def __init__(self, store: Store, files: Sequence[Entry]) -> None:
        self._store, self._entries = store, list(files)
        self._forget()
        opened = [self._file(number) for number in range(len(files))]
        names = [self._where(number) for number in range(len(files))]
        self._columns = find_columns(unified([file.schema_arrow for file in opened], names), names[0])
        self.skipped = self._columns.unread
        self._groups = [(n, g) for n, file in enumerate(opened) for g in range(file.metadata.num_row_groups)]
        self._groups = [(n, g) for n, g in self._groups if opened[n].metadata.row_group(g).num_rows]
        self.shard_sizes = np.array([opened[n].metadata.row_group(g).num_rows for n, g in self._groups], np.int64)
        if not self._groups:
            raise DataError(f"{self._where(0)}: no rows")
        self._ends = np.cumsum(self.shard_sizes)
        if all(_without_bytes(opened[n].metadata.row_group(g), self._columns.image) for n, g in self._groups):
            cell = self._cell(0, self._columns.image)
            path = cell.get("path") if isinstance(cell, dict) else None
            raise DataError(
                f"{names[0]}: {self._columns.image} holds no bytes of files, at most their paths, such as {path!r}; "
                "give the folder of these files, or save the data set with the files embedded"
            )
        self._footers = [file.metadata.serialized_size for file in opened]
        self.licence = self._columns.licence
        self.classes, self._labels = self._all_labels()

    def read(self, i: int) -> Raw:
        cell = self._cell(i, self._columns.image)
        image = cell if isinstance(cell, dict) else {"bytes": cell}
        return Raw(image.get("path") or f"row-{i:09d}", image.get("bytes") or b"", self.label(i))

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def text(self, i: int) -> str:
        value = self._cell(i, self._columns.text) if self._columns.text else None
        return json.dumps({"captions": value}) if isinstance(value, list) else value or ""

    def fingerprint(self) -> str:
        """Of names, sizes and footers of the files, and the labels."""
        parts = [json.dumps(self.classes).encode(), self._labels.astype("<i8").tobytes()]
        for entry, size in zip(self._entries, self._footers, strict=True):
            parts += [f"{entry.key} {entry.size}".encode()]
            parts += [self._store.get_range(entry.key, entry.size - size - _FOOT, size + _FOOT)]
        return fingerprint("parquet", *parts)

    def _cell(self, i: int, column: str) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        group = int(np.searchsorted(self._ends, i, side="right"))
        row = int(i - self._ends[group] + self.shard_sizes[group])
        try:
            return self._group(group)[column][row].as_py()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._where(self._groups[group][0])}: {column} of row {i} is not UTF-8: {error}"
            ) from None

    def _group(self, group: int) -> pa.Table:
        """A row group's images and texts."""
        with self._lock:
            if self._pid != os.getpid():
                self._forget()
            if group not in self._held:
                number, own = self._groups[group]
                names = [name for name in (self._columns.image, self._columns.text) if name]
                with self._whole(number):
                    file = self._file(number)
                    self._files[number].at(*_extent(file.metadata.row_group(own), names))  # in one request
                    self._held[group] = file.read_row_group(own, names, use_threads=False)
            self._held.move_to_end(group)
            if len(self._held) > _KEPT_GROUPS:
                self._held.popitem(last=False)
            return self._held[group]

    def _all_labels(self) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int64]]]:
        name = self._columns.label
        if not name:
            return [], np.full(len(self), -1, np.int64)
        values = []
        for number in range(len(self._entries)):
            with self._whole(number):
                values += self._file(number).read([name])[name].to_pylist()
        return numbered(values, self._columns.classes, self._where(0))

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._opened:
            entry = self._entries[number]
            with self._whole(number):
                self._files[number] = RangedFile(self._store, entry.key, entry.size)
                self._opened[number] = pq.ParquetFile(pa.PythonFile(self._files[number], "r"), pre_buffer=False)
        return self._opened[number]

    @contextmanager
    def _whole(self, number: int) -> Iterator[None]:
        """Reading of a file, one of hundreds: nothing but its footer is held afterwards.  Raises DataError."""
        try:
            yield
            self._files[number].forget()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._where(number)}: {str(error).splitlines()[0]}: no whole parquet file; bring it again, or "
                "remove it"
            ) from None

    def _where(self, number: int) -> str:
        return f"{self._store.uri}/{self._entries[number].key}"

    def _forget(self) -> None:
        """Start with no open file, in a new process."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._opened: dict[int, pq.ParquetFile] = {}
        self._files: dict[int, RangedFile] = {}
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pid", "_lock", "_opened", "_files", "_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _without_bytes(group: pq.RowGroupMetaData, name: str) -> bool:
    """Whether the bytes of all images of a row group are null, as far as its statistics tell."""
    chunks = (group.column(i) for i in range(group.num_columns))
    found = [chunk.statistics for chunk in chunks if chunk.path_in_schema in (name, f"{name}.bytes")]
    return any(s is not None and s.has_null_count and s.null_count == group.num_rows for s in found)


def _extent(group: pq.RowGroupMetaData, names: Sequence[str]) -> tuple[int, int]:
    """Start and number of a row group's bytes from the first of these columns to the last."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names]
    starts = [min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in wanted]
    ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, wanted, strict=True)]
    return min(starts), max(ends) - min(starts)
