"""Workers as tasks of a Ray cluster: `python -m jobs.ray.workers --count N --cpus C --gpus G --threads T -- ARGUMENTS`.

What runs on the head: one task for each worker, a process of `python ARGUMENTS` on whatever node has room. They share
their work through the store, so one that is lost is simply started again.
Exit codes: 0 when one has ended well, and so everything is done; else the worst of theirs.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jobs.errors import BUG, OK, PREEMPTED
from jobs.spec import REPOSITORY

ASKED = 128 + signal.SIGTERM  # exit code of a worker that was asked to leave, as when its pod is evicted
RETRIES = 3  # of a worker that was killed, or whose node was lost


class Killed(Exception):  # noqa: N818 - an event, not a fault of this code
    """A worker was ended from outside."""


def main(arguments: list[str]) -> int:
    cut = arguments.index("--")
    options, words = _options(arguments[:cut]), arguments[cut + 1 :]
    import ray

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # with this process Ray ends its tasks
    ray.init(address="auto")
    task = ray.remote(work).options(
        num_cpus=options.cpus, num_gpus=options.gpus, max_retries=RETRIES, retry_exceptions=[Killed]
    )
    codes = [_code(started) for started in [task.remote(words, options.threads) for _ in range(options.count)]]
    print(f"{codes.count(OK)} of {len(codes)} workers have ended well", flush=True)
    return OK if OK in codes else max(codes, default=BUG)


def work(arguments: Sequence[str], threads: int) -> int:
    """A task: one worker's process, which ends with the task.  Raises Killed."""
    search = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "PYTHONPATH": search}
    child = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **own})
    try:
        code = child.wait()
    finally:
        child.terminate()
    print(f"worker on {socket.gethostname()}: exit code {code}", flush=True)
    if code < 0 or code == ASKED:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else "asked to leave"
        raise Killed(f"worker on {socket.gethostname()}: {how}")
    return code


def _code(started: Any) -> int:
    """Exit code of a worker; that of a bug when it was lost for good."""
    import ray

    try:
        return int(ray.get(started))
    except ray.exceptions.RayError as error:
        print(f"a worker was lost for good: {str(error).splitlines()[-1]}", flush=True)
        return BUG


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.ray.workers")
    for name, kind in (("count", int), ("cpus", float), ("gpus", float), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
