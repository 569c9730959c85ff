"""What a Ray job runs on the head: `python -m jobs.ray.entry --run ID --store URI --job NAME --at PLACE ...`.

Takes the run for this job, starts a process for each attempt (jobs.ray.attempt), writes down how it ended, and makes
the next one as the recipe's launch policy allows. Also what a RayJob that was retried on a new cluster goes on with.
Exit codes: 0 done or cancelled, 75 asked to leave, else failed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from core.storage import StoreError
from jobs import spec
from jobs.errors import BUG, OK, PREEMPTED, code_of, describe
from jobs.launchers import tries
from jobs.launchers.ending import STOP_SIGNALS, Exit, Verdict, is_failure, may_pass
from jobs.launchers.supervisor import Policy
from jobs.placement import demand
from jobs.ray import command
from jobs.ray.command import KUBERNETES
from jobs.record import ACTIVE, IllegalMove, Run, State, Transition
from jobs.spec import imports
from jobs.steps import steps

ATTEMPT = (sys.executable, "-m", "jobs.ray.attempt")
T = TypeVar("T")
SPARE_S = 60.0  # beyond the grace that ranks have
POLL_S = 0.5
LOOK_S = 3.0  # between looks at the record


def main(arguments: list[str]) -> int:
    options = command.parser("jobs.ray.entry", "job", "at", "after").parse_args(arguments)
    try:
        run = Run(options.store, options.run)
        tries.check(run, f"the head of the Ray cluster, {socket.gethostname()}")
        entry = Entry(run, options)
        for signum in STOP_SIGNALS:
            signal.signal(signum, entry.stop)
        return entry.work()
    except Exception as error:
        print(describe(error), flush=True)
        return code_of(error)


class Entry:
    """All attempts of one Ray job."""

    def __init__(self, run: Run, options: Any, attempt: tuple[str, ...] = ATTEMPT) -> None:
        self.run, self.options, self.command = run, options, attempt
        self._leaving = threading.Event()

    def stop(self, signum: int, frame: object = None) -> None:
        """The job is to end: its ranks save and leave, and no further attempt is made here."""
        self._leaving.set()

    def work(self) -> int:
        attempt = self._patiently(self._take)
        if attempt is None:
            return self._patiently(self._rest)
        launch = self._patiently(self.run.recipe).launch
        while True:
            ended = self._attempt(attempt, Policy.of(launch), launch.grace_s + SPARE_S)
            found = self._patiently(lambda: self._conclude(*ended))  # noqa: B023 - called before it changes
            if not found.again:
                return self._result()
            attempt += 1

    def _take(self) -> int | None:
        last = self.run.last()
        failed = last.state == State.FAILED and self._mine(last)
        if failed and not (last.info.get("again") and tries.allowed(self.run, self.options.job)):
            print(f"{self.run.id} has failed: {last.info.get('reason')}", flush=True)
            return None
        self._compare(last)
        own = {"launcher": "ray", "job": self.options.job, "at": self.options.at, "ranks": self.options.ranks}
        return tries.take(self.run, self.options.job, own, self._why_cut)

    def _compare(self, last: Transition) -> None:
        """Say so when this is not the code that the run was submitted with: an image holds its own."""
        if difference := spec.difference(self.run.handle(last).get("commit", "")):
            print(difference, flush=True)

    def _mine(self, last: Transition) -> bool:
        return bool(self.run.handle(last).get("job") == self.options.job)

    def _why_cut(self, last: Transition, mine: bool) -> str:
        if mine:
            return "the Ray cluster or its head was lost before the attempt could say so"
        return f"lost: {self.run.look(last).text}"

    def _attempt(self, attempt: int, policy: Policy, grace_s: float) -> tuple[Exit | None, str]:
        """Pause if any has failed, run this one to its end; how it ended before its time, if it did."""
        failed = self._patiently(lambda: tries.failures(self.run, self.options.job))
        if failed and self._rested(policy.pause_s(failed)):
            return None, ""
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "said.json"
            own = [f"--{name}={getattr(self.options, name)}"
                   for name in ("run", "store", "ranks", "device", "threads", "cpus")]  # fmt: skip
            child = subprocess.Popen([*self.command, *own, f"--attempt={attempt}", f"--said={said}"],
                                     env={**os.environ, **imports()})  # fmt: skip
            code = self._wait(child, attempt, grace_s)
            if said.is_file():
                told = json.loads(said.read_text())
                return Exit(told["rank"], told["code"]), told["why"]
        ended = Exit(-1, code if code <= 0 else BUG)
        if not is_failure(ended, stopped=True) or code == PREEMPTED:
            return None, ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ended, f"the process that drives the attempt: {how}"

    def _rested(self, pause_s: float) -> bool:
        """Whether the attempt that was to begin after a pause is not wanted any more."""
        limit = time.monotonic() + pause_s
        while time.monotonic() < limit:
            if self._leaving.wait(min(LOOK_S, limit - time.monotonic())) or self._state() == State.CANCELLED:
                return True
        return False

    def _wait(self, child: subprocess.Popen[bytes], attempt: int, grace_s: float) -> int:
        """Until the attempt's process has ended. Once the job or the run is to end, its ranks have so long."""
        limit, looked = float("inf"), float("-inf")
        while child.poll() is None:
            if time.monotonic() > limit:
                print(f"the attempt did not end within {grace_s:.0f} s: its process is killed", flush=True)
                child.kill()  # and with it all that Ray has started for it
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if self._leaving.is_set():  # whenever ranks begin to work: rank 0 looks at the record
                    with suppress(IllegalMove, StoreError):
                        why = "the Ray job was asked to stop"
                        self.run.move(State.PREEMPTED, attempt, only_from=State.RUNNING, reason=why)
                if self._leaving.is_set() or self._state() not in ACTIVE:
                    child.send_signal(signal.SIGTERM)  # it may have no ranks yet
                    limit = min(limit, time.monotonic() + grace_s)
            time.sleep(POLL_S)
        return child.wait()

    def _state(self) -> State:
        """Of the run; `running` while the store does not say."""
        try:
            return self.run.last().state
        except StoreError:
            return State.RUNNING

    def _conclude(self, failure: Exit | None, why: str) -> Verdict:
        job, leaving = self.options.job, self._leaving.is_set()
        return tries.conclude(self.run, job, failure, lambda _: why, leaving=leaving)

    def _result(self) -> int:
        state = self._patiently(self.run.last).state
        if state == State.SUCCEEDED:
            return self._after()
        if state == State.CANCELLED:
            return OK
        return PREEMPTED if self._leaving.is_set() else self._failed()

    def _failed(self) -> int:
        """Of Kubernetes, a job that fails gets a new cluster and another try; what can only fail again must not."""
        if not self.options.at.startswith(KUBERNETES):
            return BUG
        print("no further attempt: the job ends as done so that it is not tried again; make status has the truth")
        return OK

    def _rest(self) -> int:
        """Nothing was to be done."""
        last = self.run.last()
        if last.state == State.SUCCEEDED:
            return self._after() if self._mine(last) else OK
        return OK if last.state == State.CANCELLED and self._mine(last) else self._failed()

    def _after(self) -> int:
        """What is to be done on the run once it has succeeded, on a node that has what a rank has."""
        verbs = [verb for verb in self.options.after.split(",") if verb]
        failed = {verb: code for verb, code in (self._verbs(verbs) if verbs else {}).items() if code != OK}
        for verb, code in failed.items():
            again = steps(self.run.root, self.run.id, verb)
            print(f"{verb} of {self.run.id} failed with exit code {code}: {again}", flush=True)
        passing = [code for code in failed.values() if code == PREEMPTED or may_pass(code)]
        if failed and not passing and self.options.at.startswith(KUBERNETES):
            return OK  # as in `_failed`
        return max(map(abs, passing or failed.values()), default=OK)

    def _verbs(self, verbs: list[str]) -> dict[str, int]:
        """Their exit codes; negative: ended by that signal."""
        import ray

        ray.init(address="auto")
        each = demand(self.options.device, self.options.cpus)
        task = ray.remote(_verb).options(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), max_retries=3)
        own = self.run.id, self.run.root, self.options.threads
        return {verb: int(ray.get(task.remote(verb, *own))) for verb in verbs}

    def _patiently(self, action: Callable[[], T]) -> T:
        return tries.patiently(action, self._leaving)


def _verb(verb: str, run: str, root: str, threads: int) -> int:
    environment = {**os.environ, **imports(), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-m", "jobs", verb, run, "--store", root], env=environment)
    print(f"{verb} of {run}: exit code {done.returncode}", flush=True)
    return done.returncode


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
