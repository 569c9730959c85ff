"""Repeated augmentation: every image of an epoch comes several times, at the same time, in different micro-batches.

Proteus, section 6 of its notes (released sampler of DeiT). An epoch keeps its length, so it holds fewer images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.order import Order

Ints = NDArray[np.int64]
WHOLE = 256  # the released sampler cuts an epoch down to a multiple of this


def repeated(positions: Ints, stream: int, streams: int, repeats: int) -> tuple[Ints, Ints]:
    """Places (B,) in an epoch's permutation, and which copy (B,) each is, at `positions` of one of `streams` streams.

    With every entry of the permutation written `repeats` times in a row, stream s reads entries s, s + streams, ...
    """
    line = np.asarray(positions, np.int64) * streams + stream
    return line // repeats, line % repeats


@dataclass(frozen=True)
class Released:
    """A rank's epoch of the released sampler: its samples, and how many it would have without being cut down."""

    selected: Ints
    samples: int


def released_repeats(length: int, world: int, rank: int, epoch: int, repeats: int) -> Released:
    """The released sampler: a permutation seeded with the epoch number alone, repeated, filled up from its beginning
    to a multiple of the ranks, strided over them, and cut to length // 256 * 256 / world."""
    samples = math.ceil(length * repeats / world)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(epoch)).numpy()
    kept = length // WHOLE * WHOLE // world
    places, _ = repeated(np.arange(min(kept, samples)), rank, world, repeats)
    return Released(order[places % length], samples)


class RepeatedOrder(Order):
    """Sample order with repeated augmentation over the streams of a run.

    An index is sample + length * copy, so that the copies of a sample differ in all draws, which are keyed by it.
    All streams walk the same block shuffle of the whole epoch.
    """

    def __init__(self, shard_sizes: Ints, seed: int, streams: int, block: int, repeats: int) -> None:
        super().__init__(shard_sizes, seed, 1, block)
        self.of_epoch, self.repeats, self.length = streams, repeats, int(self.shard_sizes.sum())

    @property
    def reach(self) -> int:
        return self.length // self.of_epoch

    def index(self, epoch: int, stream: int, positions: Ints) -> Ints:
        """Indices (B,) below length * repeats at `positions` (B,) of a stream."""
        places, copies = repeated(positions, stream, self.of_epoch, self.repeats)
        return super().index(epoch, 0, places) + copies * self.length

    def shards(self, epoch: int, stream: int, position: int) -> tuple[Ints, int]:
        places, _ = repeated(np.array([position]), stream, self.of_epoch, self.repeats)
        samples, end = super().shards(epoch, 0, int(places[0]))
        return samples, -(-(end * self.repeats - stream) // self.of_epoch)
