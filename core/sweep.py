"""What interrupted saves leave in a run's folder: files that no checkpoint names and that none will name any more."""

from __future__ import annotations

from dataclasses import dataclass

from core import commits, manifest, parts, retention
from core.manifest import CheckpointError, Manifest
from core.salvage import border, is_newer, place_of
from core.storage import MissingObject, Store


@dataclass(frozen=True)
class Orphan:
    key: str  # of a folder of files
    number: int | None  # of its entry in the log, where it has one that the run's course has passed over
    size: int  # bytes


def orphans(run: Store, live: bool) -> list[Orphan]:
    """live: somebody works on the run, so the newest attempt's parts are on their way.

    Spared are checkpoints of the run's course, and complete newer ones, which the next attempt commits. Where an entry
    of the log cannot be read nothing is an orphan.  Raises StoreError.
    """
    entries = []
    for number in commits.numbers(run):
        try:
            entries.append(commits.read(run, number))
        except (CheckpointError, MissingObject):
            return []
    course = {m.key for m in commits.checkpoints(run)}
    passed = {e.key: e.number for e in entries if isinstance(e, Manifest) and e.key not in course}
    attempt = max((e.number for e in entries if not isinstance(e, Manifest)), default=0)
    above, found = border(run), []
    for key, size in _folders(run).items():
        place = place_of(key)
        if key in course or place is None:
            continue
        coming = is_newer(place, above) and key not in passed
        if coming and (live and place[1] == attempt or isinstance(parts.collect(run, key), Manifest)):
            continue
        found.append(Orphan(key, passed.get(key), size))
    return found


def remove(run: Store, orphan: Orphan) -> None:
    if orphan.number is not None:
        run.delete(commits.key(orphan.number))
    retention.drop(run, orphan.key)


def _folders(run: Store) -> dict[str, int]:
    """Folders of checkpoints, with their bytes."""
    sizes: dict[str, int] = {}
    for entry in run.list(f"{manifest.FOLDER}/"):
        key = entry.key.rpartition("/")[0]
        sizes[key] = sizes.get(key, 0) + entry.size
    return sizes
