"""The demo, told to end: its server goes, and nobody is left who would wait for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest

from core.config import load
from jobs import demo, process, steps
from jobs.launchers import Order
from jobs.launchers.local import Local
from jobs.placement import Placement
from jobs.record import Run, State
from jobs.settings import Settings
from tests.cli import wait_for
from tests.jobs.conftest import end_supervisor, fake_worker


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_told_to_end_ends_its_run_and_keeps_what_there_is(
    signum: signal.Signals, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Run] = []
    name = f"demo-{signum:010}"  # what the server keeps in memory outlives it in this process

    def distil(settings: Settings) -> tuple[int, list[str]]:
        run = Run(settings.store, name)
        assert run.create("", {})
        begun.append(run)
        order = Order(run, load(str(tiny_recipe)), 1, {})
        Local(fake_worker("wait"), preload=()).submit([order], Placement(2, "cpu", 1))
        wait_for("its ranks", lambda: run.last().state == State.RUNNING, 60)
        os.kill(os.getpid(), signum)
        raise AssertionError("left where it was")

    monkeypatch.setattr(demo, "_distil", distil)
    monkeypatch.setattr(steps, "kept", {})
    try:
        with mock.patch.dict(os.environ), pytest.raises(KeyboardInterrupt):
            demo.main(Settings())
        kept = Run(demo.place(), begun[0].id)
        assert kept.last().state == State.CANCELLED
        assert not process.alive(kept.handle(kept.last()))
    finally:
        if Run(demo.place(), name).exists():
            end_supervisor(Run(demo.place(), name))
