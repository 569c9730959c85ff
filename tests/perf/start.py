"""What the start of ranks costs: `make bench START=1`, by exec and by fork, with the memory that they take.

Each rank imports what training needs and says so. By exec every rank is a Python of its own, as under SLURM and Ray; by
fork they come out of one process that has imported it (jobs/launchers/fork_server.py), as on this machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.launchers.fork_server import ForkServer
from jobs.launchers.local import PRELOAD
from jobs.launchers.ranks import common_environment
from jobs.placement import Placement
from jobs.table import table

ROUNDS = 3
RANK = f"""import importlib, sys, time
for name in {PRELOAD!r}:
    importlib.import_module(name)
print("ready", flush=True)
time.sleep(60)
"""


@dataclass
class Round:
    first_s: float
    second_s: float  # of a second attempt
    mb: float  # of all processes; what they share counted once


def ready(logs: list[Path]) -> None:
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        time.sleep(0.01)


def memory_mb(pids: list[int]) -> float:
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 1e6


def by_exec(folder: Path, script: Path, env: dict[str, str], ranks: int) -> Round:
    def attempt(name: str) -> tuple[float, float]:
        logs, began = [folder / f"{name}-{rank}" for rank in range(ranks)], time.perf_counter()
        children = [subprocess.Popen([sys.executable, script], env=env, stdout=log.open("w")) for log in logs]
        ready(logs)
        took, mb = time.perf_counter() - began, memory_mb([child.pid for child in children])
        for child in children:
            child.kill()
            child.wait()
        return took, mb

    (first, mb), (second, _) = attempt("exec-1"), attempt("exec-2")
    return Round(first, second, mb)


def by_fork(folder: Path, script: Path, env: dict[str, str], ranks: int) -> Round:
    began = time.perf_counter()
    with closing(ForkServer(PRELOAD, env, folder / "imports.log")) as server:

        def attempt(name: str, began: float) -> tuple[float, float]:
            logs = [folder / f"{name}-{rank}" for rank in range(ranks)]
            children = [server.start([sys.executable, str(script)], env, log) for log in logs]
            ready(logs)
            took = time.perf_counter() - began
            mb = memory_mb([child.pid for child in children] + [p.pid for p in psutil.Process().children()])
            for child in children:
                child.kill()
                child.reap()
            return took, mb

        first, mb = attempt("fork-1", began)
        second, _ = attempt("fork-2", time.perf_counter())
    return Round(first, second, mb)


def main() -> None:
    ways: dict[str, Callable[[Path, Path, dict[str, str], int], Round]] = {"exec": by_exec, "fork": by_fork}
    rows = []
    print(f"{len(os.sched_getaffinity(0))} cores, medians of {ROUNDS} rounds taken in turns\n")
    for ranks in (1, 2, 8):
        found: dict[str, list[Round]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, start in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    script = Path(folder) / "rank.py"
                    script.write_text(RANK)
                    env = common_environment(Placement(ranks, "cpu", 1))
                    found[way].append(start(Path(folder), script, env, ranks))
        for way, rounds in found.items():
            first = statistics.median(r.first_s for r in rounds)
            second = statistics.median(r.second_s for r in rounds)
            mb = statistics.median(r.mb for r in rounds)
            rows.append([str(ranks), way, f"{first:.1f}", f"{second:.1f}", f"{mb:,.0f}"])
    print(table(["ranks", "by", "first attempt s", "second s", "memory MB"], rows))


if __name__ == "__main__":
    main()
