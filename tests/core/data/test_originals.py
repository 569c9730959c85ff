"""Which split of a published data set is read, and what is said where one must be chosen."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data import originals
from core.data.originals import open_original
from core.data.source import DataError, FolderSource, open_source
from core.data.tar_source import TarSource
from core.data.tsv_source import TsvSource
from core.folder import FileStore
from core.storage import open_store
from tests.core.data.images import jpeg
from tests.core.data.tars import labelled
from tests.core.data.test_fingerprint import shards, table
from tests.core.data.test_parquet_source import published

pytestmark = pytest.mark.usefixtures("scans")


def test_a_split_of_folders_is_chosen_by_name(store_uri: str) -> None:
    for key in ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg"):
        open_store(store_uri).put(key, jpeg(0))
    source = open_original(store_uri, "train")
    assert (len(source), source.classes) == (2, ["cat", "dog"])
    both = f"holds the splits train, val; choose one: SPLIT=train .*{store_uri}/train"
    for opened in (open_original, open_source):
        with pytest.raises(DataError, match=both):
            opened(store_uri)
    with pytest.raises(DataError, match="no split 'test'"):
        open_original(store_uri, "test")


def test_a_split_is_asked_for_however_many_files_come_first(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "_GLANCE", 2)
    store = open_store(store_uri)
    for key in (".cache/hub/x.json", "LICENSE", *(f"train/cat/{i}.jpg" for i in range(5)), "val/cat/3.jpg"):
        store.put(key, jpeg(0))
    with pytest.raises(DataError, match="holds the splits train, val; choose one: SPLIT=train"):
        open_original(store_uri)
    store.put("zebra/1.jpg", jpeg(0))
    assert open_original(store_uri).classes == ["train", "val", "zebra"]


def test_class_folders_are_no_splits(tmp_path: Path) -> None:
    for key in ("test/1.jpg", "cat/2.jpg"):
        FileStore(tmp_path).put(key, jpeg(0))
    assert open_original(f"file://{tmp_path}").classes == ["cat", "test"]


def test_a_split_of_files_is_chosen_by_the_words_of_their_names(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for name in ("in1k-train-0.tar", "in1k-train-1.tar", "in1k-validation-0.tar"):
        store.put(name, labelled([jpeg(0)]))
    source = open_original(store.uri, "train")
    assert isinstance(source, TarSource)
    assert len(source) == 2
    for opened in (open_original, open_source):
        with pytest.raises(DataError, match="holds the splits train, validation"):
            opened(store.uri)
    with pytest.raises(DataError, match=r"no \*.tar file is of split 'val'; there is train, validation"):
        open_original(store.uri, "val")
    assert len(open_original(f"{store.uri}/in1k-train-1.tar")) == 1
    with pytest.raises(DataError, match=r"other.tar: no such file"):
        open_original(f"{store.uri}/other.tar")


def test_one_file_is_that_file_alone(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for count, name in enumerate(("1.tar", "11.tar", "more/1.tar"), 1):
        store.put(name, labelled([jpeg(i) for i in range(count)]))
    assert len(open_original(f"{store.uri}/1.tar")) == 1


def test_tars_are_read_where_their_maker_has_left_tables_beside_them(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("00000.tar", labelled([jpeg(0)]))
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / "00000.parquet")
    assert isinstance(open_original(store.uri), TarSource)
    published(tmp_path / "hub")
    FileStore(tmp_path / "hub").put("samples.tar", labelled([jpeg(0)]))
    assert len(open_original(f"file://{tmp_path}/hub")) == 14, "but parquet that holds the images"


def test_shards_whose_writing_has_not_finished_are_no_tars_of_another_tool(tmp_path: Path) -> None:
    shards(tmp_path / "shards", [0, 1], ["a", "b"])
    (tmp_path / "shards/index.json").unlink()
    for opened in (open_original, open_source):
        with pytest.raises(DataError, match=r"shards, but no index.json: their writing has not finished"):
            opened(f"file://{tmp_path}/shards")


def test_hub_files_have_splits_too(tmp_path: Path) -> None:
    published(tmp_path, "train")
    assert len(open_original(f"file://{tmp_path}")) == 14
    with pytest.raises(DataError, match="holds the splits test, train"):
        published(tmp_path, "test", 2)
    assert len(open_original(f"file://{tmp_path}", "test")) == 4


def test_other_kinds_of_data_are_opened_as_for_training(tmp_path: Path) -> None:
    shards(tmp_path / "shards", [0, 1], ["a", "b"])
    assert open_original(f"file://{tmp_path}/shards").classes == ["a", "b"]
    table(tmp_path / "tables", "image_1", jpeg(0))
    FileStore(tmp_path / "tables").put("image.list", b"image_1.tsv\n")
    assert isinstance(open_original(f"file://{tmp_path}/tables/image.list"), TsvSource)
    FileStore(tmp_path / "photos").put("a.jpg", jpeg(0))
    assert isinstance(open_original(f"file://{tmp_path}/photos"), FolderSource)
    with pytest.raises(DataError, match="no such folder"):
        open_original(f"file://{tmp_path}/nothing")
