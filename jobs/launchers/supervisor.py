"""Sees a run on this machine through its attempts: starts ranks, keeps their logs, writes down how they ended.

The ranks write `running`, `succeeded` and `preempted`; whoever watches all ranks writes `failed`, because a rank alone
cannot tell its own fault from the echo of another's.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.storage import StoreError
from jobs.errors import BUG, OK, PREEMPTED, redact
from jobs.launchers.ranks import Exit, Ranks
from jobs.placement import Placement
from jobs.record import IllegalMove, Run, State

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REASON_LINES = 12


class Supervisor:
    """All attempts of one submission.

    command: starts a rank; the run's id, store and attempt are appended.  grace_s: how long ranks may take to end
    after another one failed.  stop_grace_s: how long they may take to save when they are asked to stop.
    """

    def __init__(
        self, run: Run, placement: Placement, command: Sequence[str], logs: Path, info: dict[str, Any], *,
        max_attempts: int = 1, flush_s: float = 30.0, grace_s: float = 10.0, stop_grace_s: float = 300.0,
    ) -> None:  # fmt: skip
        self.run, self.placement, self.command, self.logs, self.info = run, placement, list(command), logs, info
        self.max_attempts, self.flush_s, self.grace_s, self.stop_grace_s = max_attempts, flush_s, grace_s, stop_grace_s
        self._asked: list[int] = []  # signals not passed on yet
        self._leaving = False  # told to end, not only to make room

    def stop(self, signum: int, frame: object = None) -> None:
        """Pass a signal on to the ranks: they save and end. After SIGTERM no further attempt is made."""
        self._leaving = self._leaving or signum == signal.SIGTERM
        self._asked.append(signum)

    def work(self, attempt: int) -> int:
        """Run attempts until one is not preempted or the allowed number is used up; returns an exit code."""
        for number in range(attempt, attempt + self.max_attempts):
            if number > attempt:
                try:
                    self.run.move(State.QUEUED, number, only_from=State.PREEMPTED, **self.info)
                except IllegalMove as error:  # cancelled or resumed elsewhere in the meantime
                    print(error, flush=True)
                    return PREEMPTED
            code = self._attempt(number)
            if code != PREEMPTED or self._leaving:
                return code
        return code

    def _attempt(self, attempt: int) -> int:
        identity = ["--run", self.run.id, "--store", self.run.root, "--attempt", str(attempt)]
        folder = self.logs / f"attempt-{attempt:04d}"
        ranks = Ranks([*self.command, *identity], self.placement, folder)
        keeper = LogKeeper(self.run, folder, self.flush_s)
        try:
            exits, stopped = self._watch(ranks)
        finally:
            ranks.kill()
            keeper.close()
        return self._conclude(attempt, exits, stopped, ranks)

    def _watch(self, ranks: Ranks) -> tuple[list[Exit], bool]:
        """Wait for all ranks; returns their exits in order, and whether they had been asked to stop."""
        exits: list[Exit] = []
        stopped, deadline = False, float("inf")
        while len(exits) < self.placement.ranks:
            while self._asked:
                ranks.signal(self._asked.pop(0))
                stopped, deadline = True, min(deadline, time.monotonic() + self.stop_grace_s)
            ended = ranks.next_exit(timeout_s=0.2)
            if ended:
                exits.append(ended)
                if _is_failure(ended, stopped):
                    ranks.end(self.grace_s)
                deadline = min(deadline, time.monotonic() + self.stop_grace_s)
            if time.monotonic() > deadline:
                print(f"ranks did not end within {self.stop_grace_s:.0f} s: killed", flush=True)
                ranks.kill()
        return exits, stopped

    def _conclude(self, attempt: int, exits: list[Exit], stopped: bool, ranks: Ranks) -> int:
        last = self.run.last()
        if last.state == State.SUCCEEDED and last.attempt == attempt:
            return OK
        if last.state == State.CANCELLED or last.attempt > attempt:
            return PREEMPTED  # not this attempt's run any more: no further one can be queued
        if last.state == State.PREEMPTED:
            return PREEMPTED
        failure = next((e for e in exits if _is_failure(e, stopped)), None)
        if failure or all(e.code == OK for e in exits):
            reason = _reason(failure, ranks) if failure else "the ranks ended before the run was finished"
            print(reason, flush=True)
            self._move(State.FAILED, attempt, reason=reason, rank=failure.rank if failure else None)
            return BUG
        self._move(State.PREEMPTED, attempt, reason="asked to stop")
        return PREEMPTED

    def _move(self, state: State, attempt: int, **info: Any) -> None:
        with suppress(IllegalMove):  # cancelled in this moment
            self.run.move(state, attempt, **info)


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


def _reason(failure: Exit, ranks: Ranks) -> str:
    how = f"exit code {failure.code}"
    if failure.code < 0:
        how = f"killed by {signal.Signals(-failure.code).name}"
        how += " (out of memory?)" if failure.code == -signal.SIGKILL else ""
    lines = ranks.log(failure.rank).read_text(errors="replace").strip().splitlines()[-REASON_LINES:]
    return redact("\n".join([f"rank {failure.rank}: {how}", *lines]))
