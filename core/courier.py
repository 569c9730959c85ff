"""Brings what the loop hands over to the store beside the next steps: checkpoints, and rows of metrics.

Two threads a rank, each doing one thing after the other: one writes snapshots to the node's disk, one uploads them
and, on rank 0, commits. What goes wrong with the store is tried again until the loop closes the courier; what is on
the node's disk by then is uploaded by the next attempt.
"""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

from core import parts, retention
from core.commits import SupersededError, commit, read_on
from core.manifest import Manifest, part
from core.retention import Policy
from core.snapshot import Piece, Snapshot
from core.spool import Bytes, Spool
from core.storage import Store, StoreError

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 20.0  # between tries
LAST_WRITE_S, LAST_PUT_S = 600.0, 5.0  # that a closed courier may take for what it has in hand


class Fate(IntEnum):
    """What became of a checkpoint; of several answers the largest counts."""

    COMMITTED = 0
    PENDING = 1
    REFUSED = 2  # it held infinities or NaN
    SUPERSEDED = 3


class Closed(Exception):  # noqa: N818 (says what is the matter)
    """The loop has left; what is not done stays where it is."""


@dataclass
class Delivery:
    """One rank's part of one checkpoint on its way."""

    manifest: Manifest  # without files and slices: what all ranks agree on
    snapshot: Snapshot
    rows: tuple[str, bytes] | None  # key and content of the metrics' segment that ends here (rank 0)
    files: list[tuple[str, bytes | Path]] = field(default_factory=list)  # in the order in which they are uploaded
    written: threading.Event = field(default_factory=threading.Event)
    fate: Fate = Fate.PENDING


