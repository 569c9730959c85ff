"""Numbers of a run: summed on the device without synchronising, read when logged, kept as JSON lines in the store."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.comm import Comm
from core.storage import Store

FOLDER = "metrics"


class Meter:
    """Means of scalars since the last reading. `add` never synchronises; `read` does once, for all values together."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._in_row = torch.zeros((), device=comm.device)  # non-finite losses in a row
        self._worst = torch.zeros((), device=comm.device)

    def add(self, report: dict[str, Tensor]) -> None:
        """Count scalars in; anything with dimensions is for the method's own use and is not logged."""
        for name, value in report.items():
            if value.ndim == 0:
                wide = value.detach().double() if value.device.type == "cpu" else value.detach().float()
                self._sums[name] = self._sums[name] + wide if name in self._sums else wide
                self._counts[name] = self._counts.get(name, 0) + 1

    def watch(self, loss: Tensor) -> None:
        """Follow the step's loss for `bad_losses`."""
        self._in_row = torch.where(loss.detach().isfinite(), torch.zeros_like(self._in_row), self._in_row + 1)
        self._worst = torch.maximum(self._worst, self._in_row)

    def read(self) -> dict[str, float]:
        """Means over micro-batches and ranks since the last reading; `bad_losses`: most non-finite losses in a row."""
        names = sorted(self._sums)
        local = torch.stack([self._sums[n] / self._counts[n] for n in names])
        values = torch.cat([self.comm.mean(local), self.comm.max(self._worst).to(local.dtype).view(1)]).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip([*names, "bad_losses"], values, strict=True))


class MetricsLog:
    """Rows of one attempt: a JSON-lines segment in the store and, beside it, TensorBoard event files."""

    def __init__(
        self, run: Store, attempt: int, start_step: int, flush_s: float = 30.0, tensorboard: bool = False
    ) -> None:
        self._run, self._key = run, f"{FOLDER}/{attempt:04d}-{start_step:08d}.jsonl"
        self._lines: list[str] = []
        self._flushed, self._flush_s, self._when = 0, flush_s, time.monotonic()
        self._board = Board(run) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        self._lines.append(json.dumps(clean(row)))
        if self._board is not None:
            self._board.add(row)
        if time.monotonic() - self._when > self._flush_s:
            self.flush()

    def flush(self) -> None:
        if len(self._lines) > self._flushed:
            self._run.put(self._key, ("\n".join(self._lines) + "\n").encode())
            self._flushed = len(self._lines)
            if self._board is not None:
                self._board.flush()
        self._when = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()


class Board:
    """TensorBoard event files under tensorboard/ of the run: written locally, copied to the store at every flush."""

    def __init__(self, run: Store) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._folder = tempfile.TemporaryDirectory(prefix="retort-tensorboard-")
        self._writer = SummaryWriter(self._folder.name)

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()
        for path in sorted(Path(self._folder.name).iterdir()):
            self._run.put_file(f"tensorboard/{path.name}", path)

    def close(self) -> None:
        self._writer.close()
        self._folder.cleanup()


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON can hold it: absent values left out, non-finite numbers as text."""
    kept = {k: v for k, v in row.items() if v is not None}
    return {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in kept.items()}


def read_metrics(run: Store) -> list[dict[str, Any]]:
    """All rows of a run in step order. A later attempt's segment replaces earlier rows from its start step on."""
    rows: list[dict[str, Any]] = []
    for entry in sorted(run.list(f"{FOLDER}/"), key=lambda e: e.key):
        start = int(entry.key.rpartition("-")[2].removesuffix(".jsonl"))
        new = [json.loads(line) for line in run.get(entry.key).decode().splitlines()]
        again = {(row.get("stage"), row["step"]) for row in new}
        rows = [row for row in rows if row["step"] <= start and (row.get("stage"), row["step"]) not in again] + new
    return rows


class Pace:
    """Throughput since the last reading: images/s, share of time spent waiting for data, time left."""

    def __init__(self, batch: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._batch, self._clock = batch, clock
        self._waiting = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new measurement, so that evaluation and checkpoints do not count as training time."""
        self._since, self._steps, self._waited = self._clock(), 0, 0.0

    def wait(self) -> None:
        self._waiting = self._clock()

    def go(self) -> None:
        self._waited += self._clock() - self._waiting
        self._steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        elapsed = max(self._clock() - self._since, 1e-9)
        rate = self._steps / elapsed
        out = {"images_per_s": self._batch * rate, "data_wait": self._waited / elapsed,
               "eta_s": steps_left / rate if rate else 0.0}  # fmt: skip
        self.restart()
        return out
