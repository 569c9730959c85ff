"""Runs on this machine: a supervisor in its own session, so that a run outlives the terminal it was submitted from."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.storage import StoreError
from jobs import process
from jobs.errors import BUG, describe
from jobs.launchers import Launcher
from jobs.launchers.supervisor import STOP_SIGNALS, Policy, Supervisor
from jobs.placement import Placement
from jobs.record import IllegalMove, Run, State
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from core.config import Recipe

SPARE_S = 60.0  # beyond the grace that ranks have, before they are killed
WORKER = (sys.executable, "-m", "jobs.worker")


class Local(Launcher):
    """Ranks of this machine under one supervisor process."""

    name = "local"
    shares_tree = True

    def __init__(self, worker: Sequence[str] = WORKER) -> None:
        self.worker = list(worker)

    def submit(self, run: Run, recipe: Recipe, attempt: int, placement: Placement, info: dict[str, Any]) -> None:
        from core.config import to_yaml

        logs = Path.cwd() / ".retort" / "logs" / run.id
        logs.mkdir(parents=True, exist_ok=True)
        child = _start_supervisor(run, attempt, placement, logs, self.worker)
        info = {**info, **asdict(placement), **process.identity(child.pid), "launcher": self.name, "logs": str(logs)}
        assert child.stdin is not None
        with child.stdin as pipe:  # closing it without a word ends the supervisor
            run.move(State.QUEUED, attempt, **info)
            run.write_recipe(to_yaml(recipe))
            pipe.write(json.dumps(info).encode())

    def cancel(self, info: Mapping[str, Any]) -> bool:
        return process.send(info, signal.SIGTERM)

    def alive(self, info: Mapping[str, Any]) -> bool | None:
        return process.alive(info)

    def logs(self, info: Mapping[str, Any], attempt: int) -> Path | None:
        folder = Path(info.get("logs", "")) / f"attempt-{attempt:04d}"
        return folder if folder.is_dir() else None


LAUNCHER = Local()


def _start_supervisor(
    run: Run, attempt: int, placement: Placement, logs: Path, worker: list[str]
) -> subprocess.Popen[bytes]:
    """Start it waiting: it works when the run is its own, which its process number must be written down for."""
    own = ["--run", run.id, "--store", run.root, "--attempt", str(attempt), "--logs", str(logs)]
    place = ["--ranks", str(placement.ranks), "--device", placement.device, "--threads", str(placement.threads)]
    search = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (logs / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.launchers.local", *own, *place, "--", *worker],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def main(arguments: list[str]) -> int:
    """The supervisor process: waits to be told that the run is its own, then works on it."""
    cut = arguments.index("--")
    options = _options(arguments[:cut])
    word = sys.stdin.read()
    if not word:
        return 0
    info = json.loads(word)
    run = Run(options.store, options.run)
    launch = run.recipe().launch
    supervisor = Supervisor(
        run, Placement(options.ranks, options.device, options.threads), arguments[cut + 1 :], Path(options.logs), info,
        policy=Policy.of(launch), stop_grace_s=launch.grace_s + SPARE_S,
    )  # fmt: skip
    for signum in STOP_SIGNALS:
        signal.signal(signum, supervisor.stop)
    try:
        return supervisor.work(options.attempt)
    except Exception as error:
        print(describe(error), flush=True)
        with suppress(IllegalMove, StoreError):
            run.move(State.FAILED, reason=f"supervisor: {describe(error)}")
        return BUG


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.launchers.local")
    for name in ("run", "store", "device", "logs"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("attempt", "ranks", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
