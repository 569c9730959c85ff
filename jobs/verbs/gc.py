"""gc: what broken-off saves left behind, and, where asked for, old runs that no other run refers to."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from core.storage import MissingObject, open_store
from jobs.errors import OK
from jobs.record import ENDED, ID, Run
from jobs.settings import Settings

BROKEN_OFF_S = 86400.0  # uploads younger than this may still be going on


def gc(settings: Settings) -> int:
    """Remove orphans of all runs of the store, and with DAYS runs that ended so long ago; DRY=1 only says what."""
    root, freed, found = settings.root(), 0, 0
    runs = [Run(root, run_id) for run_id in Run.list(root)]
    old = _old(runs, settings.days) if settings.days else []
    verb = "would remove" if settings.dry else "removed"
    for run in runs:
        if run.id in old:
            entries = list(run.store.list())
            what, size = f"run {run.id}, ended over {settings.days} days ago", sum(e.size for e in entries)
            if not settings.dry:
                run.store.delete(*[e.key for e in reversed(entries)])  # what makes it a run comes last
            found, freed = found + 1, freed + size
            print(f"{verb} {what} ({_mb(size)})")
            continue
        from core import sweep  # loads torch: not for a store without runs

        for orphan in sweep.orphans(run.store, run.view().active):
            if not settings.dry:
                sweep.remove(run.store, orphan)
            found, freed = found + 1, freed + orphan.size
            print(f"{verb} {run.uri}/{orphan.key}: no checkpoint ({_mb(orphan.size)})")
    broken = open_store(root).abandoned(BROKEN_OFF_S, remove=not settings.dry)
    if broken:
        print(f"{verb} {broken} uploads that were broken off over a day ago")
    print(f"{found + broken} found in {root}, {_mb(freed)}" + (" (DRY=1: nothing was removed)" if settings.dry else ""))
    return OK


def _old(runs: list[Run], days: int) -> set[str]:
    """Ended so long ago, and not what another run's recipe names as weights."""
    needed: set[str] = set()
    ended = {}
    for run in runs:
        view = run.view()
        if view.last.state in ENDED and time.time() - view.last.time > 86400 * days:
            ended[run.id] = _references(run)
        else:
            needed |= _references(run)
    while more := {r for run_id in needed & ended.keys() for r in ended[run_id]} - needed:
        needed |= more  # what a needed run was made from is needed as well
    return ended.keys() - needed


def _references(run: Run) -> set[str]:
    """Runs that a run's recipe or record names."""
    record: dict[str, Any] = run.record()
    try:
        text = run.store.get("recipe.yaml").decode()
    except MissingObject:  # cut short: its record may still tell
        text = ""
    return set(re.findall(rf"run:({ID})", text + json.dumps(record)))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
