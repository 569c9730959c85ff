"""The samples of tars without an index, in one table; kept on this machine, so that its processes scan them once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core import small_json
from core.data.fingerprint import fingerprint
from core.data.shards import ROW
from core.data.source import DataError
from core.data.tar_scan import Found, scan_tar
from core.folder import FileStore
from core.private import locked, own_folder, private_folder
from core.storage import Entry, MissingObject, Store, local_errors

NAMES = "classes.txt"  # beside the tars: names of the labels 0, 1, ..., one a line
_SCANS_AT_ONCE = 8
_MOST_CLASSES = 1 << 20


@dataclass(frozen=True)
class TarTable:
    """samples: of each tar.  rows: (N,) ROW, but its checksums are of the headers before image and text.

    keys, key_ends: names of all samples one behind the other, and where each ends.  skipped: (name, reason).
    """

    samples: list[int]
    classes: list[str]
    skipped: list[tuple[str, str]]
    rows: NDArray[np.void]
    keys: bytes
    key_ends: NDArray[np.int64]

    def key(self, i: int) -> str:
        start = int(self.key_ends[i - 1]) if i else 0
        return self.keys[start : int(self.key_ends[i])].decode("utf-8", "surrogateescape")

    def pack(self) -> bytes:
        head = json.dumps({"samples": self.samples, "classes": self.classes, "skipped": self.skipped})
        return head.encode() + b"\n" + self.rows.tobytes() + self.key_ends.astype("<i8").tobytes() + self.keys

    @classmethod
    def unpack(cls, data: bytes) -> TarTable:
        end = data.index(b"\n") + 1
        head = small_json.parse(data[:end], dict, "the table of a scan", small_json.LARGE)
        count = sum(head["samples"])
        rows = np.frombuffer(data, ROW, count, end)
        key_ends = np.frombuffer(data, "<i8", count, end + rows.nbytes)
        skipped = [(str(name), str(reason)) for name, reason in head["skipped"]]
        return cls(
            head["samples"], head["classes"], skipped, rows, data[end + rows.nbytes + key_ends.nbytes :], key_ends
        )


def tar_table(store: Store, tars: Sequence[Entry], folder: Path | None = None) -> TarTable:
    """Scanned unless `folder` (else one of this user's own in the system's temporary directory) holds it already.

    A tar of another size or time is another one.  Raises DataError, StoreError.
    """
    names = _class_names(store)
    listing = "\n".join(f"{tar.key!r} {tar.size} {tar.modified}" for tar in tars)
    name = fingerprint("scan", store.uri, listing, *names)
    kept = FileStore(folder or own_folder("scans"))
    with local_errors(f"scans of tars, {kept.root}"):
        private_folder(kept.root)
    with locked(kept.root / f"{name}.lock"):
        try:
            return TarTable.unpack(kept.get(name))
        except MissingObject:
            table = _scan(store, tars, names)
            kept.put(name, table.pack())
            return table


def _scan(store: Store, tars: Sequence[Entry], names: list[str]) -> TarTable:
    with ThreadPoolExecutor(_SCANS_AT_ONCE) as pool:
        scans = list(pool.map(lambda tar: scan_tar(store, tar.key, tar.size), tars))
    found = [sample for scan in scans for sample in scan.samples]
    skipped = [
        (f"{tar.key}: {name}", reason) for tar, scan in zip(tars, scans, strict=True) for name, reason in scan.skipped
    ]
    if not found:
        why = f"; the first thing passed over: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{store.uri}: no sample with an image in {len(tars)} tars{why}")
    classes, labels = _classes(store, found, names)
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in found]
    rows = np.array([_row(sample, label) for sample, label in zip(found, labels, strict=True)], ROW)
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return TarTable([len(scan.samples) for scan in scans], classes, skipped, rows, b"".join(keys), ends)


def _row(sample: Found, label: int) -> tuple[int, ...]:
    image, text = sample.image, sample.text
    about = (text.offset - image.offset, text.size, text.header) if text else (0, 0, 0)
    return image.offset, image.size, image.header, label, *about


def _classes(store: Store, found: Sequence[Found], names: list[str]) -> tuple[list[str], list[int]]:
    """Names of the classes, and every sample's label as a number (-1 without one).  Raises DataError."""
    given = {sample.label for sample in found} - {None}
    words = sorted(label for label in given if isinstance(label, str))
    if words and len(words) < len(given):
        raise DataError(f"{store.uri}: some labels are numbers, others names such as {words[0]!r}; use one kind")
    highest = max((label for label in given if isinstance(label, int)), default=-1)
    if highest >= len(names or range(_MOST_CLASSES)):
        raise DataError(f"{store.uri}: label {highest} is beyond the {len(names) or _MOST_CLASSES} classes of {NAMES}; "
                        "correct the labels or the names")  # fmt: skip
    classes = words or (names or [str(i) for i in range(highest + 1)] if given else [])
    number = {name: i for i, name in enumerate(words)}
    return classes, [number[s.label] if isinstance(s.label, str) else -1 if s.label is None else s.label for s in found]


def _class_names(store: Store) -> list[str]:
    try:
        return store.get(NAMES).decode().splitlines()
    except MissingObject:
        return []
    except UnicodeDecodeError:
        raise DataError(f"{store.uri}/{NAMES}: not UTF-8 text; give one class name a line") from None
