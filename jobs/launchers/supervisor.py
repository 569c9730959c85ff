"""Sees a run on this machine through its attempts: starts ranks, keeps their logs, writes down how they ended.

The ranks write `running`, `succeeded` and `preempted`; whoever watches all ranks writes `failed`, because a rank alone
cannot tell its own fault from the echo of another's.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.storage import StoreError
from jobs.errors import BUG, HUNG, NOT_READY, OK, PREEMPTED, redact
from jobs.launchers.ranks import Exit, Ranks
from jobs.placement import Placement
from jobs.record import IllegalMove, Run, State

if TYPE_CHECKING:
    from core.config import Launch

T = TypeVar("T")
LONGEST_PAUSE_S = 3600.0  # between attempts
STORE_PAUSE_S = 20.0  # between tries to reach the store
ECHO_S = 0.5  # within which a rank's end is heard of by the others
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REASON_LINES = 12


@dataclass(frozen=True)
class Policy:
    """When another attempt is made after one that was preempted, hung, or lost a rank, the store or a device.

    attempts: of one submission.  backoff_s: pause before the second, doubled before each further one.  deadline_s:
    none is begun so long after the submission.
    """

    attempts: int = 1
    backoff_s: float = 0.0
    deadline_s: float = float("inf")

    @classmethod
    def of(cls, launch: Launch) -> Policy:
        return cls(launch.max_attempts, launch.backoff_s, 3600 * launch.deadline_h or float("inf"))

    def pause_s(self, made: int) -> float:
        """Before the next attempt, when `made` have been; some jitter keeps restarted runs apart."""
        return random.uniform(0.75, 1.0) * min(self.backoff_s * 2.0 ** (made - 1), LONGEST_PAUSE_S)


class Supervisor:
    """All attempts of one submission.

    command: starts a rank; the run's id, store and attempt are appended.  grace_s: how long ranks may take to end
    after another one failed.  stop_grace_s: how long they may take to save when they are asked to stop.
    """

    def __init__(
        self, run: Run, placement: Placement, command: Sequence[str], logs: Path, info: dict[str, Any], *,
        policy: Policy = Policy(), flush_s: float = 30.0, grace_s: float = 10.0, stop_grace_s: float = 300.0,
    ) -> None:  # fmt: skip
        self.run, self.placement, self.command, self.logs, self.info = run, placement, list(command), logs, info
        self.policy, self.flush_s, self.grace_s, self.stop_grace_s = policy, flush_s, grace_s, stop_grace_s
        self._began = time.monotonic()
        self._asked: list[int] = []  # signals not passed on yet
        self._leaving = threading.Event()  # told to end, not only to make room

    def stop(self, signum: int, frame: object = None) -> None:
        """Pass a signal on to the ranks: they save and end. After SIGTERM no further attempt is made."""
        if signum == signal.SIGTERM:
            self._leaving.set()
        self._asked.append(signum)

    def work(self, attempt: int) -> int:
        """Run attempts until one ends the run or the policy allows no more; returns an exit code."""
        for made in range(1, self.policy.attempts + 1):
            code, again = self._attempt(attempt + made - 1)
            if not again or made == self.policy.attempts or not self._queue(attempt + made, made):
                break
        return code

    def _queue(self, attempt: int, made: int) -> bool:
        """Make the run the next attempt's, after a pause; False when it is not to be, or somebody else's by now."""
        pause = self.policy.pause_s(made)
        if time.monotonic() + pause - self._began > self.policy.deadline_s:
            print("no further attempt: launch.deadline_h is over", flush=True)
            return False
        if self._leaving.wait(pause):
            return False
        self._asked.clear()
        try:
            last = self._patiently(self.run.last)
            self._patiently(lambda: self.run.move(State.QUEUED, attempt, only_from=last.state, **self.info))
        except IllegalMove as error:  # cancelled or resumed elsewhere in the meantime
            print(error, flush=True)
            return False
        return True

    def _attempt(self, attempt: int) -> tuple[int, bool]:
        """One attempt; returns its exit code, and whether another one is worth it."""
        identity = ["--run", self.run.id, "--store", self.run.root, "--attempt", str(attempt)]
        folder = self.logs / f"attempt-{attempt:04d}"
        ranks = Ranks([*self.command, *identity], self.placement, folder)
        keeper = LogKeeper(self.run, folder, self.flush_s)
        try:
            exits, failure = self._watch(ranks)
        finally:
            ranks.kill()
            keeper.close()
        return self._conclude(attempt, exits, failure, ranks)

    def _watch(self, ranks: Ranks) -> tuple[list[Exit], Exit | None]:
        """Wait for all ranks; returns their exits in order, and the one that ended the attempt before its time."""
        exits: list[Exit] = []
        failure = None
        stopped, deadline = False, float("inf")
        while len(exits) < self.placement.ranks:
            while self._asked:
                ranks.signal(self._asked.pop(0))
                stopped, deadline = True, min(deadline, time.monotonic() + self.stop_grace_s)
            ended = ranks.next_exit(timeout_s=0.2)
            if ended:
                exits.append(ended)
                if _is_failure(ended, stopped) and failure is None:
                    exits += ranks.drain(ECHO_S)  # the others' errors may be but echoes of a rank that was killed
                    failure = min((e for e in exits if _is_failure(e, stopped)), key=_order)
                    ranks.end(self.grace_s)
                deadline = min(deadline, time.monotonic() + self.stop_grace_s)
            if time.monotonic() > deadline:
                print(f"ranks did not end within {self.stop_grace_s:.0f} s: killed", flush=True)
                ranks.kill()
        return exits, failure

    def _conclude(self, attempt: int, exits: list[Exit], failure: Exit | None, ranks: Ranks) -> tuple[int, bool]:
        last = self._patiently(self.run.last)
        if last.state == State.SUCCEEDED and last.attempt == attempt:
            return OK, False
        if last.state == State.CANCELLED or last.attempt > attempt:
            return PREEMPTED, False  # not this attempt's run any more
        if last.state == State.PREEMPTED:
            return PREEMPTED, not self._leaving.is_set()
        if failure or all(e.code == OK for e in exits):
            reason = _reason(failure, ranks) if failure else "the ranks ended before the run was finished"
            print(reason, flush=True)
            self._move(State.FAILED, attempt, reason=reason, rank=failure.rank if failure else None)
            return BUG, failure is not None and _may_pass(failure) and not self._leaving.is_set()
        self._move(State.PREEMPTED, attempt, reason="asked to stop")
        return PREEMPTED, not self._leaving.is_set()

    def _move(self, state: State, attempt: int, **info: Any) -> None:
        with suppress(IllegalMove):  # cancelled in this moment
            self._patiently(lambda: self.run.move(state, attempt, **info))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Until the store has done it; a day at most.  Raises StoreError then, or when told to end."""
        limit = time.monotonic() + min(self.policy.deadline_s, 86400.0)
        while True:
            try:
                return action()
            except StoreError as error:
                print(f"store: {redact(str(error))}", flush=True)
                if time.monotonic() > limit or self._leaving.wait(random.uniform(1.0, STORE_PAUSE_S)):
                    raise


