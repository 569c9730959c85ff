"""Workers as tasks of a Ray cluster: `python -m jobs.ray.workers --count N --cpus C --gpus G --threads T -- ARGUMENTS`.

What runs on the head: one task for each worker, a process of `python ARGUMENTS` on whatever node has room. They share
their work through the store, so one that is lost is simply started again.
Exit codes: 0 when one has ended well, and so everything is done; else the worst of theirs. With --retried also 0 when
all have failed of what does not pass: whoever starts the job again would hear the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from jobs.errors import BUG, OK, PREEMPTED
from jobs.launchers.ending import may_pass
from jobs.spec import imports

ASKED = 128 + signal.SIGTERM  # exit code of a worker that was asked to leave, as when its pod is evicted
GOING_S = 120.0  # in which a node that has asked its workers to leave ends
RETRIES = 3  # of a worker that was killed, or whose node was lost


class Killed(Exception):  # noqa: N818 - an event, not a fault of this code
    """A worker was ended from outside."""


def main(arguments: list[str]) -> int:
    cut = arguments.index("--")
    options, words = _options(arguments[:cut]), arguments[cut + 1 :]
    import ray

    ray.init(address="auto")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # Ray sets one of its own; it ends the tasks, too
    task = ray.remote(work).options(
        num_cpus=options.cpus, num_gpus=options.gpus, max_retries=RETRIES, retry_exceptions=[Killed]
    )
    codes = [_code(started) for started in [task.remote(words, options.threads) for _ in range(options.count)]]
    print(f"{codes.count(OK)} of {len(codes)} workers have ended well", flush=True)
    return verdict(codes, options.retried)


def verdict(codes: Sequence[int | None], retried: bool) -> int:
    """Exit code of the job.  codes: of its workers; None of one that was lost for good."""
    if OK in codes:
        return OK
    if retried and codes and not any(code is None or code == PREEMPTED or may_pass(code) for code in codes):
        print("what failed does not pass: the job ends as done so that it is not tried again", flush=True)
        return OK
    return max((BUG if code is None else code for code in codes), default=BUG)


def work(arguments: Sequence[str], threads: int) -> int:
    """A task: one worker's process, which ends with the task.  Raises Killed.

    Where the process was asked to leave, its node is about to go. The task stays on it until then: at once, Ray would
    start it again in the room that has just become free there.
    """
    own = {**imports(), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **own})
    try:
        code = child.wait()
    finally:
        child.terminate()
    print(f"worker on {socket.gethostname()}: exit code {code}", flush=True)
    if code == ASKED:
        time.sleep(GOING_S)
    if code < 0 or code == ASKED:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else "asked to leave"
        raise Killed(f"worker on {socket.gethostname()}: {how}")
    return code


def _code(started: Any) -> int | None:
    """Exit code of a worker; None when it was lost for good."""
    import ray

    try:
        return int(ray.get(started))
    except ray.exceptions.RayError as error:
        print(f"a worker was lost for good: {str(error).splitlines()[-1]}", flush=True)
        return None


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs.ray.workers")
    for name, kind in (("count", int), ("cpus", float), ("gpus", float), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--retried", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
