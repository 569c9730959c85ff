"""What ends a run that has stopped learning: losses that are not numbers, samples that cannot be read."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from core.comm import Comm
from core.data.loader import MicroBatch
from core.data.source import DataError
from core.storage import MissingObject, Store

FEW = 10  # broken samples that any data set may have, however small
BAD_SAMPLES = "bad_samples.json"
Step = tuple[int, list[Tensor]]  # number of an optimiser step and this rank's samples in it


class NonFiniteLossError(RuntimeError):
    """The loss was not a number too many times in a row."""


class LossGuard:
    """Follows the loss without synchronising; ranks compare notes when the loop logs."""

    def __init__(self, run: Store, comm: Comm, limit: int) -> None:
        self.run, self.comm, self.limit = run, comm, limit
        self._seen: list[tuple[Step, Tensor]] = []  # since the last check: what was trained on, whether it went wrong
        self._in_row: list[Step] = []  # whose losses were not finite

    def add(self, step: int, loss: Tensor, micros: list[MicroBatch]) -> None:
        """The loss of a step's last micro-batch (a bad one before it leaves nothing to compute this one with)."""
        self._last = step, [micro.index for micro in micros]
        self._seen.append((self._last, ~loss.detach().isfinite()))

    def check(self) -> None:
        """Raises NonFiniteLossError on all ranks alike after `limit` bad losses in a row on any rank.

        The samples of the first of these steps are in the run folder then, those of each rank in a file.
        """
        flags = self.comm.max(torch.stack([bad for _, bad in self._seen]).float()).tolist()
        for (step, _), bad in zip(self._seen, flags, strict=True):
            self._in_row = [*self._in_row, step] if bad else []
            if len(self._in_row) >= self.limit:
                self.stop(f"the loss was not finite {self.limit} times in a row")
        self._seen = []

    def stop(self, reason: str) -> None:
        """Write down the samples that it began with, and raise NonFiniteLossError."""
        step, samples = (*self._in_row, self._last)[0]
        about = {"step": step, "samples": torch.cat(samples).tolist()}
        self.run.put(f"nonfinite/rank-{self.comm.rank:04d}.json", json.dumps(about).encode())
        raise NonFiniteLossError(
            f"step {step}: {reason}. The last good checkpoint is kept; the samples of this step are in "
            f"{self.run.uri}/nonfinite. Try a lower train.lr, train.clip, or train.precision=fp32"
        )


class Quarantine:
    """Samples that could not be decoded, counted once each over all ranks and attempts."""

    def __init__(self, run: Store, comm: Comm, samples: int, max_share: float) -> None:
        self.run, self.comm, self.samples, self.max_share = run, comm, samples, max_share
        self._known = _stored(run)
        self._new: set[str] = set()

    def add(self, micros: list[MicroBatch]) -> None:
        self._new |= {key for micro in micros for key in micro.bad} - self._known

    def count(self) -> int:
        """How many there are by now; new ones are listed in the run folder. All ranks must call it.

        Raises DataError on all ranks alike when they are more than FEW and more than the share that is allowed.
        """
        new = self.comm.union(self._new)
        self._new, self._known = set(), self._known | new
        if new and self.comm.rank == 0:
            self.run.put(BAD_SAMPLES, json.dumps(sorted(self._known), indent=0).encode())
        bad = len(self._known)
        if bad > self.max_share * self.samples and bad > (FEW if self.max_share else 0):
            raise DataError(
                f"data.source: {bad} of {self.samples} samples cannot be decoded, more than "
                f"data.max_bad_share={self.max_share:g} allows; first {', '.join(sorted(self._known)[:3])}, all in "
                f"{self.run.uri}/{BAD_SAMPLES}. Repair or remove them, or raise data.max_bad_share"
            )
        return bad


def _stored(run: Store) -> set[str]:
    try:
        return set(json.loads(run.get(BAD_SAMPLES)))
    except MissingObject:
        return set()
