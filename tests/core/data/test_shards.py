import json
import pickle
import tarfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.cache import ShardCache
from core.data.shards import ROW, Sample, write_index, write_shard, write_shards
from core.data.source import DataError, FolderSource, open_source
from core.folder import FileStore
from core.storage import Store, StoreError, crc32c, open_store
from tests.core.data.images import jpeg
from tests.faults import FaultyProxy, refusal

Made = tuple[str, bytes, str, int]


def make(count: int = 10) -> list[Made]:
    return [(f"n0{i % 2}/img.{i}", jpeg(i), "JPG", i % 2) for i in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def write(store: Store, samples: list[Made] | None = None, shard_bytes: int = 4000) -> dict[str, Any]:
    return write_shards(samples or make(), store, "set", shard_bytes, ["cat", "dog"])


def test_what_was_written_is_read_back(store: FileStore):
    index = write(store)
    source = open_source(f"{store.uri}/set")
    assert len(source) == index["samples"] == 10
    assert source.classes == ["cat", "dog"]
    assert len(index["shards"]) > 2
    assert source.shard_sizes.tolist() == [shard["samples"] for shard in index["shards"]]
    for i, (_, data, _, label) in enumerate(make()):
        assert source.read(i).data == data
        assert source.read(i).label == source.label(i) == label


def test_keys_come_from_the_index(store: FileStore):
    write(store)
    source = open_source(f"{store.uri}/set")
    first = int(source.shard_sizes[0])
    assert source.read(0).key == "shard-000000.tar:0"
    assert source.read(first + 1).key == "shard-000001.tar:1"


@pytest.mark.parametrize("i", [-1, 10])
def test_samples_outside_are_refused(store: FileStore, i: int):
    write(store)
    with pytest.raises(IndexError):
        open_source(f"{store.uri}/set").read(i)


def test_shards_are_ordinary_tars_for_webdataset(store: FileStore):
    write(store, [("a/b.c%", b"image", ".JPG", 1), ("x", b"other", "png", -1)])
    with tarfile.open(store.root / "set/shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        assert {member.mtime for member in tar} == {0}
    assert members == {"a/b%2Ec%25.jpg": b"image", "a/b%2Ec%25.cls": b"1", "x.png": b"other"}


def test_long_and_foreign_names_are_kept(store: FileStore):
    key = "\u00e9/" + "long" * 60
    write(store, [(key, jpeg(3), "jpg", 0), ("y", jpeg(4), "jpg", 1)])
    with tarfile.open(store.root / "set/shard-000000.tar", encoding="utf-8") as tar:
        assert tar.getnames()[0] == f"{key}.jpg"
    assert open_source(f"{store.uri}/set").read(1).data == jpeg(4)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        write(FileStore(tmp_path / name))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 5
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_an_interrupted_write_is_no_data_set(store: FileStore):
    def broken() -> Iterator[Made]:
        yield from make()
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_shards(broken(), store, "set", 4000, ["cat", "dog"])
    assert store.size("set/shard-000000.tar")
    with pytest.raises(DataError, match="no index.json"):
        open_source(f"{store.uri}/set")


@pytest.mark.parametrize(
    ("key", "label", "message"), [("/etc/x", 0, "relative path"), ("", 0, "relative path"), ("a", 2, "label 2 is")]
)
def test_bad_keys_and_labels_are_refused(store: FileStore, key: str, label: int, message: str):
    with pytest.raises(DataError, match=message):
        write(store, [(key, b"", "jpg", label)])


def test_a_key_cannot_climb_out_of_its_folder(store: FileStore):
    write(store, [("../../x", b"image", "jpg", 0)])
    with tarfile.open(store.root / "set/shard-000000.tar") as tar:
        assert ".." not in tar.getnames()[0]


def test_no_samples_are_an_error(store: FileStore):
    with pytest.raises(DataError, match="no samples to write"):
        write_shards([], store, "set", 4000, [])


def edit(store: FileStore, change: dict[str, Any]) -> None:
    store.put("set/index.json", json.dumps(json.loads(store.get("set/index.json")) | change).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema 1 instead of 2"),
        ({"samples": 11}, "do not fit"),
        ({"shards": [{"name": "shard-000000"}]}, "do not fit"),
        ({"shards": []}, "do not fit"),
        ({"classes": None}, "do not fit"),
    ],
)
def test_a_wrong_index_is_named(store: FileStore, change: dict[str, Any], message: str):
    write(store)
    edit(store, change)
    with pytest.raises(DataError, match=message):
        open_source(f"{store.uri}/set")


def test_shard_names_from_the_index_cannot_point_elsewhere(store: FileStore):
    index = write(store)
    index["shards"][0]["name"] = "../../etc/passwd"
    edit(store, {"shards": index["shards"]})
    with pytest.raises(DataError, match="do not fit"):
        open_source(f"{store.uri}/set")


def test_an_index_that_is_no_json_is_named(store: FileStore):
    write(store)
    store.put("set/index.json", b"{")
    with pytest.raises(DataError, match=r"set/index.json: not valid JSON"):
        open_source(f"{store.uri}/set")


def test_missing_and_cut_files_are_all_named_at_once(store: FileStore):
    write(store)
    store.delete("set/shard-000000.tar")
    store.put("set/shard-000001.idx", b"short")
    with pytest.raises(DataError, match=r"shard-000000.tar \(no bytes.*shard-000001.idx \(5 bytes"):
        open_source(f"{store.uri}/set")


@pytest.mark.parametrize(
    "change", [{"size": 1 << 30}, {"offset": -512}, {"label": -2}, {"text_gap": 9999}, {"size": 9}]
)
def test_a_damaged_idx_is_found_when_it_is_read(store: FileStore, change: dict[str, int]):
    index = write(store, [("x", jpeg(0), "jpg", 0)], 10**9)
    rows = np.frombuffer(store.get("set/shard-000000.idx"), ROW).copy()
    for name, value in change.items():
        rows[name] = value
    store.put("set/shard-000000.idx", rows.tobytes())
    if change != {"size": 9}:  # a matching checksum: then the numbers themselves must be refused
        index["shards"][0]["idx_crc32c"] = crc32c(store.get("set/shard-000000.idx"))
        edit(store, {"shards": index["shards"]})
    source = open_source(f"{store.uri}/set")
    with pytest.raises(DataError, match=r"shard-000000.idx: (points outside|does not match)"):
        source.read(0)


def test_texts_and_facts_are_kept_with_the_images(store: FileStore):
    samples = [
        Sample("a", jpeg(0), "jpg", 1, "größe ☕"),
        Sample("b", jpeg(1), "jpg", 0),
        Sample("c", b"x", "jpg", -1, "c"),
    ]
    entry = write_shard(store, 0, samples, ["cat", "dog"])
    write_index(store, [entry], ["cat", "dog"], split="train", licence="CC0")
    source = open_source(store.uri)
    assert [source.text(i) for i in range(3)] == ["größe ☕", "", "c"]
    assert [source.read(i).data for i in range(3)] == [sample.data for sample in samples]
    assert [source.label(i) for i in range(3)] == [1, 0, -1]
    assert source.licence == "CC0"
    assert json.loads(store.get("index.json"))["split"] == "train"


@pytest.mark.parametrize("cached", [False, True])
def test_a_sample_that_changed_after_indexing_is_refused(store_uri: str, tmp_path: Path, cached: bool):
    store = open_store(store_uri)
    write(store)
    data = bytearray(store.get("set/shard-000000.tar"))
    data[700] ^= 1
    store.put("set/shard-000000.tar", bytes(data))
    source = open_source(f"{store_uri}/set", ShardCache(tmp_path / "cache", 1 << 20) if cached else None)
    with pytest.raises((DataError, StoreError), match=r"shard-000000.tar.*(has changed since|is corrupt)"):
        source.read(0)


def test_shards_of_another_data_set_of_the_same_sizes_are_refused(store: FileStore):
    write(store, [("a", b"1" * 900, "jpg", 0)])
    write(FileStore(store.root / "other"), [("a", b"2" * 900, "jpg", 0)])
    store.put("set/index.json", store.get("other/set/index.json"))
    with pytest.raises(DataError, match=r"shard-000000.idx: does not match index.json"):
        open_source(f"{store.uri}/set").read(0)


def test_shards_are_read_without_the_right_to_list(proxy: FaultyProxy, bucket: str):
    write(open_store(bucket))
    proxy.plan(refusal(403, "AccessDenied"), "GET", times=100, having="list-type")
    assert open_source(f"{bucket}/set").read(3).data == jpeg(3)
    with pytest.raises(StoreError, match="rights to get, put, list"):
        open_source(bucket)


def test_a_source_goes_to_another_process_without_its_open_files(store: FileStore):
    write(store)
    source = open_source(f"{store.uri}/set")
    want = source.read(7)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(7) == want


def test_a_foreign_index_json_leaves_the_folder_a_folder(store: FileStore):
    store.put("index.json", b'{"images": 1}')
    store.put("a.jpg", jpeg(0))
    assert isinstance(open_source(store.uri), FolderSource)


def test_a_spawned_process_reads_on(bucket: str, tmp_path: Path):
    write(open_store(bucket))
    source = open_source(f"{bucket}/set", ShardCache(tmp_path / "cache", 1 << 20))
    source.read(0)
    with get_context("spawn").Pool(1) as pool:
        assert [raw.data for raw in pool.map(source.read, range(10))] == [data for _, data, _, _ in make()]


@pytest.mark.parametrize("cached", [False, True])
def test_shards_in_a_bucket_are_read_through_the_cache_or_by_ranges(bucket: str, tmp_path: Path, cached: bool):
    write(open_store(bucket))
    cache = ShardCache(tmp_path / "cache", 1 << 20) if cached else None
    source = open_source(f"{bucket}/set", cache)
    assert [source.read(i).data for i in range(10)] == [data for _, data, _, _ in make()]
    files = [path for path in tmp_path.glob("cache/*") if path.is_file()]
    assert len(files) == (2 * len(source.shard_sizes) if cached else 0)  # tars and their indices


class Crowded(ShardCache):
    """Every second file is dropped by somebody else before it can be opened."""

    calls = 0

    def fetch(self, store: Store, key: str, size: int, crc: int) -> Path:
        path = super().fetch(store, key, size, crc)
        self.calls += 1
        if self.calls % 2:
            path.unlink()
        return path


def test_a_shard_dropped_before_it_was_opened_is_fetched_again(bucket: str, tmp_path: Path):
    write(open_store(bucket))
    source = open_source(f"{bucket}/set", Crowded(tmp_path / "cache", 1 << 20))
    assert [source.read(i).data for i in range(10)] == [data for _, data, _, _ in make()]


def test_more_shards_than_the_cache_holds_are_read(bucket: str, tmp_path: Path):
    index = write(open_store(bucket))
    limit = max(shard["bytes"] for shard in index["shards"])
    source = open_source(f"{bucket}/set", ShardCache(tmp_path / "cache", limit))
    for _ in range(2):
        assert [source.read(i).data for i in range(10)] == [data for _, data, _, _ in make()]
    assert sum(path.stat().st_size for path in tmp_path.glob("cache/*") if path.is_file()) <= limit
