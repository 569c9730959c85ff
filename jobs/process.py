"""Who runs where: a process named so that it can be recognised later, also after its number has been used again."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psutil import Process

ENDING_S = 1.0
FACTS = ["uids", "cmdline", "status"]
PR_SET_PDEATHSIG = 1


def identity(pid: int) -> dict[str, Any]:
    """Host, number and start time (clock ticks after boot) of a process on this machine."""
    return {"host": socket.gethostname(), "pid": pid, "born": _born(pid)}


def alive(info: Mapping[str, Any]) -> bool | None:
    """Whether the process of `identity` still runs; None when it is not on this machine."""
    pid = info.get("pid")
    if info.get("host") != socket.gethostname() or type(pid) is not int or pid <= 0:
        return None
    return info.get("born") is not None and _born(pid) == info["born"]


def runs(info: Mapping[str, Any], module: str, *words: str) -> bool | None:
    """Whether the process of `identity` still runs, and is `python -m module` with these words; None as in `alive`.

    Whoever has written down its number may have meant another one.
    """
    here = alive(info)
    if not here or _found(info, module, words):
        return here
    limit = time.monotonic() + ENDING_S
    while _is_ending(info) and time.monotonic() < limit:
        time.sleep(0.01)
    return False


def send(info: Mapping[str, Any], signum: signal.Signals, module: str, *words: str) -> bool:
    """Signal the process of `identity`; False when it is gone, elsewhere, another user's, or runs something else."""
    import psutil

    one = _found(info, module, words) if alive(info) else None
    if one is None or not _is_mine(one.info):
        return False
    try:
        one.send_signal(signum)  # which looks again at when it was born
    except psutil.Error:
        return False
    return True


def _is_ending(info: Mapping[str, Any]) -> bool:
    """Whether the kernel has taken away its command line, and is about to take away the rest."""
    with suppress(OSError):
        return bool(alive(info)) and not Path(f"/proc/{info['pid']}/cmdline").read_bytes()
    return False


def _found(info: Mapping[str, Any], module: str, words: Sequence[str]) -> Process | None:
    import psutil

    with suppress(psutil.Error):
        one = psutil.Process(info["pid"])
        one.info = one.as_dict(FACTS)  # as psutil.process_iter has it
        return one if _is(one.info, module, words) else None
    return None


def _born(pid: int) -> int | None:
    """Start time, or None when there is no such process or only its unreaped remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def running(module: str, *words: str) -> list[Process]:
    """Processes of this user and machine (or container) that run `python -m module` with these words side by side."""
    import psutil

    found = []
    for each in psutil.process_iter(FACTS):
        if _is_mine(each.info) and _is(each.info, module, words):
            found.append(each)
    return found


def _is(about: Mapping[str, Any], module: str, words: Sequence[str]) -> bool:
    line = about["cmdline"] or []
    program = line[line.index("-m") :] if "-m" in line else []  # its words may name further programs
    return program[:2] == ["-m", module] and _within(list(words), program)


def _is_mine(about: Mapping[str, Any]) -> bool:
    return bool(about["uids"]) and about["uids"].real == os.getuid() and about["status"] != "zombie"


def argument(one: Process, name: str) -> str:
    """The word behind `name` on the command line of a process; "" when there is none any more."""
    line = [*(one.info["cmdline"] or []), "", ""]
    return str(line[line.index(name) + 1]) if name in line else ""


def leave(processes: list[Process], signum: signal.Signals, grace_s: float) -> int:
    """Signal processes, give them so long to end, and end those that are left; returns how many these were."""
    import psutil

    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signum)
    _, late = psutil.wait_procs(processes, grace_s)
    for each in late:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(late, 5.0)
    return len(late)


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent ends, so that this process does not outlive it unseen."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _within(words: list[str], line: list[str]) -> bool:
    return any(line[i : i + len(words)] == words for i in range(len(line) - len(words) + 1))
