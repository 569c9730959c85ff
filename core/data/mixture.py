"""The order of several sets in fixed shares: an epoch goes round small ones, and takes another part of large ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.data.draws import permutation
from core.data.order import SHARDS, Order

Ints = NDArray[np.int64]


def apportioned(weights: Sequence[float], total: int) -> Ints:
    """(K,) whole numbers that sum to `total` and differ from its exact shares by less than one: largest remainders."""
    exact = np.array(weights, np.float64) * (total / sum(weights))
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def before(positions: Ints, counts: Ints) -> Ints:
    """(B, K): how many of the first `positions` (B,) places are each part's, of as many as all `counts` (K,) together.

    The parts are interleaved as evenly as whole numbers allow: each takes its share of what those in front leave over,
    rounded down, so that every place is one part's, and each part has its count at the end.
    """
    left, total, out = np.asarray(positions, np.int64), int(counts.sum()), []
    for count in counts.tolist():
        out.append(left * count // max(total, 1))
        left, total = left - out[-1], total - count
    return np.stack(out, axis=-1)


class PassOrder(Order):
    """Block shuffle of a set that is walked at its own pace: an epoch goes on where the one before has stopped.

    Passes over the set, each with its shards permuted anew, form one endless line; epoch e takes its places from
    e * streams * per_stream on.  So no sample comes again before all others have come.  An index is
    sample + stride * pass, with passes counted from the epoch's first, so that copies in an epoch differ in all draws.
    """

    def __init__(self, shard_sizes: Ints, seed: int, streams: int, block: int, per_stream: int, stride: int) -> None:
        super().__init__(shard_sizes, seed, streams, block)
        self.length, self.per_stream, self.stride = int(self.shard_sizes.sum()), per_stream, stride

    def _epoch_line(self, epoch: int) -> tuple[Ints, Ints]:
        size = self.streams * self.per_stream
        first, last = epoch * size, (epoch + 1) * size
        ends, lasts = [], []
        for number in range(first // self.length, -(-last // self.length)):
            shards = permutation(len(self.shard_sizes), self.seed, SHARDS, number)
            ends.append(np.cumsum(self.shard_sizes[shards]) + number * self.length - first)
            lasts.append(np.cumsum(self.shard_sizes)[shards] + (number - first // self.length) * self.stride)
        end, behind = np.concatenate(ends or [np.zeros(0, np.int64)]), np.concatenate(lasts or [np.zeros(0, np.int64)])
        return end[end > 0], behind[end > 0]


class MixtureOrder(Order):
    """Sample order in which every stream holds each source's share of places, evenly interleaved.

    shard_sizes: of each source.  An epoch has as many samples as the sources together.  Indices number these through;
    those of copies are higher by multiples of their number.
    """

    def __init__(
        self, shard_sizes: Sequence[Ints], weights: Sequence[float], seed: int, streams: int, block: int
    ) -> None:
        super().__init__(np.concatenate(shard_sizes), seed, streams, block)
        total = int(self.shard_sizes.sum())
        self.counts = apportioned(weights, self.per_stream)
        self.offsets = np.cumsum([0, *(int(sizes.sum()) for sizes in shard_sizes)])
        seeds = [zlib.crc32(f"mixture/{seed}/{k}".encode()) for k in range(len(shard_sizes))]
        self.parts = [PassOrder(sizes, own, streams, block, count, total)
                      for sizes, own, count in zip(shard_sizes, seeds, self.counts.tolist(), strict=True)]  # fmt: skip

    def index(self, epoch: int, stream: int, positions: Ints) -> Ints:
        positions = np.asarray(positions, np.int64)
        places = before(positions, self.counts)
        taken = before(positions + 1, self.counts) > places
        out = np.empty_like(positions)
        for k, part in enumerate(self.parts):
            own = taken[:, k]
            if own.any():
                out[own] = part.index(epoch, stream, places[own, k]) + self.offsets[k]
        return out

    def shards(self, epoch: int, stream: int, position: int) -> tuple[Ints, int]:
        """Of the blocks that are read at `position`, up to where the first of them ends."""
        places = before(np.array([position]), self.counts)[0]
        found, stops = [], [self.per_stream]
        for k, part in enumerate(self.parts):
            if places[k] < part.per_stream:
                samples, end = part.shards(epoch, stream, int(places[k]))
                found.append(samples + self.offsets[k])
                stops.append(self._behind(k, end))
        return np.concatenate(found), max(position + 1, min(stops))

    def _behind(self, k: int, place: int) -> int:
        """The first position in front of which there are `place` places of source k."""
        low, high = 0, self.per_stream
        while low < high:
            middle = (low + high) // 2
            reached = before(np.array([middle]), self.counts)[0, k] >= place
            low, high = (low, middle) if reached else (middle + 1, high)
        return low
