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

from core import machine, sockets
from core.storage import StoreError
from jobs import process
from jobs.errors import BUG, NotReady, describe
from jobs.launchers import Launcher, Look, Order, crew
from jobs.launchers.ending import STOP_SIGNALS
from jobs.launchers.supervisor import Policy, Supervisor
from jobs.placement import Placement, gpu_count, place
from jobs.record import IllegalMove, Run, State
from jobs.spec import imports

if TYPE_CHECKING:
    from core.recipe import Recipe

TIED = "RETORT_TIED"  # where it is set, a run ends with the process that submitted it, whose store does
SPARE_S = 60.0  # beyond the grace that ranks have, before they are killed
PROGRAM = "jobs.launchers.local"
WORKER = (sys.executable, "-m", "jobs.worker")
PRELOAD = ("torch", "torch._dynamo", "timm", "deepspeed", "core.train", "jobs.heartbeat", "jobs.ranks_env")


class Local(Launcher):
    """Ranks of this machine under one supervisor process."""

    name = "local"
    shares_tree = True
    queues = False

    def __init__(self, worker: Sequence[str] = WORKER, preload: Sequence[str] = PRELOAD) -> None:
        """worker: command of a rank, and what is imported once for all of them: none of it may touch a GPU."""
        self.worker, self.preload = list(worker), preload

    def gpus(self) -> int:
        return gpu_count()

    def place(self, recipe: Recipe) -> Placement:
        return place(recipe, gpu_count())

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:
        """Raises StoreError where ranks could not keep shards, or send each other tensors, on this machine."""
        from core.inputs import shard_cache

        shard_cache(recipe.loader)
        if recipe.loader.workers:
            sockets.place()

    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        return [self._submit(order, placement) for order in orders]

    def _submit(self, order: Order, placement: Placement) -> bool:
        from core.config import to_yaml

        run, attempt = order.run, order.attempt
        logs = self.folder() / run.id
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotReady(f"logs: {logs} cannot be made ({error.strerror}): work in a folder of your own") from None
        with machine.told(order.recipe):
            child = self._start_supervisor(run, attempt, placement, logs)
        own = {**asdict(placement), **process.identity(child.pid), "launcher": self.name, "logs": str(logs)}
        info = {**order.info, **own}
        assert child.stdin is not None
        with child.stdin as pipe:  # closing it without a word ends the supervisor
            try:
                run.move(State.QUEUED, attempt, **info)
            except IllegalMove:
                return False
            run.write_recipe(to_yaml(order.recipe))
            pipe.write(json.dumps(info).encode())
        return True

    def _start_supervisor(self, run: Run, attempt: int, placement: Placement, logs: Path) -> subprocess.Popen[bytes]:
        """Start it waiting: it works when the run is its own, which its process number must be written down for."""
        own = ["--run", run.id, "--store", run.root, "--attempt", str(attempt), "--logs", str(logs)]
        place = ["--ranks", str(placement.ranks), "--device", placement.device, "--threads", str(placement.threads)]
        own += [*place, "--preload", ",".join(self.preload), "--", *self.worker]
        with (logs / "supervisor.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *own], stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True, env={**os.environ, **imports(), "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    def workers(self, arguments: Sequence[str], count: int, recipe: Recipe, placement: Placement) -> str:
        return crew.work(arguments, count, placement)

    def cancel(self, run: Run, info: Mapping[str, Any], at_once: bool = False) -> bool:
        return process.send(info, signal.SIGTERM, *_program(run))  # the supervisor gives ranks so long and no longer

    def look(self, run: Run, info: Mapping[str, Any]) -> Look:
        alive = process.runs(info, *_program(run))
        return Look(alive, f"its process {info['pid']} on this machine is gone" if alive is False else "")


LAUNCHER = Local()


def _program(run: Run) -> tuple[str, ...]:
    """Module and words of a run's supervisor."""
    return PROGRAM, "--run", run.id, "--store", run.root


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
        preload=list(filter(None, options.preload.split(","))), policy=Policy.of(launch),
        stop_grace_s=launch.grace_s + SPARE_S,
    )  # fmt: skip
    for signum in STOP_SIGNALS:
        signal.signal(signum, supervisor.stop)
    if TIED in os.environ:
        process.die_with_parent()
    try:
        return supervisor.work(options.attempt)
    except Exception as error:
        print(describe(error), flush=True)
        with suppress(IllegalMove, StoreError):
            run.move(State.FAILED, reason=f"supervisor: {describe(error)}")
        return BUG


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.launchers.local")
    for name in ("run", "store", "device", "logs", "preload"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("attempt", "ranks", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
