"""Leaving a command in order, whoever asks for it: Ctrl-C, `kill`, or a terminal that is closed."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager

ASKED = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, the first time; further ones do not disturb what that leads to.

    What the caller ignores (nohup) stays ignored. May be nested.
    """
    ours = [number for number in ASKED if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(signum: int, frame: object) -> None:
    for number in ASKED:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)
    if signum == signal.SIGHUP:
        _forget_terminal()
    raise KeyboardInterrupt


def _forget_terminal() -> None:
    """Whatever is still said goes nowhere: writing to a terminal that has been closed is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)
