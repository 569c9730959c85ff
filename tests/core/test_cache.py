"""The shard cache: one verified download for all processes of a node, inside a limit."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

import pytest

from core.cache import HELD_S, MARK, STRIPES, CacheFull, ShardCache
from core.folder import FileStore
from core.storage import MissingObject, Store, StoreError, crc32c, open_store
from tests.core.test_storage import in_forks

LIMIT = 1 << 20


class CountedStore(FileStore):
    """Notes every download in a file, and spoils the first `spoiled` of them."""

    def __init__(self, root: Path, spoiled: int = 0) -> None:
        super().__init__(root)
        self.spoiled = spoiled

    def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
        found = super().load(key, file, expected)
        with (self.root / "downloads").open("a") as log:
            log.write(f"{key}\n")
        return found if len(self.downloads()) > self.spoiled else (found[0], found[1] ^ 1)

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
        def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
            found = super().load(key, file, expected)
            totals.append(sum(file.stat().st_size for file in cache.folder.rglob("*") if file.is_file()))
            return found

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
    with pytest.raises(StoreError, match="101 bytes.*100.*raise loader.cache_gb"):
        fetch(ShardCache(tmp_path / "cache", 100))


def test_what_a_killed_process_left_is_removed(store: CountedStore, cache: ShardCache) -> None:
    class Deadly(FileStore):
        def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
            os.write(file.fileno(), b"half")
            os._exit(0)

    fetch = put(Deadly(store.root), "shard", b"half of it")
    in_forks(1, lambda number: fetch(cache))
    assert [
        path.name for path in cache.folder.rglob("*") if path.is_file() and path.read_bytes().startswith(b"half")
    ] != []
    whole = put(store, "other", b"whole")(cache)
    assert kept(cache) == [whole]


def test_what_a_living_process_downloads_is_left_alone(store: CountedStore, cache: ShardCache) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FileStore):
        def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
            begun.set()
            assert go_on.wait(60)
            return super().load(key, file, expected)

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


def test_a_file_of_before_the_machine_started_is_verified_once(store: CountedStore, cache: ShardCache) -> None:
    fetch = put(store, "shard", b"never flushed")
    path = fetch(cache)
    path.write_bytes(b"never written")
    os.utime(path, (1, 1))
    assert fetch(cache).read_bytes() == b"never flushed"
    assert store.downloads() == ["shard", "shard"]
    os.utime(path, (1, 1))
    assert [fetch(cache).read_bytes() for _ in range(2)] == [b"never flushed"] * 2
    assert store.downloads() == ["shard", "shard"]
    assert path.stat().st_mtime > 1


def ahead(store: Store, key: str, data: bytes) -> Callable[[ShardCache], bool]:
    """Stores `data`; what is returned fetches it before it is needed."""
    store.put(key, data)
    return lambda cache: cache.fetch_ahead(store, key, len(data), crc32c(data))


def test_what_was_fetched_ahead_is_there_when_it_is_needed(store: CountedStore, cache: ShardCache) -> None:
    assert ahead(store, "shard", b"soon")(cache) is True
    assert ahead(store, "shard", b"soon")(cache) is False
    assert put(store, "shard", b"soon")(cache).read_bytes() == b"soon"
    assert store.downloads() == ["shard"]


def test_fetching_ahead_drops_nothing_that_was_used_lately(store: CountedStore, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 250)
    paths = [put(store, key, key.encode() * 100)(cache) for key in "ab"]
    with pytest.raises(CacheFull, match=r"no room .*raise loader\.cache_gb"):
        ahead(store, "c", b"c" * 100)(cache)
    assert sorted(kept(cache)) == sorted(paths)
    for path in paths:
        os.utime(path, (time.time() - 2 * HELD_S,) * 2)
    assert cache.fetch_ahead(store, "a", 100, crc32c(b"a" * 100)) is False, "there already, and marked"
    assert ahead(store, "c", b"c" * 100)(cache) is True
    assert sorted(path.read_bytes()[:1] for path in kept(cache)) == [b"a", b"c"]


def test_fetching_ahead_leaves_to_another_process_what_it_is_at(store: CountedStore, cache: ShardCache) -> None:
    fetch = ahead(store, "shard", b"bytes")
    path = put(store, "shard", b"bytes")(cache)
    path.unlink()
    with (cache.folder / "locks" / path.name[:STRIPES]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fetch(cache) is False
    assert fetch(cache) is True


def test_downloads_that_begin_together_share_the_limit(store: CountedStore, tmp_path: Path) -> None:
    cache, totals = ShardCache(tmp_path / "cache", 250), []
    both = threading.Barrier(2)

    class Together(FileStore):
        def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
            both.wait(30)
            totals.append(sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file()))
            both.wait(30)  # what moves into its place may be missed by whoever still counts
            return super().load(key, file, expected)

    old = [put(store, key, key.encode() * 100)(cache) for key in "ab"]
    with ThreadPoolExecutor(2) as pool:
        new = [put(Together(store.root), key, key.encode() * 100) for key in "cd"]
        assert [path.read_bytes()[:1] for path in pool.map(lambda fetch: fetch(cache), new)] == [b"c", b"d"]
    assert totals == [200, 200]
    assert not any(path.exists() for path in old)


def test_a_folder_that_cannot_be_written_is_named(store: CountedStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=f"shard cache {tmp_path}/file/cache: Not a directory"):
        put(store, "a", b"a")(ShardCache(tmp_path / "file" / "cache", 100))


def test_a_full_disk_says_what_can_be_done(tmp_path: Path) -> None:
    class Full(FileStore):
        def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ShardCache(tmp_path / "cache", 100)
    with pytest.raises(StoreError, match=r"No space left on device: free space, lower loader\.cache_gb"):
        put(Full(tmp_path / "store"), "a", b"a")(cache)
    assert kept(cache) == []


# ---- what is not the cache's own


def test_a_folder_that_holds_other_files_is_refused_and_stays_as_it_is(store: CountedStore, tmp_path: Path) -> None:
    home = tmp_path / "scratch"
    (home / "data.part").mkdir(parents=True)
    (home / "data.part" / "half").write_text("of a download of mine")
    (home / "thesis.tex").write_text("years of work")
    home.chmod(0o755)
    cache, fetch = ShardCache(home, 10), put(store, "a", b"a" * 10)
    for attempt in (cache.check, lambda: fetch(cache), lambda: ahead(store, "a", b"a" * 10)(cache)):
        with pytest.raises(StoreError, match=r"what is not Retort.s, such as data.part: .*new folder in loader"):
            attempt()
    assert sorted(path.name for path in home.rglob("*")) == ["data.part", "half", "thesis.tex"]
    assert home.stat().st_mode & 0o777 == 0o755


def test_files_that_came_into_the_cache_later_are_not_touched_or_counted(store: CountedStore, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    put(store, "a", b"a" * 100)(cache)
    mine = [cache.folder / "notes", cache.folder / "x.part" / "y", cache.folder / ("0" * 40 + "-00000000.bak")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"m" * 200)
        os.utime(path, (1, 1))
    (cache.folder / ("1" * 40 + "-00000000")).symlink_to(mine[0])
    last = put(store, "b", b"b" * 100)(cache)
    assert last.exists()
    assert all(path.read_bytes() == b"m" * 200 for path in mine)


def test_an_empty_folder_and_a_cache_without_its_mark_are_taken_over(store: CountedStore, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o755)
    cache, fetch = ShardCache(tmp_path / "cache", LIMIT), put(store, "a", b"bytes")
    path = fetch(cache)
    (cache.folder / MARK).unlink()
    cache.check()
    assert fetch(cache) == path
    assert store.downloads() == ["a"]
    assert (cache.folder / MARK).exists()


def test_only_this_user_can_read_the_cache(store: CountedStore, cache: ShardCache) -> None:
    before = os.umask(0)
    try:
        put(store, "a", b"a photograph of somebody")(cache)
    finally:
        os.umask(before)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.chmod(0o755)
    put(store, "b", b"another")(cache)
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_somebody_else_has_laid_out_is_refused(
    store: CountedStore, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = put(store, "a", b"bytes")
    fetch(cache)
    monkeypatch.setattr(os, "getuid", lambda: 2**20)
    for attempt in (cache.check, lambda: fetch(cache)):
        with pytest.raises(StoreError, match=f"shard cache {cache.folder}: it belongs to user"):
            attempt()
    monkeypatch.undo()
    link = cache.folder.with_name("link")
    link.symlink_to(cache.folder)
    with pytest.raises(StoreError, match="it is a link"):
        fetch(ShardCache(link, LIMIT))
