"""A whole run on this machine through the command line: submitted, killed, resumed, evaluated, exported, reported."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from jobs import process
from jobs.record import Run
from tests.cli import Shell, run_id, wait_for
from tests.toy_run import RANDOM, losses

STEPS = 40
SHORT = ("--profile", "smoke", "--set",
         f"train.steps={STEPS} checkpoint.every_steps=10 launch.max_attempts=1 {RANDOM}")  # fmt: skip


def test_a_run_goes_from_submit_to_report_though_a_rank_is_killed(tmp_path: Path) -> None:
    shell, root = Shell(tmp_path, RETORT_STORE=f"file://{tmp_path}/store"), f"file://{tmp_path}/store"
    command = shell.start("submit", "demo", *SHORT)
    name = wait_for("the run's record", lambda: next(iter(Run.list(root)), ""))
    wait_for("a step after the first checkpoint", lambda: Run(root, name).view().heartbeat.get("step", 0) >= 12)
    ranks = process.running("jobs.worker", "--run", name, "--store", root)
    assert len(ranks) == 2
    ranks[-1].send_signal(signal.SIGKILL)
    out = command.ends(120)
    assert command.returncode == 1, out
    assert run_id(out) == name
    assert f"make logs RUN={name}; make resume RUN={name}" in out
    assert shell.status(name)["state"] == "failed"
    reached = max(losses(root, name))
    assert 10 <= reached < STEPS

    resumed = shell.type(out, "logs", "resume")["resume"]
    assert f"{name} succeeded" in resumed
    whole = f"file://{tmp_path}/whole"
    assert shell.submit("demo", *SHORT, "--store", whole) == name, "the same recipe has the same name elsewhere"
    assert losses(root, name) == losses(whole, name), "bit for bit"
    again = shell("submit", "demo", *SHORT, "--store", whole)
    assert "already done" in again
    assert "report.html" in shell.type(again, "eval", "export", "report")["report"]
    told = shell("status", name)
    assert "attempt 2 went on from step" in told
    assert "rank-0000" in shell("logs", name)

    results = json.loads(shell("eval", name, "--eval", "knn", "--json"))
    assert {row["model"] for row in results["knn"]["rows"]} >= {"student", "untrained 1", "raw pixels"}
    shell("export", name)
    folder = tmp_path / "store" / "runs" / name / "export"
    about = json.loads((folder / "config.json").read_text())
    model = timm.create_model(about.pop("model_name"), **about)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert "report.html" in shell("report", name)
    assert "<svg" in (tmp_path / "store" / "runs" / name / "report.html").read_text()
