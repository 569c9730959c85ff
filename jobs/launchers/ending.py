"""How the ranks of an attempt ended, and what that makes of the run."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from core import shortage
from jobs.errors import BUG, HUNG, NOT_READY, OK, PREEMPTED, redact
from jobs.record import State, Transition

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REASON_LINES = 12
# By signal: what may have been used up, and what to do then.
LIKELY = {signal.SIGKILL: (" (out of memory?)", f"if `dmesg` on its node says so: {shortage.MEMORY}"),
          signal.SIGBUS: (" (/dev/shm full?)", shortage.SHARED)}  # fmt: skip


@dataclass(frozen=True)
class Exit:
    rank: int
    code: int  # negative: ended by that signal


@dataclass(frozen=True)
class Verdict:
    code: int  # exit code of whoever watched the ranks
    again: bool  # another attempt is worth it
    state: State | None = None  # to write down; None: the ranks have said it themselves
    reason: str = ""


def verdict(last: Transition, attempt: int, failure: Exit | None, quiet: bool) -> Verdict:
    """What to make of an attempt whose ranks have all ended.

    last: the run's newest transition.  failure: the rank that ended the attempt before its time.  quiet: all ranks
    ended with 0.
    """
    if last.state == State.SUCCEEDED and last.attempt == attempt:
        return Verdict(OK, again=False)
    if last.state == State.CANCELLED or last.attempt > attempt:
        return Verdict(PREEMPTED, again=False)  # not this attempt's run any more
    if last.state == State.PREEMPTED:
        return Verdict(PREEMPTED, again=True)
    if failure:
        return Verdict(BUG, may_pass(failure.code), State.FAILED)
    if quiet:
        return Verdict(BUG, False, State.FAILED, "the ranks ended before the run was finished")
    return Verdict(PREEMPTED, True, State.PREEMPTED, "asked to stop")


def is_failure(ended: Exit, stopped: bool) -> bool:
    # A rank that is told to stop before it has set its handlers dies of the signal: that is no failure.
    return ended.code not in (OK, PREEMPTED) and not (stopped and -ended.code in STOP_SIGNALS)


def may_pass(code: int) -> bool:
    """Whether another attempt may fare better: killed, hung, or store or device in trouble."""
    return code < 0 or code in (HUNG, NOT_READY)


def order(ended: Exit) -> int:
    """A rank that was killed explains the errors of the others, and one that knows its trouble those of the rest."""
    return 0 if ended.code < 0 else 1 if may_pass(ended.code) else 2


def reason(failure: Exit, log: Path) -> str:
    """What is known of a failure: the rank, how it ended, and its last words."""
    how, lack, remedy = "hung" if failure.code == HUNG else f"exit code {failure.code}", "", ""
    if failure.code < 0:
        number = signal.Signals(-failure.code)
        how, (lack, remedy) = f"killed by {number.name}", LIKELY.get(number, ("", ""))
    lines = _text(log).strip().splitlines()[-REASON_LINES:]
    advice = [f"-> {remedy}"] if remedy else []
    return redact("\n".join([f"rank {failure.rank}: {how}{lack}", *lines, *advice]))


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.is_file() else ""
