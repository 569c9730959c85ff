"""One rank: its signals, its pulse, and what it says when it cannot start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from core.config import load, to_yaml
from core.registry import complete
from core.storage import StoreError, open_store
from jobs.heartbeat import Heartbeat
from jobs.launchers.ranks import rank_environment
from jobs.placement import Placement
from jobs.record import Run, State
from jobs.spec import REPOSITORY
from jobs.worker import Stop

MakeRun = Callable[..., Run]
LIMIT_S = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def queued(run: Run) -> Run:
    run.move(State.QUEUED, 1)
    return run


def no_end(reason: str) -> None:
    raise AssertionError(reason)


def test_a_rank_that_cannot_start_says_why_in_one_line(root: str) -> None:
    command = [sys.executable, "-m", "jobs.worker", "--run", "demo-1", "--store", root, "--attempt", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: run 'demo-1' is not in")
    assert done.stderr.count("\n") == 1


def test_a_rank_that_refuses_weights_ends_with_2_and_a_short_message(
    new_run: MakeRun, root: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Such as were put in the place of those that fitted when the run was queued."""
    weights = {f"blocks.{i}.x": torch.ones(1) for i in range(500)}
    open_store(root).put("w.safetensors", save(weights))
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["teachers"]["big"]["weights"] = "store:w.safetensors"
    recipe["launch"]["ranks"] = 1
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    run = queued(new_run("tiny-1", to_yaml(complete(load(str(tiny_recipe))))))
    env = {**os.environ, **rank_environment(0, Placement(1, "cpu", 1), tmp_path / "meeting")}
    command = [sys.executable, "-m", "jobs.worker", "--run", run.id, "--store", root, "--attempt", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith(f"error: {root}/w.safetensors: weights (read as layout timm) do not fit VisionTransformer")
    assert len(error) < 1500
    assert open_store(root).size("w.safetensors.sha256") is None, "so that the right file may take its place"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_sets_a_wish(signum: signal.Signals) -> None:
    stop = Stop()
    before = signal.signal(signum, stop.on_signal)
    try:
        assert not stop()
        os.kill(os.getpid(), signum)
        wait_until(stop)
    finally:
        signal.signal(signum, before)


def test_a_rank_is_asked_to_stop_when_its_parent_is_gone(root: str) -> None:
    """A parent that is killed cannot tell its ranks: Linux does."""
    rank = (
        "import signal, sys, time\n"
        "from jobs.process import die_with_parent\n"
        "from jobs.worker import Stop; stop = Stop()\n"
        "signal.signal(signal.SIGTERM, stop.on_signal); die_with_parent(); print('up', flush=True)\n"
        "limit = time.monotonic() + 20\n"
        "while not stop() and time.monotonic() < limit: time.sleep(0.01)\n"
        "print('stopped' if stop() else 'left behind', flush=True)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = subprocess.Popen([sys.executable, "-c", parent, rank], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.kill()
    assert child.stdout.readline() == "SIGTERM received: saving and leaving\n"
    assert child.stdout.readline() == "stopped\n"
    child.wait()


def test_the_newest_progress_is_written_beside_training(new_run: MakeRun) -> None:
    run = queued(new_run())
    with Heartbeat(run, 1, no_end, every_s=0.01) as pulse:
        wait_until(lambda: run.view().heartbeat.get("attempt") == 1)  # before there is any progress
        pulse.progress({"step": 3})
        wait_until(lambda: run.view().heartbeat.get("step") == 3)
        pulse.progress({"step": 4})
    assert run.view().heartbeat["step"] == 4


def test_a_long_step_does_not_stop_the_pulse(new_run: MakeRun) -> None:
    run = queued(new_run())
    with Heartbeat(run, 1, no_end, every_s=0.01, rest_s=0.02):
        wait_until(lambda: bool(run.view().heartbeat))
        first = run.view().heartbeat["time"]
        wait_until(lambda: run.view().heartbeat["time"] > first)


def test_a_slow_store_does_not_hold_up_a_step(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, free = queued(new_run()), threading.Event()
    monkeypatch.setattr(run, "beat", lambda *_: free.wait(LIMIT_S))
    with Heartbeat(run, 1, no_end, every_s=0.01) as pulse:
        for step in range(1000):
            pulse.progress({"step": step})
        assert not free.is_set()  # all steps went by while the first write still waits
        free.set()


def test_a_store_that_is_down_does_not_end_training(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = queued(new_run())
    beat, failures = run.beat, [StoreError("down"), StoreError("down")]

    def shaky(progress: dict[str, object], attempt: int) -> None:
        if failures:
            raise failures.pop()
        beat(progress, attempt)

    monkeypatch.setattr(run, "beat", shaky)
    with Heartbeat(run, 1, no_end, every_s=0.01) as pulse:
        pulse.progress({"step": 1})
        wait_until(lambda: run.view().heartbeat.get("step") == 1)
    assert "heartbeat: down" in capfd.readouterr().out


@pytest.mark.parametrize("event", ["cancelled", "newer attempt"])
def test_a_rank_notices_that_the_run_is_no_longer_its_own(new_run: MakeRun, event: str) -> None:
    run, stop = queued(new_run()), Stop()
    with Heartbeat(run, 1, stop.because, every_s=0.01):
        wait_until(lambda: bool(run.view().heartbeat))
        assert not stop()
        if event == "cancelled":
            run.move(State.CANCELLED)
        else:
            run.move(State.PREEMPTED, reason="lost")
            run.move(State.QUEUED, 2)
        wait_until(stop)
