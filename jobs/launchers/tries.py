"""What a scheduler's job makes of a run: which attempt is its own, how that ended, and whether another one follows."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from core import commits
from core.small_json import Unreadable
from core.storage import StoreError
from jobs import inputs
from jobs.errors import BUG, OK, PREEMPTED, NotReady, redact
from jobs.launchers.ending import Exit, Verdict, verdict
from jobs.record import ACTIVE, IllegalMove, Run, State, Transition

if TYPE_CHECKING:
    from jobs.launchers import Order

T = TypeVar("T")
STUCK = 8  # attempts in a row from the same step, after which there is no further one
STORE_PAUSE_S = 20.0  # between tries to reach the store


def submit(order: Order, info: dict[str, Any], start: Callable[[], None]) -> bool:
    """Queue the attempt in the record, then have it started; False where somebody else was first.

    In this order a job that starts finds the run queued for it, and of two submissions one works.
    """
    from core.config import to_yaml

    try:
        order.run.move(State.QUEUED, order.attempt, **info)
    except IllegalMove:
        return False
    try:
        order.run.write_recipe(to_yaml(order.recipe))
        start()
    except BaseException as error:
        with suppress(IllegalMove, StoreError):
            order.run.move(State.FAILED, order.attempt, reason=f"not submitted: {redact(str(error))}")
        raise
    return True


def check(run: Run, where: str) -> None:
    """Raises NotReady, StoreError: what the machine that this runs on lacks, `where` in words."""
    for lack in filter(None, [*inputs.packages(), inputs.check_store(run.root)]):
        raise NotReady(f"{where}: {lack.what}\n  -> {lack.how}; credentials are those that nodes have")
    if not run.exists():
        raise NotReady(
            f"{where}: there is no run {run.id} in {run.root}; a folder must be one that the nodes share with the "
            "machine that submits: STORE=s3://bucket/prefix or STORE=file:///shared/folder"
        )


def take(run: Run, job: str, own: dict[str, Any], cut: Callable[[Transition, bool], str]) -> int | None:
    """Make the run this job's; returns the attempt's number, or None when there is nothing for this job to do.

    own: what to write down where the run is queued by nobody yet.  cut: why an attempt ended without a word, given its
    newest transition and whether it was this job's.
    """
    last = run.last()
    handle = run.handle(last)
    mine = handle.get("job") == job
    if last.state == State.QUEUED and mine:
        return last.attempt
    if last.state == State.SUCCEEDED or (last.state == State.CANCELLED and mine):
        print(f"{run.id} is {last.state}: nothing to do", file=sys.stderr, flush=True)
        return None
    if not mine and last.state != State.CREATED:
        look = run.look(last)
        if look.alive or (look.alive is None and run.view().active):
            words = f"{run.id} is {last.state} already, as attempt {last.attempt} ({look.text or handle})"
            print(words, file=sys.stderr, flush=True)
            return None
    if last.state in ACTIVE:
        run.move(State.PREEMPTED, last.attempt, only_from=last.state, reason=cut(last, mine))
        last = run.last()
    return run.move(State.QUEUED, last.attempt + 1, only_from=last.state, **(handle if mine else own)).attempt


def conclude(
    run: Run, job: str, failure: Exit | None, why: Callable[[Exit], str], *, quiet: bool = False, leaving: bool = False
) -> Verdict:
    """Write down how the newest attempt ended and queue the next one where there is to be one: `again` says so.

    failure, quiet: see `verdict`.  why: what is known of a failure.  leaving: the job is to end, whatever comes of it.
    The verdict's state is `cancelled` for a run that somebody has cancelled.  Raises StoreError.
    """
    while True:  # until nobody has moved the run in between
        last = run.last()
        handle = run.handle(last)
        if handle.get("job") != job:
            print(f"{run.id} is another job's by now: {handle}", flush=True)
            return Verdict(OK if last.state == State.SUCCEEDED else PREEMPTED, False)
        if last.state == State.CANCELLED:
            return Verdict(PREEMPTED, False, State.CANCELLED)
        found = verdict(last, last.attempt, failure, quiet)
        try:
            if found.state is not None:
                text = why(failure) if failure else found.reason
                print(text, flush=True)
                rank = failure.rank if failure and failure.rank >= 0 else None
                run.move(found.state, last.attempt, only_from=last.state, reason=text, rank=rank, again=found.again)
            if not found.again or leaving or not allowed(run, job):
                return replace(found, again=False)
            run.move(State.QUEUED, last.attempt + 1, only_from=found.state or last.state, **handle)
            return found
        except IllegalMove as error:
            print(error, flush=True)
            if run.last().state != State.CANCELLED:
                return Verdict(BUG, False)


def allowed(run: Run, job: str) -> bool:
    """Whether launch.max_attempts and launch.deadline_h leave room for another start of this job."""
    launch, moves = run.recipe().launch, run.transitions()
    since = next(t for t in moves if t.info.get("job") == job)
    failed = failures(run, job)
    if failed >= launch.max_attempts:
        print(f"no further attempt: {failed} have failed and launch.max_attempts is {launch.max_attempts}", flush=True)
        return False
    steps = [claim.step for claim in commits.claims(run.store)][-STUCK:]
    if len(steps) == STUCK and len(set(steps)) == 1:
        print(f"no further attempt: {STUCK} in a row began at step {steps[0]}; do they get time enough?", flush=True)
        return False
    late = bool(launch.deadline_h) and time.time() - since.time > 3600 * launch.deadline_h
    if late:
        print("no further attempt: launch.deadline_h is over", flush=True)
    return not late


def failures(run: Run, job: str) -> int:
    """Attempts of this job that have failed."""
    moves = run.transitions()
    since = next((t.number for t in moves if t.info.get("job") == job), 0)
    return sum(t.state == State.FAILED for t in moves if t.number > since)


def patiently(action: Callable[[], T], leaving: threading.Event, limit_s: float = 86400.0) -> T:
    """Until the store has done it.  Raises StoreError after a day, or when told to leave."""
    limit = time.monotonic() + min(limit_s, 86400.0)
    while True:
        try:
            return action()
        except Unreadable:  # waiting does not mend it
            raise
        except StoreError as error:
            print(f"store: {redact(str(error))}", flush=True)
            if time.monotonic() > limit or leaving.wait(random.uniform(1.0, STORE_PAUSE_S)):
                raise
