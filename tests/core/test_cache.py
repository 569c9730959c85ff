"""The shard cache: one verified download for all processes of a node, inside a limit."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from core.cache import ShardCache
from core.storage import FileStore, MissingObject, Store, StoreError, crc32c, open_store
from tests.core.test_storage import in_forks

LIMIT = 1 << 20


class CountedStore(FileStore):
    """Notes every download in a file, and spoils the first `spoiled` of them."""

    def __init__(self, root: Path, spoiled: int = 0) -> None:
        super().__init__(root)
        self.spoiled = spoiled

    def get_file(self, key: str, path: Path) -> None:
        super().get_file(key, path)
        with (self.root / "downloads").open("a") as file:
            file.write(f"{key}\n")
        if len(self.downloads()) <= self.spoiled:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    def downloads(self) -> list[str]:
        return (self.root / "downloads").read_text().split() if (self.root / "downloads").exists() else []


@pytest.fixture
def store(tmp_path: Path) -> CountedStore:
    return CountedStore(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", LIMIT)


def put(store: Store, key: str, data: bytes) -> Callable[[ShardCache], Path]:
    """Stores `data`; what is returned fetches it."""
    store.put(key, data)
    return lambda cache: cache.fetch(store, key, len(data), crc32c(data))


def kept(cache: ShardCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.name != "locks"]


def test_a_shard_is_downloaded_once(store: CountedStore, cache: ShardCache) -> None:
    fetch = put(store, "a/shard-0.tar", b"bytes of a shard")
    assert [fetch(cache).read_bytes() for _ in range(3)] == [b"bytes of a shard"] * 3
    assert ShardCache(cache.folder, LIMIT).fetch(store, "a/shard-0.tar", 16, crc32c(b"bytes of a shard")) == fetch(
        cache
    )
    assert store.downloads() == ["a/shard-0.tar"]


def test_every_kind_of_store_is_cached(store_uri: str, cache: ShardCache) -> None:
    fetch = put(open_store(store_uri), "shard", bytes(100_000))
    assert fetch(cache).read_bytes() == bytes(100_000)


def test_processes_wait_for_the_one_that_downloads(store: CountedStore, cache: ShardCache) -> None:
    data = os.urandom(500_000)
    fetch = put(store, "shard", data)
    start = multiprocessing.get_context("fork").Barrier(6)

    def work(number: int) -> None:
        start.wait(30)
        assert fetch(cache).read_bytes() == data

    in_forks(6, work)
    assert store.downloads() == ["shard"]


def test_equal_keys_of_two_stores_do_not_collide(tmp_path: Path, cache: ShardCache) -> None:
    first, second = FileStore(tmp_path / "first"), FileStore(tmp_path / "second")
    data = b"equal length", b"other bytes!"
    paths = [put(store, "shard", content)(cache) for store, content in zip((first, second), data, strict=True)]
    assert [path.read_bytes() for path in paths] == list(data)
    same = [put(store, "same", b"same bytes")(cache) for store in (first, second)]
    assert same[0] != same[1]


def test_one_object_reached_two_ways_is_one_file(store: CountedStore, cache: ShardCache) -> None:
    direct = put(store, "a/b/shard", b"data")(cache)
    assert cache.fetch(store.sub("a"), "b/shard", 4, crc32c(b"data")) == direct


def test_a_rewritten_shard_is_fetched_anew(store: CountedStore, cache: ShardCache) -> None:
    assert put(store, "shard", b"old!")(cache).read_bytes() == b"old!"
    assert put(store, "shard", b"new!")(cache).read_bytes() == b"new!"


def test_a_download_spoiled_on_the_way_is_repeated(tmp_path: Path, cache: ShardCache) -> None:
    store = CountedStore(tmp_path / "store", spoiled=1)
    assert put(store, "shard", b"right bytes")(cache).read_bytes() == b"right bytes"
    assert store.downloads() == ["shard", "shard"]


@pytest.mark.parametrize(("size", "crc"), [(0, 1), (1, 0)])
def test_a_shard_that_is_corrupt_in_the_store_is_named_and_not_kept(
    store: CountedStore, cache: ShardCache, size: int, crc: int
) -> None:
    store.put("a/shard", b"spoilt")
    with pytest.raises(StoreError, match=f"{store.uri}/a/shard is corrupt.*write it again"):
        cache.fetch(store, "a/shard", 6 + size, crc32c(b"spoilt") + crc)
    assert store.downloads() == ["a/shard", "a/shard"]
    assert kept(cache) == []


def test_an_absent_shard_is_missing_and_leaves_nothing(store: CountedStore, cache: ShardCache) -> None:
    with pytest.raises(MissingObject, match="nowhere"):
        cache.fetch(store, "nowhere", 5, 0)
    assert kept(cache) == []


def test_a_cached_file_cut_short_is_fetched_again(store: CountedStore, cache: ShardCache) -> None:
    fetch = put(store, "shard", b"all of it")
    fetch(cache).write_bytes(b"all")
    assert fetch(cache).read_bytes() == b"all of it"


def test_the_shard_fetched_longest_ago_goes_first(store: CountedStore, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 300)
    a, b, c, d = (put(store, key, key.encode() * 100) for key in "abcd")
    for fetch in (a, b, c, a, d):
        fetch(cache)
    assert sorted(path.read_bytes()[:1] for path in kept(cache)) == [b"a", b"c", b"d"]
    a(cache)
    assert store.downloads() == ["a", "b", "c", "d"]


def test_the_limit_holds_while_a_shard_comes_in(tmp_path: Path) -> None:
    totals = []

    class Watching(FileStore):
        def get_file(self, key: str, path: Path) -> None:
            super().get_file(key, path)
            totals.append(sum(file.stat().st_size for file in cache.folder.rglob("*") if file.is_file()))

    cache = ShardCache(tmp_path / "cache", 250)
    store = Watching(tmp_path / "store")
    for key in "abcdef":
        put(store, key, key.encode() * 100)(cache)
    assert max(totals) == 200


def test_an_open_shard_stays_readable_after_its_name_is_gone(store: CountedStore, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    path = put(store, "a", b"a" * 100)(cache)
    with path.open("rb") as file:
        put(store, "b", b"b" * 100)(cache)
        assert not path.exists()
        assert file.read() == b"a" * 100


def test_a_shard_larger_than_the_cache_is_refused(store: CountedStore, tmp_path: Path) -> None:
    fetch = put(store, "a", bytes(101))
    with pytest.raises(StoreError, match="101 bytes.*100.*raise its limit"):
        fetch(ShardCache(tmp_path / "cache", 100))


def test_what_a_killed_process_left_is_removed(store: CountedStore, cache: ShardCache) -> None:
    class Deadly(FileStore):
        def get_file(self, key: str, path: Path) -> None:
            path.write_bytes(b"half")
            os._exit(0)

    fetch = put(Deadly(store.root), "shard", b"half of it")
    in_forks(1, lambda number: fetch(cache))
    assert [path.name for path in cache.folder.rglob("*") if path.is_file() and path.read_bytes() == b"half"] != []
    whole = put(store, "other", b"whole")(cache)
    assert kept(cache) == [whole]


def test_what_a_living_process_downloads_is_left_alone(store: CountedStore, cache: ShardCache) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FileStore):
        def get_file(self, key: str, path: Path) -> None:
            super().get_file(key, path)
            begun.set()
            assert go_on.wait(60)

    slow = put(Slow(store.root), "slow", b"slow but whole")
    others = [put(store, f"other-{i}", b"x") for i in range(3)]  # three: one may happen to wait for the slow one's lock
    with ThreadPoolExecutor(4) as pool:
        result = pool.submit(slow, cache)
        assert begun.wait(60)
        wait([pool.submit(other, cache) for other in others], return_when=FIRST_COMPLETED)
        go_on.set()
        assert result.result().read_bytes() == b"slow but whole"


def test_many_processes_in_a_small_cache_always_read_the_right_bytes(store: CountedStore, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3000)
    contents = [bytes([i]) * 1000 for i in range(8)]
    fetches = [put(store, f"shard-{i}", data) for i, data in enumerate(contents)]

    def read(i: int) -> bytes:
        while True:
            try:
                return fetches[i](cache).read_bytes()
            except FileNotFoundError:  # dropped by another process before it was opened
                continue

    def work(number: int) -> None:
        draw = random.Random(number)
        for _ in range(60):
            i = draw.randrange(len(contents))
            assert read(i) == contents[i]

    in_forks(4, work)
    assert sum(path.stat().st_size for path in kept(cache)) <= 3000
