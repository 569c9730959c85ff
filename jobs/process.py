"""Who runs where: a process named so that it can be recognised later, also after its number has been used again."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
