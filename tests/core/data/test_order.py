import pickle

import numpy as np
import pytest

from core.data.order import Order
from tests.perf.order import Run, fetched, reads, shuffle

UNEVEN = np.array([7, 1, 30, 12, 12, 3, 25, 10])  # 100 samples
SIZES = [UNEVEN, np.ones(100, np.int64), np.array([100]), np.array([0, 60, 0, 40])]


def epoch_of(order: Order, epoch: int) -> list[int]:
    positions = np.arange(order.per_stream)
    return [i for stream in range(order.streams) for i in order.index(epoch, stream, positions).tolist()]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("streams", "block"), [(1, 1000), (1, 8), (4, 8), (3, 10), (7, 1)])
def test_an_epoch_holds_every_sample_once_but_the_remainder(sizes: np.ndarray, streams: int, block: int):
    samples = epoch_of(Order(sizes, 5, streams, block), 0)
    assert len(samples) == len(set(samples)) == 100 - 100 % streams
    assert set(samples) <= set(range(100))


def test_epochs_and_seeds_differ_and_are_reproducible():
    order = Order(UNEVEN, 5, 4, 8)
    first = epoch_of(order, 0)
    assert first == epoch_of(Order(UNEVEN, 5, 4, 8), 0)
    assert first != epoch_of(order, 1)
    assert first != epoch_of(Order(UNEVEN, 6, 4, 8), 0)


def test_a_block_is_shuffled_anew_in_every_epoch_and_stream():
    order = Order(np.array([64]), 5, 2, 32)
    blocks = [order.index(epoch, stream, np.arange(32)) - 32 * stream for epoch in range(3) for stream in range(2)]
    assert len({tuple(block) for block in blocks}) == 6


def test_the_remainder_changes_from_epoch_to_epoch():
    order = Order(np.ones(11, np.int64), 0, 4, 4)
    assert len({frozenset(epoch_of(order, epoch)) for epoch in range(5)}) > 1


def test_a_position_does_not_depend_on_what_else_is_asked():
    order = Order(UNEVEN, 5, 4, 8)
    whole = order.index(2, 1, np.arange(25))
    np.testing.assert_array_equal(order.index(2, 1, np.array([13])), whole[13:14])
    np.testing.assert_array_equal(order.index(2, 1, np.array([24, 3, 3])), whole[[24, 3, 3]])


def test_a_block_reads_few_shards():
    order = Order(np.full(50, 100), 1, 2, 500)
    shards = order.index(0, 1, np.arange(500)) // 100
    assert len(np.unique(shards)) == 5
    assert np.abs(np.diff(shards)).max() > 0  # and they are mixed
    assert len(np.unique(shards[:50])) == 5


def test_single_samples_are_shuffled_over_the_whole_epoch():
    order = Order(np.ones(10_000, np.int64), 1, 1, 16)
    samples = order.index(0, 0, np.arange(10_000))
    assert abs(np.corrcoef(samples, np.arange(10_000))[0, 1]) < 0.04


def test_many_shards_are_never_laid_out_sample_by_sample():
    order = Order(np.full(10_000, 10**9), 0, 16, 8192)  # 10^13 samples: only shards and single blocks fit in memory
    samples = order.index(3, 7, order.per_stream - 4096 + np.arange(4096))
    assert len(np.unique(samples)) == 4096
    assert len(np.unique(samples // 10**9)) <= 2


def test_a_pickled_order_goes_on_alike():
    order = Order(UNEVEN, 5, 4, 8)
    want = epoch_of(order, 0)
    assert epoch_of(pickle.loads(pickle.dumps(order)), 0) == want


@pytest.mark.parametrize(("streams", "block"), [(0, 8), (4, 0)])
def test_sizes_must_be_positive(streams: int, block: int):
    with pytest.raises(ValueError, match="above 0"):
        Order(UNEVEN, 5, streams, block)


# ---- at scale: what tests/perf/order.py states, kept from getting worse

NODES = 64
IMAGENET = Run("ImageNet, shards of 140 MB", 1_281_167, 110_000, 140_000_000, streams=512, batch=4096)


def test_a_node_reads_its_share_of_the_shards_and_borders():
    order = IMAGENET.order()
    nodes = [reads(order, node, 1)[0] for node in range(NODES)]
    share = len(order.shard_sizes) / NODES
    assert max(map(len, nodes)) <= share + 3
    assert set().union(*nodes) == set(range(len(order.shard_sizes)))
    readers = np.bincount(np.concatenate(nodes))
    assert readers.max() == 2
    assert (readers > 1).sum() <= NODES - 1, "a shard at each border between two nodes"


def test_a_cache_of_the_whole_set_ends_the_traffic_and_one_of_a_nodes_share_bounds_it():
    order = IMAGENET.order()
    line, count = reads(order, 5, 200), len(order.shard_sizes)
    assert sum(fetched(line, count)) <= count, "each shard once"
    assert sum(fetched(line, count)[150:]) <= 0.1 * sum(map(len, line[150:]))
    small = fetched(line, 18)
    assert max(small) <= 18
    half = sum(fetched(line, count // 2)[100:]) / sum(map(len, line[100:]))
    assert 0.4 < half < 0.7, "permuted anew each epoch, half of the shards are there"


def test_a_batch_of_many_streams_is_as_mixed_as_a_perfect_shuffle():
    """Storage sorted by class: 4096 samples of 512 streams."""
    found = shuffle(IMAGENET, some=6)
    own, ideal = found["order"], found["perfect shuffle"]
    assert own["classes / batch"] > 0.99 * ideal["classes / batch"]
    assert own["bits of class entropy / batch"] > 0.99 * ideal["bits of class entropy / batch"]
    assert own["pairs that meet again, / perfect"] == pytest.approx(1, abs=0.05)
    assert own["% of a batch whose storage neighbour is in it too"] < 1


def test_few_streams_mix_as_many_shards_as_their_blocks_hold():
    """Which is why shards are written in shuffled order: 8 streams of 1024 samples see 80 to 100 classes, not 641."""
    found = shuffle(Run("few", 1_281_167, 110_000, 140_000_000, streams=8, batch=1024), some=6)
    assert 70 < found["order"]["classes / batch"] < 110
    assert found["order"]["pairs that meet again, / perfect"] < 1.6
