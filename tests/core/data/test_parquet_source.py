"""The hub's parquet files: which columns count, what their labels mean, and that they are read by the row group."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data.originals import open_original
from core.data.parquet_source import ParquetSource
from core.data.ranged_file import JUMP, LOCAL_PROBE
from core.data.sentences import sentence
from core.data.source import DataError, Source, passed_over
from core.folder import FileStore
from tests.core.data.images import jpeg

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def write(
    path: Path, columns: dict[str, Any], types: dict[str, pa.DataType], info: dict[str, Any] | None = None
) -> None:
    notes = {"huggingface": json.dumps({"info": info})} if info else None
    schema = pa.schema(list(types.items()), metadata=notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=3)


def pictures(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": jpeg(i), "path": f"{i}.JPEG"} for i in range(first, first + count)]


def published(root: Path, split: str = "train", count: int = 7) -> Source:
    """Two files as the hub's library writes them."""
    types = {"image": IMAGE, "label": pa.int64()}
    for number in range(2):
        columns = {"image": pictures(count, number * count), "label": [(i + number) % 2 for i in range(count)]}
        info = {"features": NAMES, "license": "cc-by-4.0"}
        write(root / f"data/{split}-0000{number}-of-00002.parquet", columns, types, info)
    return open_original(f"file://{root}")


def test_rows_of_all_files_are_samples_with_the_names_of_their_classes(tmp_path: Path) -> None:
    source = published(tmp_path)
    assert isinstance(source, ParquetSource)
    assert source.shard_sizes.tolist() == [3, 3, 1, 3, 3, 1]
    assert (source.classes, source.licence) == (["cat", "dog"], "cc-by-4.0")
    assert [source.read(i).data for i in range(14)] == [jpeg(i) for i in range(14)]
    assert [source.read(i).key for i in (0, 13)] == ["0.JPEG", "13.JPEG"]
    assert [source.label(i) for i in range(14)] == [source.read(i).label for i in range(14)]
    assert [source.label(i) for i in (0, 1, 7, 8)] == [0, 1, 1, 0]
    assert pickle.loads(pickle.dumps(source)).read(9).data == jpeg(9)
    with pytest.raises(IndexError):
        source.read(14)


def test_other_columns_are_found_by_name_and_type(tmp_path: Path) -> None:
    types = {"id": pa.string(), "jpg": pa.binary(), "cls": pa.string(), "captions": pa.list_(pa.string())}
    columns = {"id": ["x", "y"], "jpg": [jpeg(0), None], "cls": ["dog", "ant"], "captions": [["one", "two"], None]}
    write(tmp_path / "a.parquet", columns, types)
    source = open_original(f"file://{tmp_path}/a.parquet")
    assert source.classes == ["ant", "dog"]
    assert [source.label(i) for i in range(2)] == [1, 0]
    assert [source.read(i).data for i in range(2)] == [jpeg(0), b""]
    assert sentence(source.text(0), 0.9) == "two"
    assert source.text(1) == ""


def test_labels_of_a_dictionary_are_labels(tmp_path: Path) -> None:
    types = {"image": IMAGE, "label": pa.dictionary(pa.int32(), pa.string())}
    write(tmp_path / "a.parquet", {"image": pictures(3), "label": ["dog", "cat", "dog"]}, types)
    source = open_original(f"file://{tmp_path}")
    assert (source.classes, [source.label(i) for i in range(3)]) == (["cat", "dog"], [1, 0, 1])


def test_missing_labels_and_texts_are_allowed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": pictures(2), "label": [None, -1], "text": ["a", None]},
          {"image": IMAGE, "label": pa.int64(), "text": pa.string()})  # fmt: skip
    source = open_original(f"file://{tmp_path}")
    assert [source.label(i) for i in range(2)] == [-1, -1]
    assert [source.text(i) for i in range(2)] == ["a", ""]


def test_whole_floats_are_labels_and_others_are_refused(tmp_path: Path) -> None:
    types = {"image": IMAGE, "label": pa.float64()}
    write(tmp_path / "a.parquet", {"image": pictures(4), "label": [None, 1.0, float("nan"), 0.0]}, types)
    source = open_original(f"file://{tmp_path}")
    assert (source.classes, [source.label(i) for i in range(4)]) == (["0", "1"], [-1, 1, -1, 0])
    write(tmp_path / "a.parquet", {"image": pictures(2), "label": [0.0, 0.5]}, types)
    with pytest.raises(DataError, match=r"a.parquet: label 0.5 is no number of a class"):
        open_original(f"file://{tmp_path}")


