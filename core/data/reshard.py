"""A data set rewritten once into indexed shards: mixed, unreadable images left out, large ones made smaller.

The result is a pure function of source and settings: neither the number of workers nor where it was interrupted
counts.  Finished shards are kept; the same command goes on behind them.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.convert import Converter, Outcome
from core.data.draws import permutation
from core.data.ledger import Ledger, Part
from core.data.shards import SHARD_BYTES, Sample, batched, write_index, write_shard
from core.data.sole_writer import SoleWriter
from core.data.source import DataError, Source
from core.storage import Store

SEED = 0  # of the order of samples: shards of one class each could not be mixed again by shuffling blocks
_RUNS, _SHARD = 0, 1  # what is being permuted
CHUNK = 64  # samples that a worker takes at a time
SAY_EVERY_S = 5.0
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """What the result depends on beside the source.  short: pixels, 0 keeps files as they are.  quality: of JPEG."""

    short: int = 0
    quality: int = 90
    split: str = ""
    licence: str = ""
    shard_bytes: int = SHARD_BYTES


@dataclass
class Reshard:
    """One rewriting.  workers: processes, 0 = one a core."""

    source: Source
    settings: Settings
    say: Callable[[str], None]
    workers: int = 0

    def write(self, store: Store) -> dict[str, Any]:
        """Write all readable samples under `store`; returns the index.

        Raises DataError (nothing readable; begun or finished with another source or other settings) and
        core.storage.StoreError, also when another process writes here.
        """
        plan = asdict(self.settings) | {"source": self.source.fingerprint(), "samples": len(self.source)}
        with SoleWriter(store, self.say) as writer:
            ledger = Ledger(store, plan)
            if ledger.index is None:
                if ledger.parts:
                    self.say(f"going on behind {ledger.place} of {len(self.source)} images")
                self._write_shards(ledger, writer)
                return self._finish(ledger)
            ledger.close()
            return ledger.index

    def _write_shards(self, ledger: Ledger, writer: SoleWriter) -> None:
        """Shards are written one behind the other by a thread, while workers convert what comes next."""
        place = ledger.place
        with ThreadPoolExecutor(1) as thread:
            before: Future[None] | None = None
            for batch in batched(self._outcomes(place), self.settings.shard_bytes):
                place += len(batch)
                if before:
                    before.result()
                before = thread.submit(self._write_shard, ledger, writer, batch, place)
            if before:
                before.result()

    def _write_shard(self, ledger: Ledger, writer: SoleWriter, batch: list[Outcome], place: int) -> None:
        """One shard, its samples shuffled."""
        writer.check()
        kept = [outcome for outcome in batch if outcome.sample]
        kept = [kept[i] for i in permutation(len(kept), SEED, _SHARD, ledger.parts).tolist()]
        samples = _apart(outcome.sample for outcome in kept if outcome.sample)
        entry = write_shard(ledger.store, ledger.parts, samples, self.source.classes) if samples else None
        problems = [
            {"kind": "no text" if outcome.sample else "corrupt", "key": outcome.key, "reason": outcome.problem}
            for outcome in batch
            if outcome.problem
        ]
        problems += [{"kind": "black", "key": o.key, "reason": "every pixel is black"} for o in batch if o.black]
        rows = [(outcome.key, outcome.digest, outcome.sample.label) for outcome in kept if outcome.sample]
        ledger.add(Part(entry, place, rows, problems))

    def _finish(self, ledger: Ledger) -> dict[str, Any]:
        skipped = [{"kind": "skipped", "key": key, "reason": reason} for key, reason in self.source.skipped]
        problems = ledger.write_problems(skipped)
        facts = {"split": self.settings.split, "licence": self.settings.licence}
        index = write_index(ledger.store, ledger.entries(), self.source.classes, **facts, problems=problems,
                            made=ledger.plan)  # fmt: skip
        ledger.close()
        return index

    def _outcomes(self, place: int) -> Iterator[Outcome]:
        """What becomes of the samples behind a place in the order."""
        order, ends = mixed(self.source)
        chunks = _chunks(order, ends, place)
        converter = Converter(self.source, self.settings.short, self.settings.quality)
        begun = said = time.monotonic()
        done = place
        with _results(converter, chunks, self.workers or len(os.sched_getaffinity(0))) as results:
            for outcomes in results:
                yield from outcomes
                done += len(outcomes)
                if (now := time.monotonic()) - said > SAY_EVERY_S:
                    said, rate = now, (done - place) / (now - begun)
                    left = (len(order) - done) / rate
                    self.say(f"{done}/{len(order)} images, {rate:.0f} img/s, {left / 60:.1f} min left")


def _apart(samples: Iterable[Sample]) -> list[Sample]:
    """Samples of which no two share a key: readers would take them for one."""
    seen, tried, found = set[str](), Counter[str](), list[Sample]()
    for sample in samples:
        key = sample.key
        while key in seen:
            tried[sample.key] += 1
            key = f"{sample.key}-{tried[sample.key]}"
        seen.add(key)
        found.append(sample._replace(key=key))
    return found


def mixed(source: Source) -> tuple[Ints, Ints]:
    """All samples in one fixed mixed order, and the places where its runs of neighbours end.

    Runs are what is best read together (Source.run, never across stored shards): they are permuted over all the data.
    """
    sizes = source.shard_sizes
    whole, rest = np.divmod(sizes, source.run)
    runs = np.repeat(np.full(len(sizes), source.run), whole + (rest > 0))
    runs[np.cumsum(whole + (rest > 0))[rest > 0] - 1] = rest[rest > 0]
    starts = np.cumsum(runs) - runs
    order = permutation(len(runs), SEED, _RUNS)
    runs, starts = runs[order], starts[order]
    ends = np.cumsum(runs)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - runs), runs), ends


def _chunks(order: Ints, ends: Ints, place: int) -> Iterator[list[int]]:
    """Samples behind a place, in portions for a worker that end where a run does."""
    while place < len(order):
        end = int(ends[np.searchsorted(ends, min(place + CHUNK, len(order)))])
        yield order[place:end].tolist()
        place = end


@contextmanager
def _results(converter: Converter, chunks: Iterable[list[int]], workers: int) -> Iterator[Iterator[list[Outcome]]]:
    """The chunks' outcomes in order; one worker is this process."""
    if workers == 1:
        yield map(converter, chunks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (converter,))
    try:
        yield _in_order(pool, iter(chunks), 2 * workers)
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps for its memory: the same command goes on; try a smaller "
                        "WORKERS") from None  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[int]], ahead: int) -> Iterator[list[Outcome]]:
    waiting = deque(pool.submit(_convert, chunk) for chunk in itertools.islice(chunks, ahead))
    while waiting:
        outcomes = waiting.popleft().result()
        waiting.extend(pool.submit(_convert, chunk) for chunk in itertools.islice(chunks, 1))
        yield outcomes


_worker: list[Converter] = []  # of a worker process: sent once, not with each chunk


def _begin(converter: Converter) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent tells its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # a process a core
    _worker.append(converter)


def _end_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _convert(chunk: list[int]) -> list[Outcome]:
    return _worker[0](chunk)


def summary(index: dict[str, Any]) -> str:
    """What was written, under which licence, and what was left out."""
    size = sum(shard["bytes"] for shard in index["shards"])
    lines = [f"{index['samples']} images in {len(index['shards'])} shards, {size / 1e6:.1f} MB"]
    lines.append(f"licence: {index['licence'] or 'not stated; give LICENCE=... when you know it'}")
    counts = [f"{count} {_MEANING[kind]}" for kind, count in index["problems"].items()]
    return "\n".join([*lines, *counts, *(["they are listed in problems.jsonl beside the shards"] if counts else [])])


_MEANING = {
    "black": "wholly black images, which are kept",
    "corrupt": "unreadable images left out",
    "duplicate": "images with the content of another one, which are kept",
    "no text": "images without their text, which cannot be read",
    "skipped": "files that are no sample passed over",
}
