"""The sample order of DINOv2's linear probe: an endless stream that each rank shuffles on its own share.

Proteus, section 9.1 of its notes: needed to train a probe on the very batches of the published protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def inside_out(values: Ints, generator: torch.Generator) -> Ints:
    """Fisher-Yates shuffle built from its front; each value after the first draws its place up to there."""
    out = np.empty_like(values)
    for i, value in enumerate(values):
        j = int(torch.randint(0, i + 1, size=(1,), generator=generator)) if i else 0
        out[i], out[j] = out[j], value
    return out


def sharded_passes(
    samples: int, world: int, rank: int, seed: int, start: int, *, fresh: bool = False
) -> Iterator[Ints]:
    """A rank's passes from number `start` on: every `world`-th entry of one permutation, shuffled again in each.

    Each pass has a seed of its own (seed + rank + pass * 2**24), so that passes can be skipped. What is left over when
    samples are shared out is dropped. fresh: the later release's shuffle, one permutation a pass.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).numpy()
    own = order[rank::world][: samples // world]
    number = start
    while True:
        generator = torch.Generator().manual_seed(seed + rank + (number << 24))
        if fresh:
            yield own[torch.randperm(len(own), generator=generator, dtype=torch.int32).numpy()]
        else:
            yield inside_out(own, generator)
        number += 1


def sharded_indices(
    samples: int, world: int, rank: int, seed: int, advance: int, count: int, *, fresh: bool = False
) -> Ints:
    """`count` samples of a rank after skipping `advance`: whole multiples of all samples (not of the rank's share) skip
    passes, the rest skips entries."""
    passes = sharded_passes(samples, world, rank, seed, advance // samples, fresh=fresh)
    entries = (entry for one in passes for entry in one)
    skipped = advance % samples
    return np.fromiter(islice(entries, skipped, skipped + count), np.int64, count)
