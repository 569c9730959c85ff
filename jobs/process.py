"""Who runs where: a process named so that it can be recognised later, also after its number has been used again."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psutil import Process

PR_SET_PDEATHSIG = 1


def identity(pid: int) -> dict[str, Any]:
    """Host, number and start time (clock ticks after boot) of a process on this machine."""
    return {"host": socket.gethostname(), "pid": pid, "born": _born(pid)}


def alive(info: Mapping[str, Any]) -> bool | None:
    """Whether the process of `identity` still runs; None when it is not on this machine."""
    if info.get("host") != socket.gethostname() or not info.get("pid"):
        return None
    return info.get("born") is not None and _born(int(info["pid"])) == info["born"]


def send(info: Mapping[str, Any], signum: signal.Signals) -> bool:
    """Signal the process of `identity`; False when it is gone or not on this machine."""
    if not alive(info):
        return False
    try:
        os.kill(int(info["pid"]), signum)
    except ProcessLookupError:
        return False
    return True


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
    for each in psutil.process_iter(["uids", "cmdline", "status"]):
        line = each.info["cmdline"] or []
        program = line[line.index("-m") :] if "-m" in line else []  # its words may name further programs
        ours = each.info["uids"] and each.info["uids"].real == os.getuid() and each.info["status"] != "zombie"
        if ours and program[:2] == ["-m", module] and _within(list(words), program):
            found.append(each)
    return found


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
