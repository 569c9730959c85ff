"""Watching a run from a terminal: a bar where there is one, plain lines elsewhere; the run does not depend on it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from core.storage import StoreError
from core.text import one_line
from jobs.errors import BUG, OK, PREEMPTED, redact
from jobs.launchers import Launcher
from jobs.leaving import as_interrupts
from jobs.record import ENDED, Run, State, View
from jobs.steps import steps

POLL_S = 0.5
LINE_EVERY_S = 5.0
OUTAGE_S = 300.0


def follow(run: Run, attempt: int, launcher: Launcher, poll_s: float = POLL_S) -> int:
    """Show progress until the run rests; returns 0 succeeded, 1 failed or cancelled, 75 preempted.

    An interrupt (Ctrl-C, SIGTERM, or SIGHUP of a terminal that is closed) leaves the run alone and returns 0.
    """
    display = Bar() if sys.stderr.isatty() else Lines()
    try:
        with as_interrupts():
            while True:
                view = _view(run)
                if view.last.attempt >= attempt and _rests(run, view, launcher):
                    break
                display.show(view)
                time.sleep(poll_s)
            display.show(view)
    except KeyboardInterrupt:
        print(f"\ndetached: the run goes on\nnext: {steps(run.root, run.id, 'status', 'cancel')}", flush=True)
        return OK
    finally:
        display.close()
    return conclude(run, view)


def _view(run: Run) -> View:
    """The run's view, through pauses of the store; the run itself may well go on.  Raises StoreError after a while."""
    limit = time.monotonic() + OUTAGE_S
    while True:
        try:
            return run.view()
        except StoreError as error:
            if time.monotonic() > limit:
                raise
            print(f"still watching {run.id}: {redact(str(error))}", flush=True)
            time.sleep(LINE_EVERY_S)


def conclude(run: Run, view: View) -> int:
    """Say how the run ended and what to do next."""
    state = view.last.state
    if state == State.SUCCEEDED:
        print(f"{run.id} succeeded: {run.uri}")
        print(f"next: {steps(run.root, run.id, 'eval', 'export', 'report')}")
        return OK
    reason = view.lost or view.last.info.get("reason", "")
    print(f"{run.id} {view.shown}" + (f": {reason}" if reason else ""))
    print(f"next: {steps(run.root, run.id, 'logs', 'resume')}")
    return PREEMPTED if state == State.PREEMPTED else BUG


def _rests(run: Run, view: View, launcher: Launcher) -> bool:
    """Nobody works on the run any more. One whose supervisor lives may be about to be queued again."""
    if view.last.state in (State.PREEMPTED, State.FAILED):
        return not launcher.look(run, run.handle(view.last)).alive
    return view.last.state in ENDED or bool(view.lost)


def progress_text(row: dict[str, Any]) -> str:
    """`stage main, step 120/3000, loss 0.812, 412 img/s, data-wait 3 %, ETA 4 min`, of what is known."""
    parts: list[tuple[str, Callable[[Any], str]]] = [
        ("waiting", lambda v: f"waiting for {v}"),
        ("stage", lambda v: f"stage {v}"),
        ("step", lambda v: f"step {v}" + (f"/{row['steps']}" if "steps" in row else "")),
        ("loss", lambda v: f"loss {_number(v):.4g}"),
        ("images_per_s", lambda v: f"{_number(v):.0f} img/s"),
        ("data_wait", lambda v: f"data-wait {100 * _number(v):.0f} %"),
        ("eta_s", lambda v: f"ETA {duration(_number(v))}"),
    ]
    return ", ".join(show(row[key]) for key, show in parts if row.get(key) is not None)


def _number(value: object) -> float:
    """As it was written, be it as text; NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _status(view: View) -> str:
    row = view.heartbeat if view.heartbeat.get("attempt") == view.last.attempt else {}
    text = progress_text(row)
    if not text and view.last.state in (State.QUEUED, State.RUNNING):
        text = f"starting, {time.time() - view.last.time:.0f} s"
    return text


class Lines:
    """One line when something is new, and at least and at most every few seconds while the run works."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self.every_s = every_s
        self._shown, self._when = "", 0.0

    def show(self, view: View) -> None:
        line = f"{view.id} {view.shown}"
        now = time.monotonic()
        if line != self._shown or now - self._when >= self.every_s:
            self._shown, self._when = line, now
            text = _status(view)
            print(f"{time.strftime('%H:%M:%S')} {line}" + (f": {text}" if text else ""), flush=True)

    def close(self) -> None:
        pass


class Bar:
    """A progress bar on a terminal's standard error."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] = tqdm(total=None, bar_format="{desc} {percentage:3.0f}%|{bar:24}| {postfix}", leave=True)

    def show(self, view: View) -> None:
        steps, step = view.heartbeat.get("steps"), view.heartbeat.get("step", 0)
        if steps and type(steps) is type(step) is int and view.heartbeat.get("attempt") == view.last.attempt:
            self._bar.total, self._bar.n = steps, step
        self._bar.set_description_str(one_line(f"{view.id} {view.shown}"), refresh=False)
        self._bar.set_postfix_str(one_line(_status(view)))

    def close(self) -> None:
        self._bar.close()
