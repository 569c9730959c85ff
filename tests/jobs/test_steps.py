"""What is printed as the next step works when it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import cli, demo, steps
from jobs.record import Run, State


def test_the_store_is_named_where_it_is_not_the_one_that_would_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = f"file://{tmp_path}/.retort/store"
    assert steps.steps(default, "a", "eval", "report") == "make eval RUN=a; make report RUN=a"
    assert steps.steps("file:///my store", "a", "eval") == "make eval RUN=a STORE='file:///my store'"
    monkeypatch.setenv("RETORT_STORE", "s3://bucket/mine/")
    assert steps.steps("s3://bucket/mine", "a", "eval") == "make eval RUN=a"
    assert steps.elsewhere(default) == f" STORE={default}"
    monkeypatch.setenv("RETORT_STORE", "no store")
    assert steps.elsewhere("s3://bucket/mine") == " STORE=s3://bucket/mine"


def test_a_store_that_ends_with_its_process_is_named_by_what_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.kept, "s3://short/lived", "file:///long/lived")
    assert steps.steps("s3://short/lived", "a", "eval") == "make eval RUN=a STORE=file:///long/lived"


def test_the_runs_of_the_demo_are_shown_with_the_store_that_they_are_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(demo.place(), "demo-0123456789")
    run.create("", {})
    run.move(State.QUEUED, 1)
    run.move(State.CANCELLED)
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert f"of make demo, with STORE={demo.place()}\n" in shown
    assert "demo-0123456789  cancelled" in shown
    assert cli.main(["status", "--store", f"file://{tmp_path}/other"]) == 0
    assert "demo-0123456789" not in capsys.readouterr().out
