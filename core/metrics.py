"""Numbers of a run: summed on the device without synchronising, read when logged, kept as JSON lines in the store."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
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
        local = torch.stack(
            [self._sums[n] / self._counts[n] for n in names] + [self._worst.to(self._sums[names[0]].dtype)]
        )
        values = self.comm.mean(local).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip([*names, "bad_losses"], values, strict=True))


class MetricsLog:
    """Rows of one attempt: a JSON-lines segment in the store, and TensorBoard files beside the worker if asked for."""

    def __init__(self, run: Store, attempt: int, start_step: int, flush_s: float = 30.0, tensorboard: str = "") -> None:
        self._run, self._key = run, f"{FOLDER}/{attempt:04d}-{start_step:08d}.jsonl"
        self._lines: list[str] = []
        self._flushed, self._flush_s, self._when = 0, flush_s, time.monotonic()
        self._board = _board(tensorboard) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
        self._lines.append(json.dumps(clean))
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
        if time.monotonic() - self._when > self._flush_s:
            self.flush()

    def flush(self) -> None:
        if len(self._lines) > self._flushed:
            self._run.put(self._key, ("\n".join(self._lines) + "\n").encode())
            self._flushed = len(self._lines)
        self._when = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()


def _board(folder: str) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def read_metrics(run: Store) -> list[dict[str, Any]]:
    """All rows of a run in step order. A later attempt's segment replaces earlier rows from its start step on."""
    rows: list[dict[str, Any]] = []
    for entry in sorted(run.list(f"{FOLDER}/"), key=lambda e: e.key):
        start = int(entry.key.rpartition("-")[2].removesuffix(".jsonl"))
        rows = [row for row in rows if row["step"] <= start]
        rows += [json.loads(line) for line in run.get(entry.key).decode().splitlines()]
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
