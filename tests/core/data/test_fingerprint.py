"""Every source names its data: the same wherever they lie, another one for other data, labels or selections."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np

from core.data.fingerprint import fingerprint
from core.data.shards import write_shards
from core.data.source import ArraySource, Source, open_source
from core.data.subset import Merged, Repeated, Selected
from core.data.tsv import write_index
from core.folder import FileStore
from tests.core.data.images import jpeg


def folder(root: Path, **files: bytes) -> Source:
    for name, data in files.items():
        FileStore(root).put(f"{name}.jpg", data)
    return open_source(f"file://{root}")


def shards(root: Path, labels: list[int], classes: list[str]) -> Source:
    write_shards(
        ((f"k{i}", jpeg(i), "jpg", label) for i, label in enumerate(labels)), FileStore(root), "", 900, classes
    )
    return open_source(f"file://{root}")


def table(root: Path, name: str, *payloads: bytes) -> Source:
    rows = [f"k{i}\t{base64.b64encode(payload).decode()}\n" for i, payload in enumerate(payloads)]
    FileStore(root).put(f"{name}.tsv", "".join(rows).encode())
    write_index(FileStore(root), f"{name}.tsv")
    return open_source(f"file://{root}")


def all_different(*sources: Source) -> bool:
    names = [source.fingerprint() for source in sources]
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in names)
    return len(set(names)) == len(names)


def test_where_one_part_ends_counts() -> None:
    assert fingerprint("x", "ab", "c") != fingerprint("x", "a", "bc") != fingerprint("x", "abc")
    assert fingerprint("x", b"ab") == fingerprint("x", "ab")


def test_a_folder_is_named_by_its_files_and_their_sizes(tmp_path: Path) -> None:
    first = folder(tmp_path / "1", a=b"1", b=b"22")
    assert folder(tmp_path / "elsewhere", a=b"1", b=b"22").fingerprint() == first.fingerprint()
    assert all_different(
        first,
        folder(tmp_path / "2", a=b"1", c=b"22"),
        folder(tmp_path / "3", a=b"1", b=b"333"),
        folder(tmp_path / "4", a=b"1"),
    )


def test_shards_are_named_by_their_checksums_and_classes(tmp_path: Path) -> None:
    first = shards(tmp_path / "1", [0, 1], ["a", "b"])
    assert shards(tmp_path / "elsewhere", [0, 1], ["a", "b"]).fingerprint() == first.fingerprint()
    assert all_different(
        first,
        shards(tmp_path / "2", [1, 1], ["a", "b"]),
        shards(tmp_path / "3", [0, 1], ["a", "c"]),
        shards(tmp_path / "4", [0, 1, 0], ["a", "b"]),
    )


def test_tables_are_named_by_their_rows(tmp_path: Path) -> None:
    first = table(tmp_path / "1", "image_1", b"one", b"three")
    assert table(tmp_path / "elsewhere", "image_1", b"one", b"three").fingerprint() == first.fingerprint()
    assert all_different(
        first,
        table(tmp_path / "2", "image_2", b"one", b"three"),
        table(tmp_path / "3", "image_1", b"one", b"threefour"),
        table(tmp_path / "1", "image_2", b"one"),
    )


def test_arrays_are_named_by_pixels_shapes_labels_and_classes() -> None:
    zeros, ones = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    assert ArraySource(list(zeros), [0, 0]).fingerprint() == ArraySource(zeros, [0, 0]).fingerprint()
    assert all_different(
        ArraySource(zeros, [0, 0]),
        ArraySource(ones, [0, 0]),
        ArraySource(zeros.reshape(2, 3, 2), [0, 0]),
        ArraySource(zeros, [0, 1]),
        ArraySource(zeros, [0, 0], ["a"]),
    )


def test_what_is_made_of_other_sources_is_named_by_them_and_the_choice() -> None:
    one, two = ArraySource(np.zeros((2, 2, 2), np.uint8)), ArraySource(np.ones((2, 2, 2), np.uint8))
    first = np.array([0])
    assert Selected(one, first).fingerprint() == Selected(one, first).fingerprint()
    assert all_different(
        one,
        Selected(one, first),
        Selected(one, first + 1),
        Selected(two, first),
        Merged([one, two]),
        Merged([two, one]),
        Repeated(one, 3),
        Repeated(one, 4),
    )
