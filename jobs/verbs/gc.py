"""gc: what broken-off saves left behind, and, where asked for, old runs and features that no other run refers to."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from core import small_json
from core.small_json import Unreadable
from core.storage import Entry, MissingObject, Store, open_store
from jobs.errors import OK, UserError, redact
from jobs.extract import ORDERS
from jobs.record import ENDED, ID, Run, State
from jobs.settings import Settings

if TYPE_CHECKING:
    from core.features.usage import Note

BROKEN_OFF_S = 86400.0  # uploads younger than this may still be going on


@dataclass(frozen=True)
class Find:
    what: str
    size: int  # bytes
    remove: Callable[[], None]


def gc(settings: Settings) -> int:
    """Remove orphans of all runs of the store, and with DAYS runs that ended and features that were made so long ago.

    DRY=1 only says what.
    """
    root, freed, found = settings.root(), 0, 0
    runs = [Run(root, run_id) for run_id in Run.list(root)]
    verb = "would remove" if settings.dry else "removed"
    for find in _finds(root, runs, settings.days):
        if not settings.dry:
            find.remove()
        found, freed = found + 1, freed + find.size
        print(f"{verb} {find.what} ({_mb(find.size)})")
    broken = open_store(root).abandoned(BROKEN_OFF_S, remove=not settings.dry)
    if broken:
        print(f"{verb} {broken} uploads that were broken off over a day ago")
    print(f"{found + broken} found in {root}, {_mb(freed)}" + (" (DRY=1: nothing was removed)" if settings.dry else ""))
    return OK


def _finds(root: str, runs: list[Run], days: int) -> Iterator[Find]:
    """days: 0 for nothing that is only old."""
    old = _old(runs, days) if days else set()
    staying = [run for run in runs if run.id not in old]
    for run in runs:
        if run.id in old:
            yield _folder(f"run {run.id}, ended over {days} days ago", run.store, list(run.store.list()))
    for run in staying:
        yield from _orphans(run)
    if days:
        yield from _old_features(root, staying, days)


def _orphans(run: Run) -> Iterator[Find]:
    from core import sweep  # loads torch: not for a store without runs

    try:
        found = sweep.orphans(run.store, run.view().active)
    except (Unreadable, MissingObject) as error:
        print(f"run {run.id} stays as it is: {redact(str(error))}")
        return
    for orphan in found:
        yield Find(f"{run.uri}/{orphan.key}: no checkpoint", orphan.size, partial(sweep.remove, run.store, orphan))


def _old_features(root: str, runs: list[Run], days: int) -> Iterator[Find]:
    """runs: those that stay.  Nothing is old while one of them may yet come to need any of them."""
    from core.features import usage

    needed: set[str] = set()
    for run in runs:
        noted = usage.noted(run.store)
        if why := _undecided(run, noted):
            print(f"features stay: run {run.id} may need any of them: {why}")
            return
        needed.update(name for note in noted.values() for name in note.sets)
    store, limit = open_store(root), time.time() - 86400 * days
    for name, group in groupby(store.list("features/"), _set_or_order):
        entries = list(group)
        if name not in needed and max(entry.modified for entry in entries) < limit:
            what = f"features/{name}, which no run reads and nobody has added to for {days} days"
            yield _folder(what, store, entries)


def _set_or_order(entry: Entry) -> str:
    """A folder of the feature store; of what workers were told to do each alone."""
    key = entry.key.removeprefix("features/")
    return key if entry.key.startswith(f"{ORDERS}/") else key.partition("/")[0]


def _undecided(run: Run, noted: Mapping[str, Note]) -> str:
    """Why a run may yet come to need any features; nothing where what it reads is known.  noted: by stage."""
    from core.config import fingerprint
    from core.merge import ConfigError

    try:
        if run.last().state is State.SUCCEEDED:
            return ""
        recipe = run.recipe()
    except UserError:  # cut short, and never to begin
        return ""
    except (Unreadable, MissingObject) as error:
        return redact(str(error))
    except ConfigError as error:
        return f"its recipe cannot be read ({error})"
    begun = {name for name, note in noted.items() if note.recipe == fingerprint(recipe)}
    coming = [name for name in recipe.stage_names() if name not in begun and recipe.features != "off"]
    return f"it has not begun its stage {coming[0]}, or not with its present recipe" if coming else ""


def _folder(what: str, store: Store, entries: list[Entry]) -> Find:
    keys = [entry.key for entry in reversed(entries)]  # what makes it a run or a set comes last
    return Find(what, sum(entry.size for entry in entries), partial(store.delete, *keys))


def _old(runs: list[Run], days: int) -> set[str]:
    """Ended so long ago, and not what another run's recipe names as weights.

    None while one of them cannot be read, which may name any.
    """
    needed: set[str] = set()
    ended = {}
    for run in runs:
        try:
            view = run.view()
        except (Unreadable, MissingObject) as error:
            print(f"runs stay, however old: run {run.id} may need any of them: {redact(str(error))}")
            return set()
        if view.last.state in ENDED and time.time() - view.last.time > 86400 * days:
            ended[run.id] = _references(run)
        else:
            needed |= _references(run)
    while more := {r for run_id in needed & ended.keys() for r in ended[run_id]} - needed:
        needed |= more  # what a needed run was made from is needed as well
    return ended.keys() - needed


def _references(run: Run) -> set[str]:
    """Runs that a run's recipe or record names."""
    return {name for key in ("recipe.yaml", "record.json") for name in re.findall(rf"run:({ID})", _text(run, key))}


def _text(run: Run, key: str) -> str:
    """Whether or not anybody could make sense of it."""
    try:
        return run.store.get_range(key, 0, small_json.LARGE).decode(errors="replace")
    except MissingObject:  # cut short
        return ""


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
