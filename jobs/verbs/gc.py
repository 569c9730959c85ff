"""gc: what broken-off saves left behind, and, where asked for, old runs and features that no other run refers to.

What goes is known to be Retort's: by a record that it wrote, or by a name that nobody else gives. Nothing behind a link
of a folder store goes. Ages are by the store's own clock: those of machines may be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from core import small_json
from core.atomic import OWN_TEMP
from core.small_json import Unreadable
from core.storage import Entry, MissingObject, Store, open_store
from jobs.errors import OK, UserError, redact
from jobs.extract import ORDERS, is_order
from jobs.record import ENDED, ID, Run, State
from jobs.settings import Settings

if TYPE_CHECKING:
    from core.features.usage import Note

DAY_S = 86400.0
BROKEN_OFF_S = DAY_S  # uploads younger than this may still be going on
# Large files are written to these places only, and what is being written to a folder lies beside it.
UPLOADS = re.compile(
    rf"(?P<run>runs/{ID})/(?:checkpoints/\d+-\d+|logs/attempt-\d+|tensorboard)/[^/]+"
    r"|(?P<set>features/[0-9a-f]{16})/view-\d+/part-\d+-[0-9a-f]+\.safetensors"
    r"|weights/[^/]+--[^/]+/model\.safetensors"
)
TEMPS = re.compile(
    rf"(?:(?P<run>runs/{ID})|(?P<set>features/[0-9a-f]{{16}})|weights/[^/]+--[^/]+|{ORDERS}|sweeps)/(?:.+/)?"
    rf"{OWN_TEMP.pattern}"
)


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
    store, runs = open_store(root).confined(), [Run(root, run_id) for run_id in Run.list(root)]
    verb = "would remove" if settings.dry else "removed"
    for find in _finds(store, runs, settings.days):
        if not settings.dry:
            find.remove()
        found, freed = found + 1, freed + find.size
        print(f"{verb} {find.what} ({_mb(find.size)})")
    broken = store.abandoned(BROKEN_OFF_S, partial(_is_ours, store), remove=not settings.dry)
    if broken:
        print(f"{verb} {broken} uploads that were broken off over a day ago")
    print(f"{found + broken} found in {root}, {_mb(freed)}" + (" (DRY=1: nothing was removed)" if settings.dry else ""))
    return OK


def _is_ours(store: Store, key: str) -> bool:
    """Whether Retort writes at such a key, in a folder that it has made."""
    if not (match := UPLOADS.fullmatch(key) or TEMPS.fullmatch(key)):
        return False
    if folder := match["run"]:
        return Run(store.uri, folder.removeprefix("runs/")).exists()
    return match["set"] is None or _is_set(store.sub(match["set"]))


def _finds(store: Store, runs: list[Run], days: int) -> Iterator[Find]:
    """days: 0 for nothing that is only old."""
    limit = store.now() - DAY_S * days if days else 0.0
    old = _old(runs, limit) if days else set()
    staying = [run for run in runs if run.id not in old]
    for run in runs:
        if run.id in old and (entries := list(_in_place(store, run).list())):
            yield _folder(f"run {run.id}, ended over {days} days ago", _in_place(store, run), entries)
    for run in staying:
        yield from _orphans(run, _in_place(store, run))
    if days:
        yield from _old_features(store, staying, days, limit)


def _in_place(store: Store, run: Run) -> Store:
    """A run's folder, as far as it lies in the store itself: what is decided by all of it is done to this alone."""
    return store.sub(f"runs/{run.id}")


def _orphans(run: Run, place: Store) -> Iterator[Find]:
    from core import sweep  # loads torch: not for a store without runs

    try:
        found = sweep.orphans(run.store, run.view().active)
    except (Unreadable, MissingObject) as error:
        print(f"run {run.id} stays as it is: {redact(str(error))}")
        return
    for orphan in found:
        if size := sum(entry.size for entry in place.list(f"{orphan.key}/")):
            yield Find(f"{run.uri}/{orphan.key}: no checkpoint", size, partial(sweep.remove, place, orphan))


def _old_features(store: Store, runs: list[Run], days: int, limit: float) -> Iterator[Find]:
    """runs: those that stay.  Nothing is old while one of them may yet come to need any of them."""
    from core.features import usage

    needed: set[str] = set()
    for run in runs:
        noted = usage.noted(run.store)
        if why := _undecided(run, noted):
            print(f"features stay: run {run.id} may need any of them: {why}")
            return
        needed.update(name for note in noted.values() for name in note.sets)
    for name, group in groupby(store.list("features/"), _set_or_order):
        entries = list(group)
        idle = name not in needed and max(entry.modified for entry in entries) < limit
        if idle and _is_set_or_order(store, name):
            what = f"features/{name}, which no run reads and nobody has added to for {days} days"
            yield _folder(what, store, entries)


def _set_or_order(entry: Entry) -> str:
    """A folder of the feature store; of what workers were told to do each alone."""
    key = entry.key.removeprefix("features/")
    return key if entry.key.startswith(f"{ORDERS}/") else key.partition("/")[0]


def _is_set_or_order(store: Store, name: str) -> bool:
    """Whether Retort has written it."""
    key = f"features/{name}"
    if key.startswith(f"{ORDERS}/"):
        return is_order(store, key)
    return store.size(key) is None and _is_set(store.sub(key))


def _is_set(folder: Store) -> bool:
    from core.features import sets  # loads torch

    return sets.is_set(folder)


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


def _old(runs: list[Run], limit: float) -> set[str]:
    """Ended before `limit`, by the store's clock, and not what another run's recipe names as weights.

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
        moved = max(entry.modified for entry in run.store.list("transitions/"))
        if moved < limit and view.last.state in ENDED:
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
