"""The log that decides what a run's checkpoints are: numbered entries, each created once, by put-if-absent.

    commits/000001.json   an attempt starts, from nothing
            000002.json   manifest of a checkpoint of its
            000003.json   another attempt starts, from entry 2
            000004.json   manifest of a checkpoint of its

Whoever appends writes at the number after the last entry that it has read. So an attempt that was asleep while another
one started finds its number taken, reads who took it, and stops: two attempts of one run can never both commit. Starts
are never deleted, so the number behind an attempt's last entry stays taken once another attempt has started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from core import manifest as manifests
from core import small_json
from core.manifest import CheckpointError, Manifest, Window
from core.storage import MissingObject, Store, StoreError, crc32c

FOLDER = "commits"
SCHEMA = 2
NAME = re.compile(rf"{FOLDER}/(\d+)\.json")


class SupersededError(RuntimeError):
    """Another attempt of this run has started: this one may commit nothing any more."""


@dataclass(frozen=True)
class Claim:
    """The start of an attempt, or its second start after a rewind."""

    attempt: int
    resumed: int | None  # entry that it goes on from
    step: int  # of the run, at which it goes on
    host: str
    created: float
    lost: int = 0  # steps that the attempts before had logged and that are computed again
    skipped: tuple[Window, ...] = ()
    rewound: bool = False  # what came after `resumed` is not wanted
    number: int = 0


Entry = Claim | Manifest


def key(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def numbers(run: Store) -> list[int]:
    """Of all entries, oldest first."""
    return [int(found[1]) for e in run.list(f"{FOLDER}/") if (found := NAME.fullmatch(e.key))]


def append(run: Store, entry: Entry, number: int) -> bool:
    """False: the number is taken."""
    kind = "claim" if isinstance(entry, Claim) else "checkpoint"
    content = asdict(replace(entry, number=0)) if isinstance(entry, Claim) else manifests.to_json(entry)
    body = {"schema": SCHEMA, "kind": kind, "entry": content}
    return run.put_if_absent(key(number), json.dumps({**body, "crc32c": _sum(body)}).encode())


def read(run: Store, number: int) -> Entry:
    """Raises CheckpointError when the entry is damaged or not of this schema, MissingObject."""
    try:
        return _parse(run, number)
    except CheckpointError:  # an answer may be damaged on its way
        return _parse(run, number)


def _parse(run: Store, number: int) -> Entry:
    try:
        body: dict[str, Any] = small_json.read(run, key(number), dict, small_json.LARGE)
        if body["schema"] != SCHEMA:
            raise CheckpointError(f"{key(number)}: checkpoint schema {body['schema']}, this Retort reads {SCHEMA}")
        if body.pop("crc32c") != _sum(body):
            raise CheckpointError(f"{key(number)}: its checksum is wrong")
        content = body["entry"]
        if body["kind"] == "checkpoint":
            return replace(manifests.from_json(content), number=number)
        skipped = tuple((int(first), int(last)) for first, last in content["skipped"])
        return Claim(**{**content, "skipped": skipped, "number": number})
    except small_json.Unreadable as error:
        raise CheckpointError(f"{key(number)}: unreadable: {error.why}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{key(number)}: unreadable: {error}") from None


def entries(
    run: Store, warn: Callable[[str], object] = print, read: Callable[[Store, int], Entry] = read
) -> Iterator[Entry]:
    """The run's present course, newest first: what an attempt has passed over does not come again.

    Damaged entries are named and passed over.  read: one that remembers saves requests.
    """
    todo = numbers(run)
    while todo:
        try:
            entry = read(run, todo.pop())
        except (CheckpointError, MissingObject) as error:
            warn(f"warning: passed over: {error}")
            continue
        yield entry
        if isinstance(entry, Claim):
            todo = [n for n in todo if entry.resumed is not None and n <= entry.resumed]


def checkpoints(run: Store, warn: Callable[[str], object] = print) -> Iterator[Manifest]:
    """Committed checkpoints of the run's present course, newest first."""
    return (entry for entry in entries(run, warn) if isinstance(entry, Manifest))


def claims(run: Store, after: int = 0) -> list[Claim]:
    """Starts of attempts behind entry `after`, oldest first, dead ends included."""
    found = []
    for number in [n for n in numbers(run) if n > after]:
        try:
            entry = read(run, number)
        except (CheckpointError, MissingObject):
            continue
        if isinstance(entry, Claim):
            found.append(entry)
    return found


def overtaken(run: Store, attempt: int) -> bool:
    """Whether a newer attempt has started; False where that cannot be told."""
    with suppress(StoreError):
        return any(claim.attempt > attempt for claim in claims(run))
    return False


def commit(run: Store, manifest: Manifest, after: int) -> int:
    """Make `manifest` a checkpoint; after: the last entry read.  Returns its number.

    May be repeated after a StoreError, which leaves open whether the entry was made.  Raises SupersededError.
    """
    while not append(run, manifest, after + 1):
        after, there = read_on(run, manifest.key, after)
        if there:  # by an answer that got lost, or by a newcomer that found all parts
            return after
    return after + 1


def read_on(run: Store, key: str, after: int) -> tuple[int, bool]:
    """What has been appended behind entry `after`: the last number, or that of checkpoint `key` and True.

    Raises SupersededError when an attempt has started.
    """
    for number in [n for n in numbers(run) if n > after]:
        entry = read(run, number)
        if isinstance(entry, Claim):
            raise SupersededError(f"{run.uri}: attempt {entry.attempt} has started on {entry.host}")
        after = number
        if entry.key == key:
            return after, True
    return after, False


def _sum(body: dict[str, Any]) -> int:
    return crc32c(json.dumps(body, sort_keys=True).encode())