class Lane:
    """A thread that does one thing after the other. It does not hold up the end of the process."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, action: Callable[[], None]) -> None:
        self._todo.put(action)

    def close(self, wait_s: float) -> None:
        self._todo.put(None)
        self._thread.join(wait_s)

    def _work(self) -> None:
        while (action := self._todo.get()) is not None:
            action()


class Courier:
    """For one rank of one attempt. Only `save` may make the loop wait, for the disk and never for the store."""

    def __init__(self, run: Store, spool: Spool, rank: int, after: int, policy: Policy) -> None:
        """after: the entry of the run's log with which this attempt started."""
        self.run, self.spool, self.rank, self.policy = run, spool, rank, policy
        self.superseded = False
        self._broken: Exception | None = None  # what ended one of the threads
        self._after = after
        self._sent: list[Delivery] = []  # not all of it has arrived
        self._spare: list[Snapshot] = []
        self._loose: dict[str, Callable[[], object]] = {}  # puts that later ones replace
        self._failing_since: float | None = None
        self._closed = threading.Event()
        self._disk, self._net = Lane("retort-spool"), Lane("retort-upload")

    def save(self, manifest: Manifest, found: list[Piece], rows: tuple[str, bytes] | None) -> Delivery:
        """Copy a part; the rest happens beside. Waits for the snapshot before to be on disk, so that two are enough."""
        for before in self._sent:
            before.written.wait()
        snapshot = self._spare.pop() if self._spare else Snapshot()
        snapshot.take(found)
        delivery = Delivery(manifest, snapshot, rows)
        self._sent.append(delivery)
        self._disk.submit(partial(self._write, delivery))
        self._net.submit(partial(self._guarded, partial(self._deliver, delivery)))
        return delivery

    def keep(self, name: str, put: Callable[[], object]) -> None:
        """Something the run can do without: put when there is time, the newest of each name; failure is only told."""
        self._loose[name] = put
        self._net.submit(lambda: self._guarded(lambda: self._loosely(self._loose.pop(name, _nothing))))

    @property
    def pending(self) -> int:
        """Checkpoints of this rank that are still on their way."""
        self._sent = [d for d in self._sent if d.fate is Fate.PENDING]
        return len(self._sent)

    def check(self) -> None:
        """Raises RuntimeError when no checkpoint would ever arrive again: that must not look like a slow store."""
        if self._broken is not None:
            raise RuntimeError(f"checkpoints cannot be saved any more: {self._broken}") from self._broken

    def failing_s(self) -> float:
        """For how long the store has not done what it was asked."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    def wait(self, limit_s: float) -> None:
        """Until all has arrived, or for `limit_s`."""
        limit = time.monotonic() + limit_s
        while (self.pending or self._loose) and not self.superseded and time.monotonic() < limit:
            self._closed.wait(0.01)

    def close(self) -> None:
        """Stop trying. What is being written to the node's disk is completed."""
        self._closed.set()
        self._disk.close(wait_s=LAST_WRITE_S)
        self._net.close(wait_s=0.0 if self.pending or self._failing_since is not None else LAST_PUT_S)

    # ---- on the disk's thread

    def _write(self, delivery: Delivery) -> None:
        """To the node's disk; where that fails, the part is uploaded from memory."""
        manifest, name = delivery.manifest, part(self.rank)
        try:
            about = parts.describe(manifest if self.rank == 0 else None, delivery.snapshot.describe())
            wanted: list[tuple[str, Bytes]] = [*([delivery.rows] if delivery.rows else []),
                      (f"{manifest.key}/{name}.safetensors", delivery.snapshot.content()),
                      (f"{manifest.key}/{name}.json", about)]  # fmt: skip
            try:
                delivery.files = [(key, self.spool.write(key, data)) for key, data in wanted]
                self._spare.append(delivery.snapshot)
            except OSError as error:
                _say(f"checkpoint of step {manifest.position.step}: {error}: uploading it from memory")
                delivery.files = [(key, bytes(data)) for key, data in wanted]
        except Exception as error:
            self._broken = error
        finally:
            delivery.written.set()

    # ---- on the uploading thread

    def _deliver(self, delivery: Delivery) -> None:
        delivery.written.wait()
        if self._broken is not None:
            raise Closed
        for key, source in delivery.files:
            self._patiently(partial(_put, self.run, key, source))
        fate = self._commit(delivery.manifest) if self.rank == 0 else Fate.COMMITTED
        for key, source in delivery.files:
            if isinstance(source, Path):
                self.spool.remove(key)
        delivery.files, delivery.fate = [], fate

    def _commit(self, manifest: Manifest) -> Fate:
        """When all ranks' parts are there.  Raises SupersededError."""
        whole = self._patiently(lambda: parts.collect(self.run, manifest.key))
        pause = 0.01
        while whole is None:
            self._sleep(pause)
            pause = min(1.5 * pause, 1.0)
            # A newer attempt may have committed these very parts, and may even have removed them since.
            self._patiently(partial(read_on, self.run, manifest.key, self._after))
            whole = self._patiently(lambda: parts.collect(self.run, manifest.key))
        if isinstance(whole, str):
            _say(f"warning: no checkpoint at step {manifest.position.step}: {whole}")
            self._loosely(lambda: retention.drop(self.run, manifest.key))
            return Fate.REFUSED
        self._after = self._patiently(lambda: commit(self.run, whole, self._after))
        self.policy.learn(whole, self._after)
        self._loosely(lambda: retention.retain(self.run, self.policy))
        return Fate.COMMITTED

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Closed:
            pass
        except SupersededError as error:
            _say(f"{error}: leaving")
            self.superseded = True
        except Exception as error:
            self._broken = error

    def _loosely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except StoreError as error:
            self._failed(error)
        else:
            self._failing_since = None

    def _patiently(self, action: Callable[[], T]) -> T:
        """Until the store has done it.  Raises Closed."""
        pause = FIRST_PAUSE_S
        while True:
            if self._closed.is_set():
                raise Closed
            try:
                done = action()
            except StoreError as error:
                self._failed(error)
                self._sleep(random.uniform(pause / 2, pause))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                if self._failing_since is not None:
                    _say(f"store: answers again after {self.failing_s():.0f} s")
                self._failing_since = None
                return done

    def _failed(self, error: StoreError) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            _say(f"store: {error}; trying again beside training")

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise Closed


def _put(run: Store, key: str, source: bytes | Path) -> None:
    if isinstance(source, Path):
        try:
            run.put_file(key, source)
        except FileNotFoundError:
            if run.size(key) is None:  # else a newer attempt on this node has uploaded it
                raise RuntimeError(f"{source} has vanished before it was uploaded: set checkpoint.spool") from None
    else:
        run.put(key, source)


def _nothing() -> None:
    pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
