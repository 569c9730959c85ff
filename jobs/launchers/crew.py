"""Workers side by side on this machine, which share their work through the store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from jobs.errors import BUG, OK, JobError
from jobs.placement import Placement, gpu_count
from jobs.spec import REPOSITORY, imports

DEVICES = "CUDA_VISIBLE_DEVICES"


class NoneLeft(JobError):  # noqa: N818 (says what is the matter)
    """All workers have ended before everything was done; each has said why."""

    def __init__(self, codes: Sequence[int]) -> None:
        super().__init__(f"no worker is left: {', '.join(map(ending, codes))}; what is done stays done")
        self.code = max((code for code in codes if code > 0), default=BUG)


def work(arguments: Sequence[str], count: int, placement: Placement) -> str:
    """Run so many of `python ARGUMENTS` to their end; how many ended well, in words.

    One that ends well says that everything is done, whoever did it.  Raises NoneLeft when none does.
    """
    command = [sys.executable, *arguments]
    crew = [subprocess.Popen(command, cwd=REPOSITORY, env=environment(i, count, placement)) for i in range(count)]
    codes = [worker.wait() for worker in crew]
    if OK not in codes:
        raise NoneLeft(codes)
    lost = [ending(code) for code in codes if code != OK]
    others = f"; others did the work of {len(lost)} ({', '.join(lost)})" if lost else ""
    return f"{codes.count(OK)} of {count} workers ended well{others}"


def environment(number: int, count: int, placement: Placement) -> Mapping[str, str]:
    """Of one worker: its share of this machine's cores, and one GPU."""
    cores = max(1, len(os.sched_getaffinity(0)) // count)
    own = {"OMP_NUM_THREADS": str(min(placement.threads, cores)), "PYTHONUNBUFFERED": "1"}
    if placement.device == "cuda":
        there = os.environ.get(DEVICES, "").split(",") if os.environ.get(DEVICES) else range(gpu_count())
        own[DEVICES] = str(there[number % len(there)])
    return {**os.environ, **imports(), **own}


def ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
