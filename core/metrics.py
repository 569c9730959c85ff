"""Numbers of a run: summed on the device without synchronising, read when logged, kept as JSON lines in the store."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import commits, small_json
from core.comm import Comm
from core.commits import Claim
from core.manifest import Manifest
from core.storage import Store

FOLDER = "metrics"
LIVE = ".live"  # ends the key of a segment that is still written: a late put of a part must not replace the whole
Keep = Callable[[str, Callable[[], object]], None]


class Meter:
    """Means of scalars since the last reading. `add` never synchronises; `read` does once, for all values together."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, report: dict[str, Tensor]) -> None:
        """Count scalars in; anything with dimensions is for the method's own use and is not logged."""
        for name, value in report.items():
            if value.ndim == 0:
                wide = value.detach().double() if value.device.type == "cpu" else value.detach().float()
                self._sums[name] = self._sums[name] + wide if name in self._sums else wide
                self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means over micro-batches and ranks since the last reading."""
        names = sorted(self._sums)
        local = torch.stack([self._sums[n] / self._counts[n] for n in names])
        self._sums, self._counts = {}, {}
        return dict(zip(names, self.comm.mean(local).tolist(), strict=True))


class MetricsLog:
    """Rows of one attempt as JSON lines, in segments that end where checkpoints are taken; TensorBoard files beside."""

    def __init__(self, run: Store, claim: int, start: int, keep: Keep, flush_s: float = 30.0,
                 tensorboard: bool = False) -> None:  # fmt: skip
        """claim, start: of the attempt in the run's log, and the step it goes on from.  keep: called with a name and
        what to do for it soon, beside training; a later call with the same name replaces an earlier one."""
        self._run, self._claim, self._keep = run, claim, keep
        self._flush_s, self._when = flush_s, time.monotonic()
        self._before = ""  # the segment before this one, which has arrived by the time that this one ends
        self._begin(start)
        self._board = Board(run) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        self._lines.append(json.dumps(clean(row)))
        if self._board is not None:
            self._board.add(row)
        if time.monotonic() - self._when > self._flush_s:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            live = self._key + LIVE
            self._keep(live, partial(self._run.put, live, self._content()))
        if self._board is not None:
            self._keep("tensorboard", self._board.flush)
        self._when = time.monotonic()

    def cut(self, step: int) -> tuple[str, bytes]:
        """End the segment at a checkpoint's step; its key and whole content. The next one begins there."""
        segment = self._key, self._content()
        if self._before:
            self._keep(f"no {self._before}", partial(self._run.delete, self._before + LIVE))
        self._before = self._key
        self._begin(step)
        return segment

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _begin(self, step: int) -> None:
        self._key, self._lines = segment_key(self._claim, step), list[str]()

    def _content(self) -> bytes:
        return "".join(f"{line}\n" for line in self._lines).encode()


def segment_key(claim: int, start: int) -> str:
    return f"{FOLDER}/{claim:06d}-{start:08d}.jsonl"


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
    """All rows of a run's present course, in step order, none lost or doubled.

    These are the segments that the newest checkpoint names, and what its attempt, or the one that has gone on from it
    since, has written behind it.
    """
    head = next(commits.entries(run), None)
    claim = head.number if isinstance(head, Claim) else head.claim if head else 0
    base = head if isinstance(head, Manifest) else next(commits.checkpoints(run), None)
    names, start = (base.metrics, base.position.step) if base else ([], 0)
    found = {e.key for e in run.list(f"{FOLDER}/{claim:06d}-") if e.key >= segment_key(claim, start)}
    behind = sorted(key for key in found if key.removesuffix(LIVE) not in names
                    and not (key.endswith(LIVE) and key.removesuffix(LIVE) in found))  # fmt: skip
    keys = [*names, *behind]
    return [row for key in keys for row in _rows(run, key)]


def _rows(run: Store, key: str) -> list[dict[str, Any]]:
    """Raises Unreadable."""
    where, lines = f"{run.uri}/{key}", small_json.fetch(run, key, small_json.LARGE).splitlines()
    return [small_json.parse(line, dict, f"{where}, line {n}") for n, line in enumerate(lines, 1)]


def last_step(run: Store) -> int:
    """Of all that has been logged."""
    rows = read_metrics(run)
    return int(rows[-1]["step"]) if rows else 0


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
