"""Stands in for jobs.worker where what watches ranks is tested: does what its first argument says."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.record import IllegalMove, Run, State  # noqa: E402

PATIENCE_S = 20.0  # then a rank that nobody ends says so and leaves
RANK = int(os.environ["RANK"])


class FakeWorker:
    def __init__(self, run: Run, attempt: int) -> None:
        self.run, self.attempt, self.asked = run, attempt, 0

    def ok(self) -> int:
        self._say(State.RUNNING)
        if RANK == 0:
            self.run.beat({"stage": "main", "step": 5, "steps": 10, "images_per_s": 12.0}, self.attempt)
        self._say(State.SUCCEEDED)
        return 0

    def stubborn(self) -> int:
        """Rank 1 fails; the others do not end when they are asked to."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return self.fail()

    def fail(self) -> int:
        """Rank 1 fails; the others do not end by themselves."""
        self._say(State.RUNNING)
        if RANK == 1:
            print(f"ValueError: broken, key {os.environ.get('AWS_SECRET_ACCESS_KEY', '')}", flush=True)
            return 1
        return self._linger()

    def killed(self) -> int:
        self._say(State.RUNNING)
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._linger()

    def vanish(self) -> int:
        self._say(State.RUNNING)
        return 0

    def abort_at_exit(self) -> int:
        self.ok()
        os.abort()

    def preempted_once(self) -> int:
        if self.attempt > 1:
            return self.ok()
        self._say(State.RUNNING)
        self._say(State.PREEMPTED)
        return 75

    def killed_once(self) -> int:
        return self.ok() if self.attempt > 1 else self.killed()

    def hung_once(self) -> int:
        return self._once(70)

    def store_down_once(self) -> int:
        return self._once(3)

    def wrong_input(self) -> int:
        return self._once(2)

    def _once(self, code: int) -> int:
        """Rank 1 ends the first attempt with this code."""
        if self.attempt > 1:
            return self.ok()
        self._say(State.RUNNING)
        return code if RANK == 1 else self._linger()

    def echo(self) -> int:
        """Rank 1 is killed; rank 0 is the first to be seen to fail."""
        self._say(State.RUNNING)
        if RANK == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        print("RuntimeError: connection closed by peer", flush=True)
        return 1

    def wait(self) -> int:
        """Runs until a signal comes, saves and leaves."""
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, self._ask)
        print("ready", flush=True)
        self._say(State.RUNNING)
        limit = time.monotonic() + PATIENCE_S
        while not self.asked and time.monotonic() < limit:
            time.sleep(0.02)
        print(f"asked by {signal.Signals(self.asked).name}", flush=True)
        self._say(State.PREEMPTED)
        return 75

    def deaf(self) -> int:
        """Runs and does not know what a signal is."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._say(State.RUNNING)
        return self._linger()

    def environment(self) -> int:
        print(json.dumps(dict(os.environ)), flush=True)
        return self.ok()

    def _linger(self) -> int:
        time.sleep(PATIENCE_S)
        print("nobody ended this rank", flush=True)
        return 0

    def _ask(self, signum: int, frame: object) -> None:
        self.asked = signum

    def _say(self, state: State) -> None:
        if RANK == 0:
            with suppress(IllegalMove):
                self.run.move(state, self.attempt)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("deed")
    parser.add_argument("--run", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    options = parser.parse_args()
    code: int = getattr(FakeWorker(Run(options.store, options.run), options.attempt), options.deed)()
    return code


if __name__ == "__main__":
    sys.exit(main())