class LogKeeper:
    """Copies the logs of an attempt to the store while they grow, and once more at the end."""

    def __init__(self, run: Run, folder: Path, every_s: float) -> None:
        self.run, self.folder, self.every_s = run, folder, every_s
        self._kept: dict[Path, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self.flush()

    def flush(self) -> None:
        for path in sorted(self.folder.glob("*.log")):
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


def _is_failure(ended: Exit, stopped: bool) -> bool:
    # A rank that is told to stop before it has set its handlers dies of the signal: that is no failure.
    return ended.code not in (OK, PREEMPTED) and not (stopped and -ended.code in STOP_SIGNALS)


def _may_pass(failure: Exit) -> bool:
    """Whether another attempt may fare better: killed, hung, or store or device in trouble."""
    return failure.code < 0 or failure.code in (HUNG, NOT_READY)


def _order(ended: Exit) -> int:
    """A rank that was killed explains the errors of the others, and one that knows its trouble those of the rest."""
    return 0 if ended.code < 0 else 1 if ended.code in (HUNG, NOT_READY) else 2


def _reason(failure: Exit, ranks: Ranks) -> str:
    how = "hung" if failure.code == HUNG else f"exit code {failure.code}"
    if failure.code < 0:
        how = f"killed by {signal.Signals(-failure.code).name}"
        how += " (out of memory?)" if failure.code == -signal.SIGKILL else ""
    lines = ranks.log(failure.rank).read_text(errors="replace").strip().splitlines()[-REASON_LINES:]
    return redact("\n".join([f"rank {failure.rank}: {how}", *lines]))
