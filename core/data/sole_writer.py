"""One writer at a time in a place, with no more than creation by one winner: no clock and no server need agree.

writers/000001       who writes; created by one winner
writers/000001.beat  a number that grows while the writer lives
Whoever finds a claim watches its beat.  One that stands still belongs to a writer that has died, and the next number
may be claimed; a writer that was only asleep finds that out before it commits anything.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from core import small_json
from core.storage import MissingObject, Store, StoreError

FOLDER = "writers"
BEAT_S, BEATS = 5.0, 4  # a writer is dead when so many beats are missing


class OtherWriter(StoreError):  # noqa: N818 (says who is there)
    """Somebody else writes here."""


class SoleWriter:
    """Entered by one at a time.  Raises OtherWriter."""

    def __init__(self, store: Store, say: Callable[[str], None]) -> None:
        self._store, self._say = store, say
        self._number = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> SoleWriter:
        newest = self._newest()
        if newest and self._lives(newest):
            raise self._other(newest)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        if not self._store.put_if_absent(_key(newest + 1), json.dumps(who).encode()):
            raise self._other(newest + 1)
        self._number = newest + 1
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        with suppress(StoreError):  # then the claim ends as that of a writer that died
            if self._newest() == self._number:
                self._store.delete(*(entry.key for entry in self._store.list(f"{FOLDER}/")))

    def check(self) -> None:
        """Raises OtherWriter when this writer was taken for dead and another one has begun."""
        newest = self._newest()
        if newest != self._number:
            raise self._other(newest)

    def _live(self) -> None:
        beats = 0
        while not self._left.wait(BEAT_S):
            beats += 1
            with suppress(StoreError):
                self._store.put(_beat(self._number), str(beats).encode())

    def _lives(self, number: int) -> bool:
        seen = self._get(_beat(number))
        self._say(f"watching for {BEATS * BEAT_S:.0f} s whether {self._who(number)} still writes here")
        for _ in range(BEATS):
            time.sleep(BEAT_S)
            if self._store.size(_key(number)) is None:
                return False
            if self._get(_beat(number)) != seen:
                return True
        return False

    def _newest(self) -> int:
        keys = [entry.key for entry in self._store.list(f"{FOLDER}/")]
        return max((int(key[len(FOLDER) + 1 :]) for key in keys if not key.endswith(".beat")), default=0)

    def _get(self, key: str) -> bytes:
        try:
            return self._store.get(key)
        except MissingObject:
            return b""

    def _who(self, number: int) -> str:
        try:
            who = small_json.read(self._store, _key(number), dict)
        except (MissingObject, small_json.Unreadable):
            who = {}
        return f"process {who.get('pid')} on {who.get('host')} (since {who.get('since')})" if who else "another writer"

    def _other(self, number: int) -> OtherWriter:
        return OtherWriter(
            f"{self._store.uri}: {self._who(number)} writes here; wait until it has finished, or end it: what it has "
            "finished is kept"
        )


def _key(number: int) -> str:
    return f"{FOLDER}/{number:06d}"


def _beat(number: int) -> str:
    return f"{_key(number)}.beat"