def test_files_of_one_data_set_may_differ_in_order_and_width_of_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": [jpeg(0)], "label": [0], "text": [None]},
          {"image": pa.binary(), "label": pa.int64(), "text": pa.null()})  # fmt: skip
    write(tmp_path / "b.parquet", {"text": ["x"], "label": [1], "image": [jpeg(1)]},
          {"text": pa.string(), "label": pa.int32(), "image": pa.large_binary()})  # fmt: skip
    source = open_original(f"file://{tmp_path}")
    assert [source.read(i).data for i in range(2)] == [jpeg(0), jpeg(1)]
    assert [(source.label(i), source.text(i)) for i in range(2)] == [(0, ""), (1, "x")]
    write(tmp_path / "b.parquet", {"image": [jpeg(1)], "label": ["cat"], "text": ["x"]},
          {"image": pa.binary(), "label": pa.string(), "text": pa.string()})  # fmt: skip
    with pytest.raises(DataError, match=r"b.parquet: other .* than in .*a.parquet: label is string instead of int64"):
        open_original(f"file://{tmp_path}")


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.binary()), pa.binary_view()])
def test_bytes_are_image_files_however_they_are_encoded(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", {"image": [jpeg(0), jpeg(1)]}, {"image": kind})
    assert open_original(f"file://{tmp_path}").read(1).data == jpeg(1)


def test_columns_that_cannot_be_read_are_told_by_name_and_type(tmp_path: Path) -> None:
    types = {"image": IMAGE, "label": pa.list_(pa.int8())}
    write(tmp_path / "a.parquet", {"image": pictures(1), "label": [[1]]}, types)
    (line,) = passed_over(open_original(f"file://{tmp_path}"))
    assert line.endswith("holds no labels, the first label")
    write(tmp_path / "a.parquet", {"pixels": [b""]}, {"pixels": pa.binary()})
    with pytest.raises(DataError, match=r"columns pixels holds image files under a known name: .* type binary; wanted"):
        open_original(f"file://{tmp_path}")


def test_rows_of_paths_alone_are_said_to_be_that(tmp_path: Path) -> None:
    paths = [{"bytes": None, "path": f"/x/{i}.png"} for i in range(5)]
    write(tmp_path / "a.parquet", {"image": paths}, {"image": IMAGE})
    with pytest.raises(DataError, match=r"image holds no bytes of files, at most their paths, such as '/x/0.png'"):
        open_original(f"file://{tmp_path}")
    write(tmp_path / "a.parquet", {"image": [*paths, *pictures(1)]}, {"image": IMAGE})
    assert open_original(f"file://{tmp_path}").read(5).data == jpeg(0)


@pytest.mark.parametrize("labels", [[0, 2], [0, -2]])
def test_labels_without_a_name_are_refused(tmp_path: Path, labels: list[int]) -> None:
    write(tmp_path / "a.parquet", {"image": pictures(2), "label": labels}, {"image": IMAGE, "label": pa.int64()},
          {"features": NAMES})  # fmt: skip
    with pytest.raises(DataError, match=r"a.parquet: labels from .* do not fit 2 classes"):
        open_original(f"file://{tmp_path}")


def test_files_without_images_or_of_two_data_sets_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x"]}, {"text": pa.string()})
    with pytest.raises(DataError, match="none of the columns text holds image files"):
        open_original(f"file://{tmp_path}")
    write(tmp_path / "b.parquet", {"image": pictures(1)}, {"image": IMAGE})
    with pytest.raises(DataError, match=r"b.parquet: other columns than in .*a.parquet"):
        open_original(f"file://{tmp_path}")


@pytest.mark.parametrize("cut", [0, 100, 3000])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, cut: int) -> None:
    published(tmp_path)
    path = tmp_path / "data/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: .*no whole parquet file; bring it again"):
        open_original(f"file://{tmp_path}")


def test_a_text_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    bad = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"image": pa.array(pictures(1), IMAGE), "text": bad})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: text of row 0 is not UTF-8"):
        open_original(f"file://{tmp_path}").text(0)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = published(tmp_path / "1")
    assert published(tmp_path / "elsewhere").fingerprint() == first.fingerprint()
    assert published(tmp_path / "2", count=8).fingerprint() != first.fingerprint()


class Counted(FileStore):
    asked = requests = 0  # bytes, calls

    def get_range(self, key: str, start: int, size: int) -> bytes:
        self.asked, self.requests = self.asked + size, self.requests + 1
        return super().get_range(key, start, size)


def test_a_row_group_of_a_bucket_is_one_request_for_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.data.ranged_file.LOCAL_PROBE", 0)
    published(tmp_path)
    store = Counted(tmp_path)
    source = ParquetSource(store, list(store.list()))
    for file in source._files.values():
        file._jump = JUMP
    asked, bytes_ = store.requests, store.asked
    source.read(0)
    assert store.requests == asked + 1
    assert store.asked - bytes_ < sum(len(jpeg(i)) for i in range(3)) + 1000


def test_going_through_in_order_reads_every_row_group_once(tmp_path: Path) -> None:
    published(tmp_path)
    store = Counted(tmp_path)
    source = ParquetSource(store, list(store.list()))
    store.asked = 0
    for i in range(14):
        source.read(i)
    assert not any(file._held for file in source._files.values()), "nor is more held than a few row groups"
    assert store.asked < 1.2 * sum(entry.size for entry in store.list()) + 12 * LOCAL_PROBE
