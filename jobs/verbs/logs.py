"""logs: what the ranks of a run wrote, whichever launcher ran it."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from core.text import one_line
from jobs import launchers
from jobs.errors import OK, UserError
from jobs.record import ENDED, Run
from jobs.settings import Settings
from jobs.terminal import safe

POLL_S = 1.0


def logs(settings: Settings) -> int:
    """Logs of the newest attempt, one part per rank: the stored copy, or the local file where that has more."""
    run = Run.find(settings.root(), settings.need("run"))
    name = f"rank-{_rank(settings.rank):04d}.log" if settings.rank else ""
    shown = _print(run, name, settings.tail, {})
    if not shown and not settings.follow:
        print(f"run {run.id} has written no logs yet", file=sys.stderr)
    while settings.follow:
        over = run.last().state in ENDED
        shown = _print(run, name, settings.tail, shown)
        if over:
            break
        time.sleep(POLL_S)
    return OK


def _rank(text: str) -> int:
    if not text.isdigit():
        raise UserError(f"RANK: {text!r} is not the number of a rank")
    return int(text)


def _print(run: Run, name: str, tail: int, shown: dict[str, int]) -> dict[str, int]:
    """Print what has come since `shown`: characters by log; returns what has been shown now."""
    now = dict(shown)
    for key, text in _logs(run):
        start = shown.get(key, 0)
        if (name and not key.endswith(f"/{name}")) or (key in shown and len(text) <= start):
            continue
        lines = list(map(safe, text[start:].splitlines()))
        print(f"==> {one_line(key)} <==")
        print("\n".join(lines[-tail:] if tail and not start else lines), flush=True)
        now[key] = len(text)
    return now


def _logs(run: Run) -> list[tuple[str, str]]:
    last = run.last()
    prefix = f"logs/attempt-{last.attempt:04d}/"
    texts = {entry.key.removeprefix(prefix): run.store.get(entry.key) for entry in run.store.list(prefix)}
    handle = run.handle(last)
    near = {}
    if handle:
        with suppress(launchers.Elsewhere):
            near = launchers.of(handle).logs(run, handle, last.attempt)
    for name, content in near.items():
        if len(content) > len(texts.get(name, b"")):
            texts[name] = content
    return [(f"{prefix}{name}", texts[name].decode(errors="replace")) for name in sorted(texts)]
