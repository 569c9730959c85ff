"""The command line as a person at a terminal uses it, in a folder of their own."""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from jobs.launchers.fork_server import Forked, ForkServer

REPOSITORY = Path(__file__).parents[1]
STEP = re.compile(r"make ([a-z]+)((?: [A-Z]+=(?:'[^']*'|[^\s;]+))*)")  # `make VERB NAME=VALUE ...`
# What commands that check a recipe import; most of a command's life would be spent on it, once for each command.
PRELOAD = ("torch", "torch._dynamo", "timm", "core.stage", "core.inputs", "jobs.verbs.submit", "jobs.verbs.runs")


_ONE_AT_A_TIME = threading.Lock()


@cache
def outputs() -> Path:
    """A folder for what commands say, which goes with this test process."""
    folder = Path(tempfile.mkdtemp(prefix="commands-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def server() -> ForkServer:
    """Forks the commands of these tests, as the local launcher does its ranks: see tests/jobs/test_fork_server.py."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    found = ForkServer(PRELOAD, env, outputs() / "imports.log", room=4096)
    atexit.register(found.close)
    return found


class Started:
    """A command at work; what it says is kept in a file."""

    def __init__(self, folder: Path, env: dict[str, str], arguments: tuple[str, ...]) -> None:
        handle, name = tempfile.mkstemp(dir=outputs(), suffix=".out")
        os.close(handle)
        self._said, self.returncode = Path(name), 0
        command = [sys.executable, "-m", "jobs", *arguments]
        with _ONE_AT_A_TIME:
            process = server().start(command, env, self._said, cwd=folder)
        self._end = threading.Thread(target=self._reap, args=(process,), daemon=True)
        self._end.start()
        self.kill = process.kill

    def _reap(self, process: Forked) -> None:
        self.returncode = process.reap()

    def ends(self, timeout_s: float) -> str:
        """Wait for its end; all that it said.  Raises AssertionError, having killed it, when it takes longer."""
        self._end.join(timeout_s)
        late = self._end.is_alive()
        if late:
            self.kill()
        said = self._said.read_text()
        assert not late, f"still at work after {timeout_s} s:\n{said}"
        self._said.unlink()
        return said


class Shell:
    """Runs `python -m jobs` in a folder; every command's output is shown when a test fails."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **env}

    def start(self, *arguments: str) -> Started:
        return Started(self.folder, self.env, arguments)

    def __call__(self, *arguments: str, code: int = 0, timeout_s: float = 400) -> str:
        process = self.start(*arguments)
        out = process.ends(timeout_s)
        print(f"$ jobs {' '.join(arguments)}\n{out}")
        assert process.returncode == code, f"exit {process.returncode} instead of {code}:\n{out}"
        return out

    def type(self, said: str, *verbs: str) -> dict[str, str]:
        """Run what a command has said is to be typed next, as make would; verbs: what that is.  What each says."""
        steps = [step for line in re.findall(r"^next:? +(.+)$", said, re.M) for step in STEP.findall(line)]
        assert [verb for verb, _ in steps] == list(verbs), said
        found = {}
        for verb, words in steps:
            given = dict(word.split("=", 1) for word in shlex.split(words))
            found[verb] = Shell(self.folder, **{**self.env, **given})(verb)
        return found

    def status(self, run: str) -> dict[str, Any]:
        out: dict[str, Any] = json.loads(self("status", run, "--json"))
        return out

    def submit(self, *arguments: str, code: int = 0) -> str:
        """Submit and follow; returns the run's id."""
        return run_id(self("submit", *arguments, code=code))


def run_id(output: str) -> str:
    last = output.strip().splitlines()[-1]
    assert last.startswith("run: "), f"submit's last line is {last!r}"
    return last.removeprefix("run: ")


def wait_for(what: str, condition: Any, timeout_s: float = 180, poll_s: float = 0.2) -> Any:
    """Poll until the condition gives something true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(poll_s)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")
