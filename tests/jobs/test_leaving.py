"""Whoever ends a command, what it has begun is put in order, once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.leaving import as_interrupts

PROGRAM = """
import time
from jobs.leaving import as_interrupts
with as_interrupts():
    try:
        with as_interrupts():
            print("ready", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        print("asked", flush=True)
        time.sleep(0.5)
    finally:
        open("ended", "w").close()
"""


def start(folder: Path, **given: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=folder,
                            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, **given)  # type: ignore[call-overload, no-any-return]  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_is_heard_once(signum: signal.Signals, tmp_path: Path) -> None:
    with start(tmp_path, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signum)
        assert child.stdout.readline() == b"asked\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    assert (tmp_path / "ended").exists()


def test_a_terminal_that_is_closed_disturbs_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with start(tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as child:
        os.close(theirs)
        assert os.read(ours, 100).startswith(b"ready")
        os.close(ours)
        time.sleep(0.1)
        child.send_signal(signal.SIGHUP)
        assert child.wait(30) == 0
    assert (tmp_path / "ended").exists()


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
