"""Fetching the shards that come next while the present ones are read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from weakref import WeakMethod

from core.cache import CacheFull
from core.data.order import Order
from core.data.source import Source

AT_ONCE = 2  # shards that a process fetches: while the last ranges of one come in, those of the next are asked for
LOOK_AGAIN_S = 10.0  # well below core.cache.HELD_S: what is in the window stays marked as in use


def upcoming(order: Order, streams: range, epoch: int, position: int) -> Iterator[list[int]]:
    """One sample of each shard that the streams read from `position` of an epoch on, block after block.

    A shard is named once.  Ends with the next epoch.
    """
    seen: set[int] = set()
    for number in (epoch, epoch + 1):
        while position < order.reach:
            parts = [order.shards(number, stream, position) for stream in streams]
            new = dict.fromkeys(sample for samples, _ in parts for sample in samples.tolist())
            yield [sample for sample in new if sample not in seen]
            seen |= new.keys()
            position = min(end for _, end in parts)
        position = 0


class Prefetch:
    """Threads in every process that reads: they fetch the shards of the present block and the next `source.ahead`.

    They, the workers and the ranks of a node share this work through the cache, which lets one fetch a shard and drops
    nothing that another is about to read.  What cannot be fetched is left to the read, which says why.  The threads are
    daemons: they hold up neither the end of a process nor a fork, after which the child starts its own.

    streams: that this rank reads.
    """

    def __init__(self, source: Source, order: Order, streams: range) -> None:
        self.source, self.order, self.streams = source, order, streams
        self._pid = 0

    def at(self, epoch: int, position: int) -> None:
        """Say where reading has got to."""
        if not self.source.ahead:
            return
        self._place = epoch, position
        if self._pid != os.getpid():
            self._pid = os.getpid()
            _start(WeakMethod(self._pass))

    def _pass(self, failed: set[int]) -> bool:
        """Go through the window in the order of need, up to the first shard that had to be downloaded."""
        blocks = upcoming(self.order, self.streams, *self._place)
        window = chain(next(blocks, []), islice(chain.from_iterable(blocks), self.source.ahead))
        for sample in window:
            if sample in failed:
                continue
            try:
                if self.source.fetch(sample % len(self.source)):
                    return True
            except CacheFull:
                return False
            except Exception:  # whatever it is, the read meets it again
                failed.add(sample)
        return False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pid": 0}


def _start(work: WeakMethod[Callable[[set[int]], bool]]) -> None:
    """Work in threads for as long as the object is there."""

    def run() -> None:
        failed: set[int] = set()
        while (once := work()) is not None:
            more = once(failed)
            del once
            if not more:
                time.sleep(LOOK_AGAIN_S)

    for _ in range(AT_ONCE):
        threading.Thread(target=run, name="prefetch", daemon=True).start()
