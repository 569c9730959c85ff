"""Make room on this node: `python -m jobs.ray.leave --grace SECONDS`, what Kubernetes runs before it ends a pod.

Asks what of ours works in this pod to save and leave, on the head the process that sees to attempts or to workers, and
waits for it: only when this returns does Kubernetes tell Ray to go. All ranks of a run save, as on any preemption.
"""

from __future__ import annotations

import argparse
import signal
import sys

from jobs import process
from jobs.ray.node import WORKER

OURS = ("jobs.ray.entry", "jobs.ray.workers", WORKER, "jobs.extract")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jobs.ray.leave")
    parser.add_argument("--grace", type=float, required=True, help="seconds that they may take")
    options = parser.parse_args(arguments)
    found = list({one.pid: one for module in OURS for one in process.running(module)}.values())
    late = process.leave(found, signal.SIGTERM, options.grace)
    print(f"asked {len(found)} processes to save and leave; {late} had to be ended", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
