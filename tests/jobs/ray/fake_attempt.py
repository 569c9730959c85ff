"""Stands in for jobs.ray.attempt where the entry point is tested: does what its first argument says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from jobs.record import Run, State  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("deed")
    for name in ("run", "store", "said", "device"):
        parser.add_argument(f"--{name}")
    for name in ("attempt", "ranks", "threads", "cpus"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    run, deed = Run(options.store, options.run), options.deed.removesuffix("-once")
    if options.deed != deed and options.attempt > 1:
        deed = "ok"
    if deed == "pending":  # no room for ranks yet
        time.sleep(20)
    if deed == "working":  # until the record says that it is to make room
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run.move(State.RUNNING, options.attempt)
    while deed == "working" and run.last().state == State.RUNNING and run.last().attempt == options.attempt:
        time.sleep(0.05)
    if deed == "stuck":  # a rank that does not end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run.move(State.SUCCEEDED, options.attempt)
        time.sleep(60)
    if deed == "ok":
        run.move(State.SUCCEEDED, options.attempt)
    elif deed == "preempted":
        run.move(State.PREEMPTED, options.attempt, reason="SIGTERM received")
    elif deed == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed in ("rank-lost", "wrong-input"):
        code = 2 if deed == "wrong-input" else -9
        Path(options.said).write_text(json.dumps({"rank": 1, "code": code, "why": f"rank 1: {deed}"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
