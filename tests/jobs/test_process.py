"""Processes found by what they run, and seen to their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import process

SLEEPER = """
import signal, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Three processes that run the module `sleeper`; one does not care for SIGTERM."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    words = {"one": "--run a --attempt 1", "two": "--run a --attempt 2 deaf", "other": "--run b"}
    start = [sys.executable, "-m", "sleeper"]
    found = {
        name: subprocess.Popen([*start, *line.split()], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for name, line in words.items()
    }
    for each in found.values():
        assert each.stdout
        assert each.stdout.readline() == "ready\n"
    yield found
    for each in found.values():
        each.kill()
        each.wait()


Sleepers = dict[str, subprocess.Popen[str]]


def test_processes_are_found_by_module_and_words(sleepers: Sleepers) -> None:
    found = process.running("sleeper", "--run", "a")
    assert {each.pid for each in found} == {sleepers["one"].pid, sleepers["two"].pid}
    assert sorted(process.argument(each, "--attempt") for each in found) == ["1", "2"]
    assert process.argument(found[0], "--none") == ""


def test_those_who_do_not_leave_in_time_are_ended(sleepers: Sleepers) -> None:
    assert process.leave(process.running("sleeper", "--run", "a"), signal.SIGTERM, grace_s=1.0) == 1
    assert not process.running("sleeper", "--run", "a")
    assert sleepers["other"].poll() is None


def test_a_process_is_recognised_until_it_ends(sleepers: Sleepers) -> None:
    known = process.identity(sleepers["one"].pid)
    assert process.alive(known)
    assert process.alive({**known, "host": "elsewhere"}) is None
    assert process.runs(known, "sleeper", "--run", "a") is True
    assert process.runs({**known, "host": "elsewhere"}, "sleeper") is None
    assert process.send(known, signal.SIGKILL, "sleeper", "--run", "a")
    sleepers["one"].wait()
    assert process.alive(known) is False
    assert process.runs(known, "sleeper") is False
    assert not process.send(known, signal.SIGKILL, "sleeper")


@pytest.mark.parametrize("program", [("sleeper", "--run", "b"), ("sleeper", "a", "--run"), ("other", "--run", "a")])
def test_a_process_that_runs_something_else_is_not_signalled(sleepers: Sleepers, program: tuple[str, ...]) -> None:
    known = process.identity(sleepers["one"].pid)
    assert process.runs(known, *program) is False
    assert not process.send(known, signal.SIGKILL, *program)
    assert sleepers["one"].poll() is None


def test_a_process_of_another_user_is_not_signalled(sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch) -> None:
    known = process.identity(sleepers["one"].pid)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert process.runs(known, "sleeper", "--run", "a"), "though it is seen to work"
    assert not process.send(known, signal.SIGKILL, "sleeper", "--run", "a")
