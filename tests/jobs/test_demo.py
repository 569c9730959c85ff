"""The demo, told to end: its server goes, and nobody is left who would wait for it."""

from __future__ import annotations

import os
import signal
import time
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
from tests.jobs.conftest import end_supervisor, fake_worker


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_told_to_end_ends_its_run_and_keeps_what_there_is(
    signum: signal.Signals, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Run] = []

    def distil(settings: Settings) -> tuple[int, list[str]]:
        run = Run(settings.store, "demo-0123456789")
        run.create("", {})
        begun.append(run)
        Local(fake_worker("wait"), preload=()).submit([Order(run, load(str(tiny_recipe)), 1, {})], Placement(2, "cpu", 1))
        while run.last().state != State.RUNNING:
            time.sleep(0.05)
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
        if Run(demo.place(), "demo-0123456789").exists():
            end_supervisor(Run(demo.place(), "demo-0123456789"))
