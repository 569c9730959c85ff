"""Random numbers as a pure function of what they are for: (seed, epoch, sample, stream), never of a generator's state.

The words of the key are folded one by one through the SplitMix64 finaliser (Steele, Lea, Flood: Fast splittable
pseudorandom number generators, OOPSLA 2014); a sample's draws are the SplitMix64 stream that starts at its folded
key.  Integer arithmetic only, so values are the same on every machine and with every numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
_TO_UNIT = 2.0**-53
_UNIFORM, _PERMUTATION = 1, 2  # first word of the key: keeps the purposes apart


def _mix(words: Words) -> Words:
    """A bijection of 64-bit words in which every input bit changes half of the output bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _fold(state: Words, word: int | NDArray[np.int64]) -> Words:
    bits = np.uint64(word & _MASK) if isinstance(word, int) else word.astype(np.uint64)
    return _mix((state ^ bits) + np.uint64(_GAMMA))


def _key(*words: int) -> Words:
    state: Words = np.zeros(1, np.uint64)
    for word in words:
        state = _fold(state, word)
    return state


def uniform(seed: int, epoch: int, samples: NDArray[np.int64], view: int, count: int) -> NDArray[np.float64]:
    """`count` draws from U[0, 1) for every sample: (B,) -> (B, count).

    `view` separates streams: 2v and 2v + 1 are the geometry and the colours of view v, negative ones are free.
    """
    state = _fold(_key(_UNIFORM, seed, epoch, view), np.asarray(samples, np.int64))
    columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return np.asarray((_mix(state[:, None] + columns) >> np.uint64(11)) * _TO_UNIT, np.float64)


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A uniformly random permutation of range(count) that depends on the key alone."""
    words = _fold(_key(_PERMUTATION, *key), np.arange(count, dtype=np.int64))
    return np.argsort(words, kind="stable")
