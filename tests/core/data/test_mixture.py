"""Data sets in fixed shares."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from core.data.loader import train_batches
from core.data.mixture import MixtureOrder, PassOrder, apportioned, before
from core.data.prefetch import upcoming
from core.data.source import ArraySource
from core.data.subset import Mixture, compose
from core.data.views import View
from core.recipe import Data

SIZES = [np.array([30, 40, 30]), np.array([5, 5]), np.full(90, 10)]  # 100, 10 and 900 samples
ENDS = np.cumsum([100, 10, 900])
WEIGHTS = [3.0, 1.0, 1.0]


def order(streams: int = 4, block: int = 50, seed: int = 5) -> MixtureOrder:
    return MixtureOrder(SIZES, WEIGHTS, seed, streams, block)


def epoch_of(mixed: MixtureOrder, epoch: int) -> np.ndarray:
    return np.stack([mixed.index(epoch, stream, np.arange(mixed.per_stream)) for stream in range(mixed.streams)])


def source_of(index: np.ndarray) -> np.ndarray:
    return np.searchsorted(ENDS, index % 1010, side="right")


@pytest.mark.parametrize(("weights", "total"), [([3, 1, 1], 252), ([0.1, 0.2, 0.7], 10), ([1, 1e-9], 7), ([1] * 7, 3)])
def test_shares_are_whole_numbers_that_sum_up(weights: list[float], total: int) -> None:
    counts = apportioned(weights, total)
    assert counts.sum() == total
    assert np.abs(counts - np.array(weights) / sum(weights) * total).max() < 1


def test_places_are_interleaved_evenly_and_each_is_one_parts() -> None:
    counts = np.array([7, 0, 50, 143])
    taken = np.diff(before(np.arange(201), counts), axis=0)
    assert set(taken.flatten().tolist()) == {0, 1}
    assert (taken.sum(1) == 1).all()
    assert taken.sum(0).tolist() == counts.tolist()
    ideal = np.arange(201)[:, None] * counts / 200
    assert np.abs(before(np.arange(201), counts) - ideal).max() < 2


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_stream_of_an_epoch_holds_the_shares(epoch: int) -> None:
    mixed = order()
    for row in source_of(epoch_of(mixed, epoch)):
        assert np.bincount(row).tolist() == apportioned(WEIGHTS, 252).tolist() == [151, 51, 50]
        for first in range(0, 250, 10):  # and so does every batch
            assert np.abs(np.bincount(row[first : first + 10], minlength=3) - [6, 2, 2]).max() <= 1


def test_small_sets_are_gone_round_and_their_copies_are_samples_of_their_own() -> None:
    index = epoch_of(order(), 2).flatten()
    assert len(np.unique(index)) == len(index)
    for source, length, count in ((0, 100, 604), (1, 10, 204)):
        own = index[source_of(index) == source] % 1010
        times = np.bincount(own - (ENDS[source] - length), minlength=length)
        assert times.sum() == count
        assert times.max() - times.min() <= 2, "as often as each other, but for where an epoch begins and ends"


def test_no_sample_of_a_large_set_comes_again_before_all_others_have() -> None:
    mixed, seen = order(), []
    for epoch in range(9):
        index = epoch_of(mixed, epoch)
        seen.append(index[source_of(index) == 2])
    taken = np.concatenate(seen)  # 9 * 200 = 2 * 900
    assert (np.bincount(taken % 1010 - 110, minlength=900) == 2).all()
    assert len(np.unique(np.concatenate(seen[:4]))) == 800
    assert set(seen[0].tolist()) != set(seen[1].tolist())


def test_an_index_depends_on_seed_epoch_stream_and_position_alone() -> None:
    whole = epoch_of(order(), 3)
    np.testing.assert_array_equal(order().index(3, 2, np.array([251, 0, 77])), whole[2, [251, 0, 77]])
    np.testing.assert_array_equal(epoch_of(pickle.loads(pickle.dumps(order())), 3), whole)
    assert (epoch_of(order(seed=6), 3) != whole).mean() > 0.9


def test_a_pass_over_a_large_set_reads_its_shards_one_after_the_other() -> None:
    passing = PassOrder(np.full(90, 10), 5, 4, 50, per_stream=50, stride=900)
    shards = [np.unique(passing.index(epoch, stream, np.arange(50)) // 10) for epoch in range(4) for stream in range(4)]
    assert max(len(each) for each in shards) == 5


@pytest.mark.parametrize("block", [7, 50, 1000])
def test_what_is_read_is_known_before(block: int) -> None:
    mixed = order(streams=3, block=block)
    ends = np.cumsum(np.concatenate(SIZES))

    def shard(index: np.ndarray) -> set[int]:
        return set(np.searchsorted(ends, index % 1010, side="right").tolist())

    named: set[int] = set()
    position = 0
    for samples in upcoming(mixed, range(1, 3), 4, 0):
        named |= shard(np.array(samples, np.int64))
        if position < mixed.per_stream:
            end = min(mixed.shards(4, stream, position)[1] for stream in (1, 2))
            for stream in (1, 2):
                assert shard(mixed.index(4, stream, np.arange(position, end))) <= named
            position = end
    assert position == mixed.per_stream


def images(count: int, first: int) -> ArraySource:
    pixels = np.arange(first, first + count, dtype=np.uint8)[:, None, None] + np.zeros((count, 8, 8), np.uint8)
    return ArraySource(pixels, [i % 2 for i in range(count)], ["a", "b"])


def test_a_recipes_weights_shape_its_batches_at_any_world_size() -> None:
    mixed = compose([images(60, 0), images(20, 100)], Data(merge=["x"], weights=[1, 3]), seed=1)
    assert isinstance(mixed, Mixture)
    assert mixed.classes == ["a", "b"]
    settings = {"seed": 3, "batch": 16, "micro_batch": 8, "block": 10, "workers": 0, "prefetch": 2}
    views = [View(size=8, name="v")]
    alone = [m for step in train_batches(mixed, views, **settings, start_step=0, stop_step=7, rank=0, world=1)
             for m in step]  # fmt: skip
    for micro in alone:
        values = micro.views["v"][:, 0, 0, 0].numpy()
        assert abs(int((values >= 100).sum()) - 6) <= 1
        np.testing.assert_array_equal(values, [int(mixed.read(i % 80).data[0, 0]) for i in micro.index.tolist()])
    late = [m for step in train_batches(mixed, views, **settings, start_step=5, stop_step=7, rank=1, world=2)
            for m in step]  # fmt: skip
    assert [m.index.tolist() for m in late] == [alone[11].index.tolist(), alone[13].index.tolist()]


def test_shares_of_classes_are_cut_in_each_source() -> None:
    mixed = compose([images(60, 0), images(20, 100)], Data(merge=["x"], weights=[1, 3], classes=0.5), seed=1)
    assert len(mixed) == 40
    assert len({mixed.label(i) for i in range(40)}) == 1
