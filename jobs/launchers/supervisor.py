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
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.errors import OK
from jobs.launchers.ending import Exit, is_failure, order, reason, verdict
from jobs.launchers.fork_server import ForkServer
from jobs.launchers.ranks import Ranks, common_environment
from jobs.launchers.tries import patiently
from jobs.logkeeper import LogKeeper
from jobs.placement import Placement
from jobs.record import IllegalMove, Run, State

if TYPE_CHECKING:
    from core.recipe import Launch

T = TypeVar("T")
LONGEST_PAUSE_S = 3600.0  # between attempts
SPARE = 64  # bytes on a rank's command line for a longer attempt number
ECHO_S = 0.5  # within which a rank's end is heard of by the others


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

    command: of a rank, which is forked from a process that has imported `preload`; the run's id, store and attempt are
    appended.  grace_s: how long ranks may take to end after another one failed.  stop_grace_s: how long they may take
    to save when they are asked to stop.
    """

    def __init__(
        self, run: Run, placement: Placement, command: Sequence[str], logs: Path, info: dict[str, Any], *,
        preload: Sequence[str] = (), policy: Policy = Policy(), flush_s: float = 30.0, grace_s: float = 10.0,
        stop_grace_s: float = 300.0,
    ) -> None:  # fmt: skip
        self.run, self.placement, self.command, self.logs, self.info = run, placement, list(command), logs, info
        self.preload = preload
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
        self.logs.mkdir(parents=True, exist_ok=True)
        env, log = common_environment(self.placement), self.logs / "imports.log"
        with closing(ForkServer(self.preload, env, log, room=len(" ".join(self._start(attempt))) + SPARE)) as server:
            for made in range(1, self.policy.attempts + 1):
                code, again = self._attempt(attempt + made - 1, server)
                if not again or made == self.policy.attempts or not self._queue(attempt + made, made):
                    break
        return code

    def _start(self, attempt: int) -> list[str]:
        """The command of a rank."""
        return [*self.command, "--run", self.run.id, "--store", self.run.root, "--attempt", str(attempt)]

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
            if last.state not in (State.PREEMPTED, State.FAILED):
                raise IllegalMove(f"run {self.run.id} is {last.state}")
            self._patiently(lambda: self.run.move(State.QUEUED, attempt, only_from=last.state, **self.info))
        except IllegalMove as error:  # cancelled or resumed elsewhere in the meantime
            print(error, flush=True)
            return False
        return True

    def _attempt(self, attempt: int, server: ForkServer) -> tuple[int, bool]:
        """One attempt; returns its exit code, and whether another one is worth it."""
        folder = self.logs / f"attempt-{attempt:04d}"
        ranks = Ranks(server, self._start(attempt), self.placement, folder)
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
                if is_failure(ended, stopped) and failure is None:
                    exits += ranks.drain(ECHO_S)  # the others' errors may be but echoes of a rank that was killed
                    failure = min((e for e in exits if is_failure(e, stopped)), key=order)
                    ranks.end(self.grace_s)
                deadline = min(deadline, time.monotonic() + self.stop_grace_s)
            if time.monotonic() > deadline:
                print(f"ranks did not end within {self.stop_grace_s:.0f} s: killed", flush=True)
                ranks.kill()
        return exits, failure

    def _conclude(self, attempt: int, exits: list[Exit], failure: Exit | None, ranks: Ranks) -> tuple[int, bool]:
        last = self._patiently(self.run.last)
        found = verdict(last, attempt, failure, all(e.code == OK for e in exits))
        if found.state is not None:
            why = reason(failure, ranks.log(failure.rank)) if failure else found.reason
            print(why, flush=True)
            rank, code = (failure.rank, failure.code) if failure else (None, None)
            self._move(found.state, attempt, reason=why, rank=rank, code=code)
        return found.code, found.again and not self._leaving.is_set()

    def _move(self, state: State, attempt: int, **info: Any) -> None:
        with suppress(IllegalMove):  # cancelled in this moment
            self._patiently(lambda: self.run.move(state, attempt, **info))

    def _patiently(self, action: Callable[[], T]) -> T:
        return patiently(action, self._leaving, self.policy.deadline_s)
