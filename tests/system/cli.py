"""The command line as a person at a terminal uses it, in a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


class Shell:
    """Runs `python -m jobs` in a folder; every command's output is shown when a test fails."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **env}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def __call__(self, *arguments: str, code: int = 0, timeout_s: float = 400) -> str:
        process = self.start(*arguments)
        out, _ = process.communicate(timeout=timeout_s)
        print(f"$ jobs {' '.join(arguments)}\n{out}")
        assert process.returncode == code, f"exit {process.returncode} instead of {code}:\n{out}"
        return out

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
