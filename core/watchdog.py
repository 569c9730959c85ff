"""Finds a rank that makes no more steps: it says where every thread stands, in its log and in the store, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress

from core.storage import Store, StoreError

HUNG = 70  # exit code of a rank that has found itself hanging
START = 3  # the first step may take so many times as long: weights are read, kernels are built
STDERR = 2  # the descriptor, whatever stands in for sys.stderr
LINGER_S = 3.0  # before the end, which breaks the others' connections: they are to say where they stand as well
LAST_WORDS_S = 20.0  # for the store to take the traces


class Watchdog:
    """A rank that hangs in a collective hangs on all ranks, so each finds out by itself and tells its own traces.

    The interpreter itself may be stuck in native code: a second watch, which needs no lock of Python's, writes the
    traces to standard error and ends the process a little later.
    """

    def __init__(self, limit_s: float, name: str, run: Store) -> None:
        """limit_s: without a step for so long, the rank hangs; 0 = never."""
        self.limit_s, self.name, self.run = limit_s, name, run
        self._closed = threading.Event()
        self._native = 0.0  # when the second watch is due to be set again
        self.begin()
        if limit_s:
            threading.Thread(target=self._watch, name="retort-watchdog", daemon=True).start()

    def begin(self) -> None:
        """A first step is ahead, of the attempt or of a further stage."""
        self._arm(START * self.limit_s)

    def step(self) -> None:
        """The rank is alive."""
        self._arm(self.limit_s)

    def rest(self) -> None:
        """The loop waits for something that has a limit of its own."""
        self._arm(float("inf"))

    def close(self) -> None:
        self._closed.set()
        self._arm(float("inf"))

    def _arm(self, seconds: float) -> None:
        now = time.monotonic()
        self._due = now + seconds
        if not self.limit_s or seconds == float("inf"):
            faulthandler.cancel_dump_traceback_later()
            self._native = 0.0
        elif now > self._native:  # not at every step: each time starts a thread
            self._native = now + self.limit_s / 2
            faulthandler.dump_traceback_later(seconds + self.limit_s + LAST_WORDS_S, exit=True, file=STDERR)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_s / 4)):
            if time.monotonic() > self._due:
                self._bark()

    def _bark(self) -> None:
        print(f"hung: no step for {self.limit_s:.0f} s (launch.hang_s); where each thread stands:", file=sys.stderr)
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        telling = threading.Thread(target=self._tell, daemon=True)
        telling.start()
        telling.join(LAST_WORDS_S)
        time.sleep(LINGER_S)
        os._exit(HUNG)

    def _tell(self) -> None:
        with tempfile.TemporaryFile() as file, suppress(StoreError):
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            self.run.put(f"hangs/{self.name}.txt", file.read())
