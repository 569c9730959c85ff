"""Whole runs through the command line, real ranks and a real store."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.metrics import read_metrics
from core.storage import open_store
from jobs import process
from jobs.record import Run, State
from tests.cli import Shell, Started, wait_for

pytestmark = pytest.mark.system

# A run of the demo recipe that lasts some seconds and logs and saves often.
RANDOM = "teachers.digits_masked.weights=random teachers.digits_supervised.weights=random"
STEPS = f"train.steps=40 checkpoint.every_steps=10 checkpoint.keep=3 launch.backoff_s=1 {RANDOM}"
SHORT = ("--profile", "smoke", "--set", STEPS)


def _losses(store: str, run: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(open_store(f"{store}/runs/{run}")) if "loss" in row}


def _processes(store: str, run: str) -> list[int]:
    """Ranks of a run on this machine."""
    return sorted(each.pid for each in process.running("jobs.worker", "--run", run, "--store", store))


def _step(store: str, run: str) -> int:
    beat = open_store(f"{store}/runs/{run}")
    return int(json.loads(beat.get("heartbeat.json")).get("step", 0)) if beat.size("heartbeat.json") else 0


def _started(shell: Shell, store: str, *options: str) -> tuple[Started, str]:
    """A demo run that has its first checkpoint behind it, and its name."""
    command = shell.start("submit", "demo", *options, "--store", store)
    run = wait_for("the run's record", lambda: next(iter(Run.list(store)), ""))
    wait_for("a step after the first checkpoint", lambda: _step(store, run) >= 12)
    return command, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Shell(folder).submit("demo", *SHORT, "--store", f"file://{folder}/store")
    found = _losses(f"file://{folder}/store", run)
    assert len(found) == 40
    return found


def test_a_run_of_which_one_rank_is_signalled_goes_on_by_itself(whole: dict[int, float], tmp_path: Path) -> None:
    cut, shell = f"file://{tmp_path}/cut", Shell(tmp_path)
    command, run = _started(shell, cut, *SHORT)
    os.kill(_processes(cut, run)[-1], signal.SIGUSR2)
    out = command.ends(200)
    assert command.returncode == 0, out
    assert _losses(cut, run) == whole
    moves = [(t.state, t.attempt, t.info.get("reason", "")) for t in Run(cut, run).transitions()]
    assert [attempt for state, attempt, _ in moves if state == State.QUEUED] == [1, 2]
    assert (State.PREEMPTED, 1, "asked to stop (by another rank: its log says why)") in moves


def test_unic_l_runs_both_stages_in_smoke_profile_against_a_real_s3_server(tmp_path: Path, bucket: str) -> None:
    shell = Shell(tmp_path, RETORT_STORE=bucket)
    run = shell.submit("unic-l", "--profile", "smoke")
    rows = read_metrics(open_store(f"{bucket}/runs/{run}"))
    assert {row["stage"] for row in rows} == {"s224", "s336"}
    for stage in ("s224", "s336"):
        heldout = [row["heldout_loss"] for row in rows if row["stage"] == stage and "heldout_loss" in row]
        assert heldout[-1] < heldout[0], f"{stage}: the loss on held-out images must fall: {heldout}"
    assert "already done" in shell("submit", "unic-l", "--profile", "smoke")
    assert shell.status(run)["state"] == "succeeded"
    assert "rank-0000" in shell("logs", run)
    results = json.loads(shell("eval", run, "--eval", "knn", "--json"))
    assert {row["model"] for row in results["knn"]["rows"]} >= {"student", "untrained 1", "raw pixels"}
    shell("export", run)
    assert "report.html" in shell("report", run)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for entry in open_store(f"{bucket}/runs/{run}").list():
        assert secret.encode() not in open_store(f"{bucket}/runs/{run}").get(entry.key), entry.key


def _photos(folder: Path) -> None:
    """A person's folder: JPEGs of all sizes, some of other kinds, some broken."""
    rng = np.random.default_rng(1)
    (folder / "holiday").mkdir(parents=True)
    for i in range(24):
        pixels = rng.integers(0, 256, (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "holiday" / f"{i:02d}.JPG", "JPEG")
    Image.new("L", (50, 60), 90).save(folder / "grey.png")
    Image.new("CMYK", (50, 60)).save(folder / "print.jpg")
    whole = (folder / "holiday" / "00.JPG").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()


def test_a_folder_of_jpegs_is_data_and_broken_files_are_counted_and_passed_over(tmp_path: Path) -> None:
    _photos(tmp_path / "photos")
    shell, store = Shell(tmp_path), f"file://{tmp_path}/store"
    sizes = "train.batch=8 train.micro_batch=4 train.steps=9 data.max_bad_share=0.5"
    fields = f"data.source=file://{tmp_path}/photos data.heldout= {sizes}"
    run = shell.submit("unic-b", "--profile", "smoke", "--set", fields, "--store", store)
    rows: list[dict[str, Any]] = read_metrics(open_store(f"{store}/runs/{run}"))
    assert rows[-1]["step"] == 9
    assert rows[-1]["bad_samples"] >= 1


def test_a_run_that_was_cancelled_has_saved_and_is_taken_up_by_the_next_submit(tmp_path: Path) -> None:
    root = f"file://{tmp_path}/store"
    shell = Shell(tmp_path, RETORT_STORE=root)
    slow = ("--profile", "smoke", "--set", f"train.steps=4000 {RANDOM}")
    name = shell.submit("demo", *slow, "--detach")
    wait_for("the first step", lambda: Run(root, name).view().heartbeat.get("step", 0) >= 1)
    shell("cancel", name)
    wait_for("the ranks' end", lambda: not process.running("jobs.worker", "--run", name, "--store", root))
    assert shell.status(name)["state"] == "cancelled"
    kept = max(each["step"] for each in shell.status(name)["checkpoints"])
    shell("submit", "demo", *slow, "--detach")
    wait_for("the second attempt", lambda: Run(root, name).view().heartbeat.get("attempt", 0) == 2)
    shell("cancel", name)
    wait_for("the ranks' end", lambda: not process.running("jobs.worker", "--run", name, "--store", root))
    assert max(each["step"] for each in shell.status(name)["checkpoints"]) >= kept >= 1
    assert f"attempt 2 went on from step {kept}" in shell("status", name)
