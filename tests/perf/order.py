"""The sample order on 64 nodes of 8 ranks, simulated: what each node reads, and how well samples are mixed.

Network bytes are those of the real order's shards through a cache that drops what was used longest ago. A shuffle is
judged by statistics that a perfect one (a permutation of all samples) gives too; samples lie sorted by class, the worst
case. `python -m tests.perf.order` takes a minute and needs no server.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.order import Order
from core.recipe import Data
from jobs.table import table

Ints = NDArray[np.int64]
NODES, RANKS, BLOCK = 64, 8, Data().block
CLASSES = 1000


@dataclass(frozen=True)
class Run:
    """A data set of equal shards, read by all ranks. batch: global; streams: its micro-batches."""

    name: str
    samples: int
    sample_bytes: int
    shard_bytes: int
    streams: int
    batch: int

    def sizes(self) -> Ints:
        """Samples of each shard."""
        each = self.shard_bytes // self.sample_bytes
        sizes = np.full(-(-self.samples // each), each)
        sizes[-1] -= sizes.sum() - self.samples
        return sizes

    def order(self) -> Order:
        return Order(self.sizes(), seed=22, streams=self.streams, block=BLOCK)


RUNS = (
    Run("ImageNet, shards of 140 MB", 1_281_167, 110_000, 140_000_000, 512, 4096),
    Run("ImageNet, shards of 256 MiB", 1_281_167, 110_000, 256 << 20, 512, 4096),
    Run("ImageNet at 256 px, shards of 256 MiB", 1_281_167, 26_000, 256 << 20, 512, 4096),
    Run("40 M images, shards of 256 MiB", 40_000_000, 26_000, 256 << 20, 512, 4096 * 4),
)


# ---- network


def shards_of(order: Order, epoch: int, streams: range) -> list[int]:
    """Shards that consecutive streams read in an epoch, in the order of need, all streams block by block."""
    ends = np.cumsum(order.shard_sizes)
    found: dict[int, None] = {}
    position = 0
    while position < order.per_stream:
        parts = [order.shards(epoch, stream, position) for stream in streams]
        samples = np.concatenate([samples for samples, _ in parts])
        found |= dict.fromkeys(np.searchsorted(ends, samples, side="right").tolist())
        position = parts[0][1]
    return list(found)


def fetched(line: list[list[int]], room: int) -> list[int]:
    """Of each epoch's shards, how many are not in a cache of so many, which drops what was used longest ago."""
    held: OrderedDict[int, None] = OrderedDict()
    missing = []
    for shards in line:
        missing.append(0)
        for shard in shards:
            missing[-1] += shard not in held
            held[shard] = None
            held.move_to_end(shard)
            if len(held) > room:
                held.popitem(last=False)
    return missing


def reads(order: Order, node: int, epochs: int) -> list[list[int]]:
    """Shards that a node's ranks read in each epoch: consecutive ranks read consecutive streams."""
    each = order.streams // NODES
    return [shards_of(order, epoch, range(node * each, (node + 1) * each)) for epoch in range(epochs)]


