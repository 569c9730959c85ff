"""Shards fetched before they are read."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.cache import ShardCache
from core.data.order import Order
from core.data.prefetch import AT_ONCE, Prefetch, upcoming
from core.data.repeated import RepeatedOrder
from core.data.shards import write_shards
from core.data.source import ArraySource, Source, open_source
from core.data.subset import Merged, Repeated, Selected
from core.storage import open_store
from tests.core.test_storage import in_forks

SIZES = np.array([7, 1, 30, 12, 0, 12, 3, 25, 10])  # 100 samples
ENDS = np.cumsum(SIZES)


def shards_of(samples: object) -> list[int]:
    return np.searchsorted(ENDS, samples, side="right").tolist()  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("streams", "block"), [(1, 1000), (1, 8), (4, 8), (3, 10), (7, 1)])
def test_what_a_block_reads_is_known_before(streams: int, block: int) -> None:
    order = Order(SIZES, 5, streams, block)
    for stream in range(streams):
        position = 0
        while position < order.per_stream:
            samples, end = order.shards(2, stream, position)
            read = order.index(2, stream, np.arange(position, end))
            assert set(shards_of(samples)) == set(shards_of(read))
            assert len(samples) == len(set(shards_of(samples)))
            assert end - position <= block
            position = end
        assert position == order.per_stream


def test_what_repeated_augmentation_reads_is_known_before() -> None:
    order = RepeatedOrder(SIZES, seed=5, streams=4, block=16, repeats=3)
    for stream in range(4):
        position = 0
        while position < 25:
            samples, end = order.shards(1, stream, position)
            read = order.index(1, stream, np.arange(position, min(end, 25))) % 100
            assert set(shards_of(read)) <= set(shards_of(samples))
            position = end


@pytest.mark.parametrize(("streams", "repeats"), [(8, 3), (4, 4), (2, 3)])
def test_an_epoch_of_repeated_augmentation_ends_where_its_images_do(streams: int, repeats: int) -> None:
    order = RepeatedOrder(np.full(40, 25), 5, streams, 50, repeats)
    epoch = np.arange(1000 // streams)
    read = [np.concatenate([order.index(e, s, epoch) % 1000 // 25 for s in range(streams)]) for e in (0, 1)]
    named = [sample // 25 for block in upcoming(order, range(streams), 0, 0) for sample in block]
    assert len(named) == len(set(named))
    assert set(named) >= set(np.concatenate(read).tolist())
    assert len(named) <= len(np.unique(np.concatenate(read))) + 4, "no more than the rest of a block, of each epoch"


def test_shards_are_named_once_in_the_order_of_need() -> None:
    order = Order(np.full(50, 10), 5, 2, 30)
    blocks = list(upcoming(order, range(2), 0, 100))
    named = [sample // 10 for block in blocks for sample in block]
    assert len(named) == len(set(named)) == 50, "the next epoch reads the rest"
    now = [order.index(0, stream, np.arange(90, 120)) // 10 for stream in range(2)]
    assert {sample // 10 for sample in blocks[0]} == set(np.concatenate(now).tolist())
    soon = [order.index(0, stream, np.arange(120, 150)) // 10 for stream in range(2)]
    assert {sample // 10 for sample in blocks[1]} == set(np.concatenate(soon).tolist()) - set(named[: len(blocks[0])])


def shards(uri: str, count: int) -> None:
    """`count` shards of five samples."""
    samples = [(f"{i}", os.urandom(500), "jpg", 0) for i in range(5 * count)]
    assert len(write_shards(samples, open_store(uri), "set", 9500, ["c"])["shards"]) == count


def cached(cache: ShardCache) -> int:
    """Tars that are there."""
    files = [path.stat() for path in cache.folder.iterdir() if path.is_file()] if cache.folder.exists() else []
    return sum(file.st_size > 1000 for file in files)


def wait_until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


def prefetch(source: Source, block: int = 10, streams: int = 1) -> Prefetch:
    return Prefetch(source, Order(source.shard_sizes, 1, streams, block), range(streams))


def test_the_present_block_and_so_many_shards_more_are_fetched(bucket: str, tmp_path: Path) -> None:
    shards(bucket, 8)
    cache = ShardCache(tmp_path / "cache", 1 << 20, ahead=3)
    source = open_source(f"{bucket}/set", cache)
    reading = prefetch(source)
    reading.at(0, 0)
    wait_until(lambda: cached(cache) == 5)
    want = list(chain.from_iterable(upcoming(reading.order, range(1), 0, 0)))[:5]
    before = {path: path.stat().st_ino for path in cache.folder.iterdir()}
    for sample in want:
        assert len(source.read(sample).data) == 500
    assert {path: path.stat().st_ino for path in cache.folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["selected", "merged", "repeated"])
def test_composed_sources_hand_it_on(bucket: str, tmp_path: Path, kind: str) -> None:
    shards(bucket, 2)
    cache = ShardCache(tmp_path / "cache", 1 << 20, ahead=1)
    source = open_source(f"{bucket}/set", cache)
    images = ArraySource(np.zeros((3, 2, 2), np.uint8))
    composed, sample = {
        "selected": (Selected(source, np.array([2, 3])), 0),
        "merged": (Merged([images, source]), 3),
        "repeated": (Repeated(source, 25), 22),
    }[kind]
    assert composed.ahead == 1
    assert composed.fetch(sample) is True
    assert composed.fetch(sample) is False
    assert cached(cache) == 1
    assert images.ahead == 0
    assert images.fetch(0) is False


def test_a_shard_that_cannot_be_fetched_is_left_to_the_read(bucket: str, tmp_path: Path) -> None:
    shards(bucket, 4)
    cache = ShardCache(tmp_path / "cache", 1 << 20, ahead=4)
    source = open_source(f"{bucket}/set", cache)
    reading = prefetch(source)
    spoilt = list(chain.from_iterable(upcoming(reading.order, range(1), 0, 0)))[1]
    key = f"set/shard-{spoilt // 5:06d}.tar"
    open_store(bucket).put(key, bytes(open_store(bucket).size(key) or 0))
    reading.at(0, 0)
    wait_until(lambda: cached(cache) == 3)
    with pytest.raises(Exception, match="is corrupt"):
        source.read(spoilt)


def test_a_full_cache_keeps_what_is_in_use(bucket: str, tmp_path: Path) -> None:
    shards(bucket, 8)
    size = open_store(bucket).size("set/shard-000000.tar") or 0
    cache = ShardCache(tmp_path / "cache", 3 * size + 1000, ahead=8)
    source = open_source(f"{bucket}/set", cache)
    reading = prefetch(source)
    first = list(chain.from_iterable(upcoming(reading.order, range(1), 0, 0)))
    reading.at(0, 0)
    wait_until(lambda: cached(cache) == 3)
    assert reading._pass(set()) is False
    assert [source.fetch(sample) for sample in first[:3]] == [False] * 3
    assert cached(cache) == 3


def test_two_files_are_fetched_at_once(bucket: str, tmp_path: Path) -> None:
    pair, met = threading.Barrier(2), threading.Event()

    class Watched(ShardCache):
        def _download(self, wanted: Any) -> None:
            if not met.is_set():
                pair.wait(30)
                met.set()
            super()._download(wanted)

    shards(bucket, 4)
    cache = Watched(tmp_path / "cache", 1 << 20, ahead=4)
    reading = prefetch(open_source(f"{bucket}/set", cache))
    reading.at(0, 0)
    wait_until(lambda: cached(cache) == 4)
    assert met.is_set()


def test_a_forked_process_fetches_by_itself(bucket: str, tmp_path: Path) -> None:
    shards(bucket, 4)
    cache = ShardCache(tmp_path / "cache", 1 << 20, ahead=4)
    reading = prefetch(open_source(f"{bucket}/set", cache))
    reading.at(0, 0)
    wait_until(lambda: cached(cache) == 4)

    def work(number: int) -> None:
        reading.source._cache.folder = tmp_path / "other"  # type: ignore[attr-defined]
        reading.at(0, 0)
        wait_until(lambda: cached(ShardCache(tmp_path / "other", 1)) == 4)

    in_forks(1, work)
    assert pickle.loads(pickle.dumps(reading))._pid == 0


def test_nothing_is_started_for_samples_that_lie_here() -> None:
    before = threading.active_count()
    prefetch(ArraySource(np.zeros((30, 2, 2), np.uint8))).at(0, 0)
    assert threading.active_count() == before


def test_the_threads_end_with_the_reader(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.data.prefetch.LOOK_AGAIN_S", 0.01)
    shards(bucket, 2)
    reading = prefetch(open_source(f"{bucket}/set", ShardCache(tmp_path / "cache", 1 << 20, ahead=4)))
    reading.at(0, 0)
    started = [thread for thread in threading.enumerate() if thread.name == "prefetch"][-AT_ONCE:]
    del reading
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()
