"""One try of a run by one rank: what it saves and logs, who may end it, and how it ends."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from core import machine
from core.comm import Comm, Wishes
from core.config import fingerprint
from core.courier import Courier, Delivery, Fate
from core.manifest import Manifest, Position, Window
from core.metrics import MetricsLog
from core.recipe import Recipe
from core.retention import Policy
from core.salvage import begin
from core.snapshot import pieces
from core.spool import Spool
from core.stage import Stage
from core.storage import Store
from core.watchdog import Watchdog

BESIDE_S = 10.0  # that the end of an attempt may take for rows of metrics


class Outcome(enum.Enum):
    FINISHED = "finished"
    PREEMPTED = "asked to stop"
    TIME_LIMIT = "launch.time_limit_min is over"
    OUTAGE = "the store has not answered for checkpoint.patience_s and checkpoint.pending is used up"
    SUPERSEDED = "a newer attempt has started"


WISHES = [None, Outcome.PREEMPTED, Outcome.TIME_LIMIT, Outcome.OUTAGE, Outcome.SUPERSEDED]


class Attempt:
    def __init__(
        self, recipe: Recipe, run: Store, number: int, comm: Comm, on_progress: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool], skip: Window | None = None,
    ) -> None:  # fmt: skip
        """Claim the run.  skip: rewind, and leave these steps out.  Raises SupersededError, StoreError."""
        self.recipe, self.run, self.number, self.comm = recipe, run, number, comm
        self.identity, settings = fingerprint(recipe), recipe.checkpoint
        spool = Spool(machine.folder(machine.SPOOL, settings.spool), run)
        accepted = [self.identity, *settings.accept]
        begun = begin(run, accepted, number, comm, spool, skip)
        self.claim, self.manifest = begun.claim, begun.manifest  # the checkpoint to go on from
        self.began = time.monotonic()
        policy = Policy(settings.keep, settings.keep_every, settings.keep_best)
        self.courier = Courier(run, spool, comm.rank, self.claim.number, policy)
        step, self.segments = 0, list[str]()
        if begun.manifest is not None:
            step, self.segments = begun.manifest.position.step, begun.manifest.metrics
        board = recipe.log.tensorboard and comm.rank == 0
        self.log = MetricsLog(run, self.claim.number, step, self.courier.keep, recipe.log.flush_s, board)
        self.wishes = Wishes(comm)
        self.watchdog = Watchdog(recipe.launch.hang_s, f"attempt-{number:04d}-rank-{comm.rank:04d}", run)
        self.on_progress, self.should_stop = on_progress, should_stop
        self.newest: Delivery | None = None  # checkpoint of this rank
        self._busy = False  # ranks agree that too many checkpoints are on their way
        self._asked: float | None = None  # when this rank first heard of a wish

    def tell(self, row: dict[str, Any]) -> None:
        """Log a row, None values left out, and report it (rank 0)."""
        if self.comm.rank == 0:
            row = {k: v for k, v in row.items() if v is not None}
            self.log.write(row)
            self.on_progress(row)

    def skips(self, step: int) -> bool:
        """Whether a rewind has left this step of the run out."""
        return any(first <= step <= last for first, last in self.claim.skipped)

    def stopping(self) -> Outcome | None:
        """What ends the attempt after this step: the same answer on all ranks."""
        self.watchdog.step()
        self.courier.check()
        settings = self.recipe.checkpoint
        full = self.courier.pending >= settings.pending
        wish = WISHES.index(Outcome.PREEMPTED) if self.should_stop() else 0
        limit_min = self.recipe.launch.time_limit_min
        if limit_min and time.monotonic() - self.began > 60 * limit_min:
            wish = max(wish, WISHES.index(Outcome.TIME_LIMIT))
        if full and self.courier.failing_s() > settings.patience_s:
            wish = max(wish, WISHES.index(Outcome.OUTAGE))
        if self.courier.superseded:
            wish = max(wish, WISHES.index(Outcome.SUPERSEDED))
        agreed, busy = self.wishes.exchange(wish, full)
        if (wish or agreed) and self._asked is None:
            self._asked = time.monotonic()
        self._busy = bool(busy)
        return WISHES[agreed]

    def save(self, stage: Stage, position: Position, score: float | None, must: bool) -> None:
        """Take a checkpoint; training goes on while it is uploaded.  must: also when too many are on their way."""
        step = position.step
        if self._busy and not must:
            if self.comm.rank == 0:
                print(f"warning: no checkpoint at step {step}: {self.courier.pending} are on their way", flush=True)
            return
        rows = None
        if self.comm.rank == 0:
            rows = self.log.cut(step)
            self.segments = [*self.segments, rows[0]]
        engine, state = stage.engine, stage.method.state()
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        shapes |= {f"method/{name}": list(value.shape) for name, value in state.items()}
        shapes |= {f"buffer/{name}": list(value.shape) for name, value in engine.buffers().items()}
        manifest = Manifest(position, self.identity, self.claim.number, self.number, self.comm.world,
                            self.recipe.zero.stage, engine.adam_step, time.time(), shapes, score, self.segments,
                            list(self.claim.skipped))  # fmt: skip
        self.newest = self.courier.save(manifest, pieces(engine, state, self.comm), rows)

    def settle(self, limit_s: float) -> Fate:
        """What has become of the newest checkpoint after at most `limit_s`: the same answer on all ranks."""
        self.watchdog.rest()
        assert self.newest is not None
        limit = time.monotonic() + limit_s
        while self.newest.fate is Fate.PENDING and not self.courier.superseded and time.monotonic() < limit:
            self.courier.check()
            time.sleep(0.005)
        fate = Fate.SUPERSEDED if self.courier.superseded else self.newest.fate
        settled = Fate(self.wishes.settle(fate))
        self.watchdog.begin()
        return settled

    def grace_s(self) -> float:
        """Seconds left to leave in, for one that has been asked."""
        assert self._asked is not None
        return max(self.recipe.launch.grace_s - (time.monotonic() - self._asked), 0.0)

    def close(self) -> None:
        with suppress(RuntimeError):  # another rank may have ended
            self.wishes.close()
        self.watchdog.close()
        if self.comm.rank == 0:
            self.log.flush()
        left = BESIDE_S if self._asked is None else min(BESIDE_S, self.grace_s())
        self.courier.wait(left if self.courier.failing_s() == 0 else 0.0)
        self.courier.close()
        self.log.close()