def network(run: Run, epochs: int = 100) -> dict[str, float]:
    """Per node and epoch: of all nodes in one epoch, and through caches of some nodes in the last half of `epochs`."""
    order = run.order()
    once, long = [reads(order, n, 1)[0] for n in range(NODES)], [reads(order, n, epochs) for n in range(0, NODES, 8)]
    count, share = len(order.shard_sizes), len(order.shard_sizes) / NODES
    readers = np.bincount(np.concatenate(once), minlength=count)
    rooms = {"of a node's share": int(np.ceil(share)) + 2, "of half the set": count // 2, "of the set": count}
    found = {f"GB fetched, cache {name}": [n for line in long for n in fetched(line, room)[epochs // 2 :]]
             for name, room in rooms.items()}  # fmt: skip
    gigabytes = {name: statistics.mean(values) * run.shard_bytes / 1e9 for name, values in found.items()}
    return {
        "shards": count,
        "shards / node, share": share,
        "shards / node, mean": statistics.mean(map(len, once)),
        "shards / node, most": max(map(len, once)),
        "% of shards read by several nodes": 100 * float((readers > 1).mean()),
        "nodes that read a shard, most": int(readers.max()),
        "GB of a node's share": run.samples * run.sample_bytes / 1e9 / NODES,
        **gigabytes,
    }


# ---- shuffle


def batches(order: Order, epoch: int, batch: int, numbers: Ints) -> Ints:
    """Samples (len(numbers), batch) of some global batches: an equal part of every stream."""
    each = batch // order.streams
    positions = (numbers[:, None] * each + np.arange(each)).reshape(-1)
    rows = [order.index(epoch, stream, positions).reshape(len(numbers), each) for stream in range(order.streams)]
    return np.concatenate(rows, axis=1)


def perfect(samples: int, batch: int, epoch: int) -> Ints:
    """All batches of a permutation."""
    order = np.random.default_rng(epoch).permutation(samples)
    return order[: samples // batch * batch].reshape(-1, batch)


def entropy(classes: Ints) -> float:
    """Bits."""
    shares = np.unique(classes, return_counts=True)[1] / classes.size
    return float(-(shares * np.log2(shares)).sum())


def meetings(first: Ints, second: Ints) -> float:
    """Of pairs in a batch of one epoch, the share that is in one batch of another epoch again.

    first: (n, B) some batches.  second: (N,) the batch of each sample in the other epoch, -1 without.
    """
    together = []
    for row in second[first]:
        counts = np.unique(row[row >= 0], return_counts=True)[1]
        together.append((counts * (counts - 1)).sum() / (first.shape[1] * (first.shape[1] - 1)))
    return float(np.mean(together))


def quality(few: Ints, places: Ints, samples: int) -> dict[str, float]:
    """few: (n, B) some batches of an epoch.  places: (N,) batch of each sample in the next epoch."""
    neighbours = np.diff(np.sort(few, axis=1), axis=1)
    return {
        "classes / batch": float(np.mean([len(np.unique(row * CLASSES // samples)) for row in few])),
        "bits of class entropy / batch": float(np.mean([entropy(row * CLASSES // samples) for row in few])),
        "storage distance of samples next to each other, / perfect": float(
            np.abs(np.diff(few, axis=1)).mean() / (samples / 3)
        ),
        "% of a batch whose storage neighbour is in it too": 100 * float((neighbours == 1).mean()),
        "pairs that meet again, / perfect": meetings(few, places) / (few.shape[1] / samples),
    }


def shuffle(run: Run, some: int = 24) -> dict[str, dict[str, float]]:
    """Of the order, and of a perfect shuffle of the same samples into the same batches."""
    order, count = run.order(), run.samples // run.batch
    numbers = np.linspace(0, count - 2, some).astype(np.int64)
    found = {}
    for name in ("order", "perfect shuffle"):
        places = np.full(run.samples, -1)
        if name == "order":
            few = batches(order, 0, run.batch, numbers)
            each = run.batch // run.streams
            for stream in range(run.streams):
                positions = np.arange(order.per_stream)
                places[order.index(1, stream, positions)] = positions // each
        else:
            few, later = perfect(run.samples, run.batch, 0)[numbers], perfect(run.samples, run.batch, 1)
            places[later.reshape(-1)] = np.repeat(np.arange(len(later)), run.batch)
        found[name] = quality(few, places, run.samples)
    return found


def measure() -> dict[str, Any]:
    """Network and shuffle of every run."""
    one = Run("ImageNet, shards of 140 MB, 8 streams", 1_281_167, 110_000, 140_000_000, 8, 1024)
    shuffled = {run.name: shuffle(run) for run in (RUNS[0], RUNS[2], one)}
    return {"nodes": NODES, "ranks": RANKS, "block": BLOCK, "network": {run.name: network(run) for run in RUNS},
            "shuffle": shuffled}  # fmt: skip


def main() -> None:
    found = measure()
    print(f"{NODES} nodes of {RANKS} ranks, a stream each, blocks of {BLOCK}: per node and epoch\n")
    for what, values in found["network"].items():
        print(table([what, ""], [[name, f"{value:.4g}"] for name, value in values.items()]), end="\n\n")
    print(f"Shuffle, storage sorted by {CLASSES} classes\n")
    for what, kinds in found["shuffle"].items():
        rows = [[name, *(f"{values[name]:.4g}" for values in kinds.values())] for name in kinds["order"]]
        print(table([what, *kinds], rows), end="\n\n")


if __name__ == "__main__":
    main()
