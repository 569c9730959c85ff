"""One attempt of a simulated run: what its ranks do, and what is done to them and to their store meanwhile."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.recipe import Recipe
from core.storage import StoreError, open_store
from tests.faults import Exchange, FaultyProxy, cut_body, lose_answer, lose_request, refusal
from tests.ranks import Ranks
from tests.system.soak_plan import Event, Kind, Try

LIMIT_S = 90.0  # for an attempt
HASTE = 0.1  # of the pauses that the S3 client makes before it asks again
KILLED, ASLEEP, STORE, FAILED, HUNG = "KILLED", "ASLEEP", "STORE", "FAILED", "HUNG"
HITS = {Kind.BUSY: refusal(503, "SlowDown"), Kind.TOO_MANY: refusal(429, "TooManyRequests"),
        Kind.NO_REQUEST: lose_request, Kind.NO_ANSWER: lose_answer, Kind.CUT_BODY: cut_body}  # fmt: skip

# ---- in a rank


@dataclass(frozen=True)
class Orders:
    recipe: Recipe
    root: str
    name: str  # of the run
    number: int  # of the attempt
    folder: Path  # where the ranks write down what they do
    kill: tuple[int, int] | None = None  # a rank, and the step of the attempt at which it ends itself

    def file(self, what: str, rank: int) -> Path:
        return self.folder / f"{what}-{self.number:02d}-{rank}"


def work(orders: Orders) -> None:
    rank = int(os.environ["RANK"])
    with orders.file("log", rank).open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    try:
        end = _train(orders, rank)
    except BaseException as error:
        kind = STORE if isinstance(error, StoreError) else FAILED
        orders.file("end", rank).write_text(f"{kind} {type(error).__name__}: {error}")
        raise
    orders.file("end", rank).write_text(end)


def _train(orders: Orders, rank: int) -> str:
    from botocore.retries.standard import ExponentialBackoff

    from core.stage import Stage
    from core.train import train
    from jobs.worker import Stop

    pause, batch, stop = ExponentialBackoff.delay_amount, Stage.batch, Stop()
    ExponentialBackoff.delay_amount = lambda self, context: HASTE * pause(self, context)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, stop.on_signal)
    with orders.file("seen", rank).open("ab", 0) as seen, orders.file("steps", rank).open("ab", 0) as steps:

        def should_stop() -> bool:
            steps.write(b".")
            if orders.kill == (rank, steps.tell()):
                os.kill(os.getpid(), signal.SIGKILL)
            return stop()

        def watched(stage: Any, micro: Any) -> Any:
            found = batch(stage, micro)
            images = zlib.crc32(b"".join(found.views[name].numpy().tobytes() for name in sorted(found.views)))
            place = stage.first_step + micro.step + 1, micro.micro
            seen.write(json.dumps([*place, micro.index.tolist(), images]).encode() + b"\n")
            return found

        Stage.batch = watched  # type: ignore[method-assign,assignment]
        store = open_store(f"{orders.root}/runs/{orders.name}")
        return train(orders.recipe, store, orders.root, orders.number, lambda row: None, should_stop).name


# ---- from outside


class Burst:
    """A fault of the store that hits so many requests, or all for a moment."""

    def __init__(self, event: Event) -> None:
        self.event, self.hits = event, 0
        self._until = time.monotonic() + event.lasts_s
        self._left = iter(range(event.requests))

    def __call__(self, exchange: Exchange) -> bool:
        if self.event.kind is Kind.SILENCE:
            wait_s = self._until - time.monotonic()
            self.hits += wait_s > 0
            time.sleep(max(wait_s, 0.0))
            return False
        if self.event.kind is Kind.CUT_BODY and exchange.command != "GET" or next(self._left, None) is None:
            return False
        self.hits += 1
        HITS[self.event.kind](exchange)
        return True


class Crew:
    """The ranks of one attempt, followed by the files that they write."""

    def __init__(self, orders: Orders, attempt: Try, proxy: FaultyProxy | None) -> None:
        self.orders, self.attempt, self.proxy = orders, attempt, proxy
        self.happened: Counter[Kind] = Counter()
        self.bursts: list[Burst] = []
        self.asleep = self.hung = False
        self._todo = [event for event in (*attempt.faults, attempt.end) if event is not None]
        self._reached: dict[Event, float] = {}
        self._later: list[tuple[float, Callable[[], object]]] = []
        self._limit = time.monotonic() + LIMIT_S
        self.ranks = Ranks(work, attempt.world, orders)

    def attend(self, beside: Callable[[], object] = lambda: None) -> str:
        """Until the attempt has ended or fallen asleep; how.  beside: called all the time."""
        fell: float | None = None
        while not self.asleep and self._lives():
            self._let_happen()
            beside()
            if fell is None and any(p.exitcode for p in self.ranks.processes):
                fell = time.monotonic()
            if fell is not None and time.monotonic() > fell + self.attempt.linger_s:
                self.ranks.end()
            if time.monotonic() > self._limit:
                self._give_up()
            time.sleep(0.004)
        return ASLEEP if self.asleep else self._outcome()

    def wake(self, due: float = 0.0) -> None:
        """Let rank 0 go on where it was stopped, unless it is too early."""
        if self.asleep and time.monotonic() >= due:
            self.asleep, self._limit = False, time.monotonic() + LIMIT_S
            self._signal(0, "SIGCONT")

    def trained(self) -> list[list[Any]]:
        """All micro-batches so far: step of the run, number, samples, checksum of images."""
        found = []
        for rank in range(self.attempt.world):
            with suppress(FileNotFoundError):
                found += [json.loads(line) for line in self.orders.file("seen", rank).read_text().splitlines()]
        return found

    def _lives(self) -> bool:
        return any(p.is_alive() for p in self.ranks.processes)

    def _taken(self, rank: int) -> int:
        """Steps of the attempt; -1 while the rank does not hear signals yet."""
        try:
            return self.orders.file("steps", rank).stat().st_size
        except FileNotFoundError:
            return -1

    def _let_happen(self) -> None:
        now = time.monotonic()
        for event in list(self._todo):
            if self._taken(event.rank) < event.step:
                continue
            if now >= self._reached.setdefault(event, now) + event.delay_s:
                self._todo.remove(event)
                self._do(event, now)
        due = [later for later in self._later if now >= later[0]]
        self._later = [later for later in self._later if now < later[0]]
        for _, action in due:
            action()

    def _do(self, event: Event, now: float) -> None:
        if event.kind in HITS or event.kind is Kind.SILENCE:
            assert self.proxy is not None
            self.bursts.append(Burst(event))
            self.proxy.faults.append(self.bursts[-1])
        elif event.kind is Kind.SLEEP:
            self.asleep = self._signal(0, "SIGSTOP")
            self.happened[event.kind] += self.asleep
        elif event.kind is Kind.KILL:
            self.happened[event.kind] += self._signal(event.rank, "SIGKILL")
        elif event.signals:
            self.happened[event.kind] += self._signal(event.rank, event.signals[0])
            self._later += [(now + event.lasts_s, lambda name=name: self._signal(event.rank, name))  # type: ignore[misc]
                            for name in event.signals[1:]]  # fmt: skip

    def _signal(self, rank: int, name: str) -> bool:
        """False: the rank had ended."""
        with suppress(ProcessLookupError):
            if self.ranks.processes[rank].is_alive():
                self.ranks.signal(rank, signal.Signals[name])
                return True
        return False

    def _give_up(self) -> None:
        """The ranks say where they stand, in their logs, and end."""
        self.hung = True
        for rank in range(self.attempt.world):
            self._signal(rank, "SIGABRT")
        time.sleep(1)
        self.ranks.end()

    def _outcome(self) -> str:
        ends = []
        for rank in range(self.attempt.world):
            with suppress(FileNotFoundError):
                ends.append(self.orders.file("end", rank).read_text())
        died = self.orders.kill is not None and self.ranks.processes[self.orders.kill[0]].exitcode == -signal.SIGKILL
        if died and self._taken(self.orders.kill[0]) == self.orders.kill[1]:  # type: ignore[index]
            self.happened[Kind.KILL_AT_STEP] += 1
        self.ranks.end()
        if self.hung:
            return HUNG
        if len(ends) == self.attempt.world and len(set(ends)) == 1 and " " not in ends[0]:
            return ends[0]
        if self.happened[Kind.KILL] or self.happened[Kind.KILL_AT_STEP]:
            return KILLED
        told = next((end for end in ends if end.startswith(STORE)), "")
        return told or "; ".join(ends) or f"{FAILED} without a word"
