"""What Ray Train runs as one worker: it starts a rank, `python -m jobs.worker`, as other launchers do, and sees it end.

The rank is a process of its own, so that signals, exit codes and logs are the same as elsewhere, and nothing that Ray
keeps in its worker (threads, handlers, a process group) gets into the way of training.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core.private import own_folder, private_folder
from jobs import process, ranks_env
from jobs.errors import OK, PREEMPTED
from jobs.launchers.ending import Exit, reason
from jobs.logkeeper import LogKeeper
from jobs.ray.command import tagged
from jobs.record import Run
from jobs.spec import imports

ECHO_S = 2.0  # by which a rank that failed lets one that was killed, whose echo it may be, be heard first
SPARE_S = 30.0  # beyond the grace that ranks have
WORKER = "jobs.worker"


class RankFailed(Exception):  # noqa: N818 - an event, not a fault of this code
    """How a rank ended, on its way through Ray to whoever writes the record."""

    def __init__(self, rank: int, code: int, why: str) -> None:
        super().__init__(rank, code, why)
        self.rank, self.code, self.why = rank, code, why


def work(about: dict[str, Any]) -> None:
    """Start this Ray worker's rank and wait for it.  Raises RankFailed unless it finished or saved and left.

    about: run, store, attempt, start, device, threads, grace_s.
    """
    run = Run(about["store"], about["run"])
    rank, environment = describe(about)
    end_leftovers(run, about["attempt"], about["grace_s"])
    own = private_folder(own_folder("logs")) / tagged(run.id, run.root)
    folder = own / f"attempt-{about['attempt']:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"rank-{rank:04d}.log"
    keeper = LogKeeper(run, folder, names=log.name)
    try:
        code = start(about, environment, log).wait()
    finally:
        keeper.close()
    if code in (OK, PREEMPTED):
        return
    if code > 0:
        time.sleep(ECHO_S)
    raise RankFailed(rank, code, reason(Exit(rank, code), log))


def describe(about: dict[str, Any]) -> tuple[int, dict[str, str]]:
    """This worker's rank, and the environment of its process."""
    import ray.train

    me = ray.train.get_context()
    own = {
        "RANK": me.get_world_rank(), "WORLD_SIZE": me.get_world_size(),
        "LOCAL_RANK": me.get_local_rank(), "LOCAL_WORLD_SIZE": me.get_local_world_size(),
        ranks_env.NODE: me.get_node_rank(), ranks_env.START: about["start"],
        "OMP_NUM_THREADS": about["threads"], "PYTHONUNBUFFERED": 1,
        "DS_ACCELERATOR": about["device"],
    }  # fmt: skip
    # Nothing says where the ranks are to meet: they do so as under SLURM (jobs.ranks_env.meet).
    return me.get_world_rank(), {**os.environ, **imports(), **{name: str(value) for name, value in own.items()}}


def start(about: dict[str, Any], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    identity = ["--run", about["run"], "--store", about["store"], "--attempt", str(about["attempt"])]
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", WORKER, *identity], env=environment, stdin=subprocess.DEVNULL,
                                stdout=out, stderr=out)  # fmt: skip


def end_leftovers(run: Run, attempt: int, grace_s: float) -> None:
    """See the ranks of earlier attempts leave this node before new ones take its GPUs.

    A Ray worker that is killed leaves its rank behind, which notices, saves what it can and goes.
    """
    there = process.running(WORKER, "--run", run.id, "--store", run.root)
    old = [each for each in there if int(process.argument(each, "--attempt") or 0) < attempt]
    process.leave(old, signal.SIGTERM, grace_s + SPARE_S)
