"""The pulse of a run: written from a thread of rank 0, so that a slow store never holds up a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from core.storage import StoreError
from jobs.errors import redact
from jobs.record import ACTIVE, Run


class Heartbeat:
    """Writes the newest progress every `every_s`, or what there is every `rest_s`; calls `on_end` when the run was
    cancelled, given to a newer attempt, or is to make room."""

    def __init__(
        self, run: Run, attempt: int, on_end: Callable[[str], None], every_s: float = 2.0, rest_s: float = 10.0
    ) -> None:
        self.run, self.attempt, self.on_end, self.every_s, self.rest_s = run, attempt, on_end, every_s, rest_s
        self._progress: dict[str, Any] = {}
        self._written: dict[str, Any] | None = None
        self._when = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._try(self._write)

    def progress(self, row: dict[str, Any]) -> None:
        """Take over a row of metrics; returns at once."""
        self._progress = row

    def _loop(self) -> None:
        self._try(self._write)
        while not self._done.wait(self.every_s):
            if self._progress is not self._written or time.monotonic() - self._when > self.rest_s:
                self._try(self._write)
            self._try(self._look)

    def _write(self) -> None:
        row = self._progress
        self.run.beat(row, self.attempt)
        self._written, self._when = row, time.monotonic()

    def _look(self) -> None:
        last = self.run.last()
        if last.state not in ACTIVE or last.attempt > self.attempt:
            self.on_end(f"run {self.run.id} is {last.state} (attempt {last.attempt}): saving and leaving")

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except StoreError as error:  # training goes on; the next beat tries again
            print(f"heartbeat: {redact(str(error))}", flush=True)
