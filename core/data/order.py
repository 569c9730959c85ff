"""Which sample stands at which place of an epoch: a pure function, independent of ranks and workers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.data.draws import permutation

Ints = NDArray[np.int64]
SHARDS, _BLOCK = 0, 1  # what is being permuted
_CACHED_BLOCKS = 256


class Order:
    """Block shuffle over shards with fixed streams.

    Per epoch the shards are permuted and laid end to end; that line is cut into `streams` equal contiguous parts (a
    remainder below `streams` samples is left out, another one each epoch), every part into blocks of `block` samples,
    and positions are permuted inside each block.  So a stream reads few shards at a time, whatever reads the stream.
    Shards of one sample each (a folder of images) give a full shuffle.

    shard_sizes: (shards,) samples per shard.  seed: of the run.  per_stream: samples of a stream per epoch.
    """

    def __init__(self, shard_sizes: Ints, seed: int, streams: int, block: int) -> None:
        if streams < 1 or block < 1:
            raise ValueError(f"order: streams ({streams}) and block ({block}) must be above 0")
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.shard_sizes = self.shard_sizes[self.shard_sizes > 0]
        self.seed, self.streams, self.block = seed, streams, block
        self.per_stream = int(self.shard_sizes.sum()) // streams
        self._cache()

    @property
    def reach(self) -> int:
        """Positions of a stream in an epoch."""
        return self.per_stream

    def index(self, epoch: int, stream: int, positions: Ints) -> Ints:
        """Samples at `positions` (B,) of a stream, each in [0, per_stream): (B,) indices into the source."""
        positions = np.asarray(positions, np.int64)
        blocks = positions // self.block
        line = np.empty_like(positions)
        for number in np.unique(blocks).tolist():
            here = blocks == number
            line[here] = self._shuffled(epoch, stream, number)[positions[here] - number * self.block]
        ends, last = self._epoch(epoch)
        shard = np.searchsorted(ends, line, side="right")
        return last[shard] + line - ends[shard]

    def shards(self, epoch: int, stream: int, position: int) -> tuple[Ints, int]:
        """Of the block that holds `position`: a sample of each shard that it reads, and the position behind it."""
        first = position // self.block * self.block
        end = min(first + self.block, self.per_stream)
        ends, last = self._epoch(epoch)
        here = np.array([first, end - 1]) + stream * self.per_stream
        low, high = np.searchsorted(ends, here, side="right")
        return last[low : high + 1] - 1, end

    def _epoch_line(self, epoch: int) -> tuple[Ints, Ints]:
        """Where each permuted shard ends, on the epoch's line and (in source indices) in the source."""
        shards = permutation(len(self.shard_sizes), self.seed, SHARDS, epoch)
        return np.cumsum(self.shard_sizes[shards]), np.cumsum(self.shard_sizes)[shards]

    def _block_line(self, epoch: int, stream: int, number: int) -> Ints:
        """Places on the epoch's line of one block of a stream, shuffled."""
        first = number * self.block
        size = min(self.block, self.per_stream - first)
        shuffled = permutation(size, self.seed, _BLOCK, epoch, stream, number)
        return stream * self.per_stream + first + shuffled

    # Both caches only save time: an entry is what the function would compute again.
    def _cache(self) -> None:
        self._epoch = lru_cache(maxsize=2)(self._epoch_line)
        self._shuffled = lru_cache(maxsize=_CACHED_BLOCKS)(self._block_line)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_epoch", "_shuffled")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._cache()
