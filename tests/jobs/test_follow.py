"""Progress: something new at once, otherwise a line every few seconds, in words that are known."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from core.storage import StoreError
from jobs.follow import Bar, Lines, duration, follow, progress_text
from jobs.launchers.local import Local
from jobs.record import Run, State, Transition, View

ROW = {"stage": "main", "step": 5, "steps": 20, "loss": 0.5, "images_per_s": 123.4, "data_wait": 0.031, "eta_s": 300.0}


def view(state: State, lost: str = "", **row: Any) -> View:
    return View("demo-1", Transition(3, state, time.time(), 1), {**row, "attempt": 1} if row else {}, lost)


def test_progress_in_words() -> None:
    assert progress_text(ROW) == "stage main, step 5/20, loss 0.5, 123 img/s, data-wait 3 %, ETA 5 min"
    assert progress_text({"step": 5, "loss": "nan"}) == "step 5, loss nan"
    assert progress_text({}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (120, "2 min"), (7200, "2.0 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_come_when_the_state_changes_and_not_more_often_than_asked(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(every_s=3600)
    for state in (State.QUEUED, State.QUEUED, State.RUNNING, State.RUNNING, State.SUCCEEDED):
        lines.show(view(state, **ROW))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2].rstrip(":") for line in shown] == ["queued", "running", "succeeded"]
    assert "step 5/20" in shown[1]


def test_lines_go_on_while_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(every_s=0)
    for _ in range(3):
        lines.show(view(State.QUEUED))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert all("starting" in line for line in shown)


def test_the_progress_of_an_earlier_attempt_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Lines().show(View("demo-1", Transition(5, State.RUNNING, time.time(), 2), {**ROW, "attempt": 1}))
    assert "starting" in capsys.readouterr().out


def test_a_bar_shows_the_same_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.show(view(State.RUNNING, **ROW))
    bar.close()
    shown = capsys.readouterr().err
    for words in ("demo-1 running", "25%", "123 img/s", "data-wait 3 %", "ETA 5 min"):
        assert words in shown


def test_an_interrupt_leaves_the_run_alone(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    run.move(State.QUEUED, 1)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert follow(run, 1, Local()) == 0
    assert "the run goes on" in capsys.readouterr().out
    assert run.last().state == State.QUEUED


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_the_run_alone_too(
    signum: signal.Signals, new_run: Callable[..., Run], root: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = new_run()
    run.move(State.QUEUED, 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), signum))
    assert follow(run, 1, Local()) == 0
    said = capsys.readouterr().out
    assert f"next: make status RUN={run.id} STORE={root}; make cancel RUN={run.id} STORE={root}" in said
    assert signal.getsignal(signum) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("end", "code"), [(State.SUCCEEDED, 0), (State.FAILED, 1), (State.CANCELLED, 1), (State.PREEMPTED, 75)]
)
def test_the_exit_code_says_how_the_run_ended(new_run: Callable[..., Run], end: State, code: int) -> None:
    run = new_run()
    run.move(State.QUEUED, 1)
    run.move(State.RUNNING)
    run.move(end)
    assert follow(run, 1, Local()) == code


def test_a_pause_of_the_store_is_sat_out(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    run.move(State.QUEUED, 1)
    run.move(State.FAILED, reason="broken")
    failures = [StoreError("down"), StoreError("down")]

    def shaky() -> View:
        if failures:
            raise failures.pop()
        return Run.view(run)

    monkeypatch.setattr(run, "view", shaky)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert follow(run, 1, Local()) == 1
    assert capsys.readouterr().out.count("still watching") == 2


def test_an_attempt_that_has_not_begun_is_waited_for(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    run.move(State.QUEUED, 1)
    run.move(State.FAILED)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        for state in (State.QUEUED, State.RUNNING, State.SUCCEEDED):
            run.move(state, 2)

    monkeypatch.setattr(time, "sleep", pause)
    assert follow(run, 2, Local()) == 0
    assert len(pauses) == 1
