"""Keeps logs of an attempt in the store while they grow, so that they outlive the machine."""

from __future__ import annotations

import threading
from pathlib import Path

from core.storage import StoreError
from jobs.errors import redact
from jobs.record import Run


class LogKeeper:
    """Copies the logs of an attempt to the store every `every_s`, and once more at the end."""

    def __init__(self, run: Run, folder: Path, every_s: float = 30.0, names: str = "*.log") -> None:
        """folder: of the attempt, and named like it.  names: of the logs that are this keeper's."""
        self.run, self.folder, self.every_s, self.names = run, folder, every_s, names
        self._kept: dict[Path, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self.flush()

    def flush(self) -> None:
        for path in sorted(self.folder.glob(self.names)):
            size = path.stat().st_size
            if self._kept.get(path) == size:
                continue
            try:
                self.run.store.put_file(f"logs/{self.folder.name}/{path.name}", path)
                self._kept[path] = size
            except StoreError as error:  # the local copy stays; the next flush tries again
                print(f"log {path.name} not copied: {redact(str(error))}", flush=True)

    def _loop(self) -> None:
        while not self._done.wait(self.every_s):
            self.flush()
