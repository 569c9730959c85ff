"""What ends a run that has stopped learning: losses that are not numbers, samples that cannot be read."""

from __future__ import annotations

import json
from contextlib import suppress

import torch
from torch import Tensor

from core import small_json
from core.comm import Comm
from core.data.samples import MicroBatch
from core.data.source import DataError
from core.manifest import Window
from core.storage import MissingObject, Store, StoreError

MEMORY = 50.0  # losses that the running mean remembers
FEW = 10  # broken samples that any data set may have, however small
BAD_SAMPLES = "bad_samples.json"
Step = tuple[int, list[Tensor]]  # number of an optimiser step and this rank's samples in it


class BadLossError(RuntimeError):
    """The loss was not a number, or far above what it had been, too many times in a row."""

    def __init__(self, text: str, window: Window) -> None:
        super().__init__(text)
        self.window = window  # steps to leave out if training is to go on from before them

    def __reduce__(self) -> tuple[type[BadLossError], tuple[str, Window]]:
        return type(self), (str(self), self.window)  # it travels between processes


class LossGuard:
    """Follows the loss without synchronising; ranks compare notes when the loop logs."""

    def __init__(self, run: Store, comm: Comm, limit: int, explode: float = 0.0, claim: int = 0) -> None:
        """limit: bad losses in a row.  explode: a loss above so many times its running mean is bad; 0 = any finite one
        will do.  claim: of the attempt, which names the files of samples."""
        self.run, self.comm, self.limit, self.explode, self.claim = run, comm, limit, explode, claim
        self._size = torch.full((), torch.nan, device=comm.device)  # mean over about the last 50 good losses
        self._seen: list[tuple[Step, Tensor]] = []  # since the last check: what was trained on, whether it went wrong
        self._recent: list[Step] = []  # the step before a bad one may be what spoilt the weights
        self._bad = 0  # in a row, at the last check

    def add(self, step: int, loss: Tensor, micros: list[MicroBatch]) -> None:
        """The loss of a step's last micro-batch (a bad one before it leaves nothing to compute this one with)."""
        value = loss.detach().float()
        bad = ~value.isfinite()
        if self.explode:
            size = value.abs()
            bad = bad | (size > self.explode * self._size)  # false while there is no mean yet
            moved = torch.where(self._size.isnan(), size, self._size + (size - self._size) / MEMORY)
            self._size = torch.where(bad, self._size, moved)
        self._seen.append(((step, [micro.index for micro in micros]), bad))

    def check(self) -> bool:
        """Whether the newest loss was good on all ranks.

        Raises BadLossError on all ranks alike after `limit` bad losses in a row on any rank. The samples of the steps
        in question are in the run folder then, those of each rank in a file.
        """
        if not self._seen:
            return self._bad == 0
        flags = self.comm.max(torch.stack([bad for _, bad in self._seen]).float()).tolist()
        for (step, _), bad in zip(self._seen, flags, strict=True):
            self._recent.append(step)
            self._bad = self._bad + 1 if bad else 0
            if self._bad >= self.limit:
                self.stop(f"the loss was not finite or above its mean's bounds {self.limit} times in a row")
            self._recent = self._recent[-1 - self._bad :]
        self._seen = []
        return self._bad == 0

    def stop(self, reason: str) -> None:
        """Write down the samples that it may have begun with, and raise BadLossError."""
        steps = self._recent
        begun = steps[-max(self._bad, 1)][0]
        about = {str(step): torch.cat(samples).tolist() for step, samples in steps}
        place = f"bad-loss/{self.claim:06d}"
        with suppress(StoreError):
            self.run.put(f"{place}/rank-{self.comm.rank:04d}.json", json.dumps(about).encode())
        raise BadLossError(
            f"step {begun}: {reason}. The last good checkpoint is kept; the samples of steps {steps[0][0]} to "
            f"{steps[-1][0]} are in {self.run.uri}/{place}. Try a lower train.lr, train.clip, train.precision=fp32, or "
            "train.rewinds=1 to go back and leave them out",
            (steps[0][0], steps[-1][0]),
        )


class Quarantine:
    """Samples that could not be decoded, counted once each over all ranks and attempts."""

    def __init__(self, run: Store, comm: Comm, samples: int, max_share: float) -> None:
        self.run, self.comm, self.samples, self.max_share = run, comm, samples, max_share
        self._known = _stored(run)
        self._new: set[str] = set()
        self._unwritten = False

    def add(self, micros: list[MicroBatch]) -> None:
        self._new |= {key for micro in micros for key in micro.bad} - self._known

    def count(self) -> int:
        """How many there are by now; new ones are listed in the run folder. All ranks must call it.

        Raises DataError on all ranks alike when they are more than FEW and more than the share that is allowed.
        """
        new = self.comm.union(self._new)
        self._new, self._known = set(), self._known | new
        self._unwritten = self._unwritten or bool(new)
        if self._unwritten and self.comm.rank == 0:
            with suppress(StoreError):  # training goes on; the next count tries again
                self.run.put(BAD_SAMPLES, json.dumps(sorted(self._known), indent=0).encode())
                self._unwritten = False
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
        return set(map(str, small_json.read(run, BAD_SAMPLES, list, small_json.LARGE)))
    except (MissingObject, small_json.Unreadable):  # then they are counted anew
        return set()
