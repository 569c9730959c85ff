"""What a rewriting has finished so far, kept in the place it writes to, so that the same command goes on there.

plan.json          what is written: the source's fingerprint and the settings; created by the first command
parts/000000.json  one for each finished shard: its entry for the index, what was left out on the way, where to go on
problems.jsonl     at the end: one line for each file left out, each text dropped and each duplicate
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from core import small_json
from core.data.source import DataError
from core.storage import MissingObject, Store

PLAN, PARTS, PROBLEMS = "plan.json", "parts", "problems.jsonl"
Json = dict[str, Any]
Place = tuple[int, int]  # part, row in it


@dataclass(frozen=True)
class Part:
    """One shard's share of the work.

    entry: of the index, None when no sample was left.  next: place in the order of samples behind it.
    samples: key, digest of the content and label of every sample.  problems: {kind, key, reason}.
    """

    entry: Json | None
    next: int
    samples: list[tuple[str, str, int]]
    problems: list[Json]


class Ledger:
    """plan: what a result depends on.  Raises DataError when another plan was begun or finished in this place."""

    def __init__(self, store: Store, plan: Json) -> None:
        self.store, self.plan = store, plan
        self.index = _json(store, "index.json")
        if self.index is not None:
            self._compare(self.index.get("made", {}), "holds shards already, made")
        elif store.size(PLAN) is None and (other := next(chain(store.list("shard-"), store.list(f"{PARTS}/")), None)):
            raise DataError(f"{store.uri}: holds {other.key}, which would be written over; choose another place")
        elif not store.put_if_absent(PLAN, json.dumps(plan).encode()):
            self._compare(_json(store, PLAN) or {}, "was begun")
        self.parts = 0 if self.index else sum(1 for _ in store.list(f"{PARTS}/"))
        self.place = self._read(self.parts - 1).next if self.parts else 0

    def add(self, part: Part) -> None:
        self.store.put(_key(self.parts), json.dumps(asdict(part)).encode())
        self.parts, self.place = self.parts + 1, part.next

    def entries(self) -> list[Json]:
        """Of all finished shards, for the index."""
        return [part.entry for part in self._all() if part.entry is not None]

    def close(self) -> None:
        """Drop what was only needed to go on."""
        self.store.delete(PLAN, *(entry.key for entry in self.store.list(f"{PARTS}/")))

    def write_problems(self, skipped: list[Json]) -> Json:
        """List what was left out and what came twice beside the index; returns how many of each kind."""
        problems = [*skipped, *(problem for part in self._all() for problem in part.problems), *self._duplicates()]
        self.store.put(PROBLEMS, b"".join(json.dumps(problem).encode() + b"\n" for problem in problems))
        return dict(sorted(Counter(problem["kind"] for problem in problems).items()))

    def _duplicates(self) -> Iterator[Json]:
        """Samples whose content came before.  Digests are held, 40 bytes a sample, and names of what came again."""
        again = self._again()
        firsts, named = set(again.values()), dict[Place, tuple[str, int]]()
        for number, part in enumerate(self._all() if again else ()):
            for row, (key, _, label) in enumerate(part.samples):
                if (number, row) in firsts:
                    named[number, row] = key, label
                elif (number, row) in again:
                    of, other = named[again[number, row]]
                    reason = "same content" if label == other else f"same content, labels {label} and {other}"
                    yield {"kind": "duplicate", "key": key, "reason": reason, "of": of}

    def _again(self) -> dict[Place, Place]:
        """Where content comes again, and where it came first."""
        first, again = dict[bytes, Place](), dict[Place, Place]()
        for number, part in enumerate(self._all()):
            for row, (_, digest, _) in enumerate(part.samples):
                place = first.setdefault(bytes.fromhex(digest), (number, row))
                if place != (number, row):
                    again[number, row] = place
        return again

    def _all(self) -> Iterator[Part]:
        return (self._read(number) for number in range(self.parts))

    def _read(self, number: int) -> Part:
        try:
            return Part(**small_json.read(self.store, _key(number), dict, small_json.LARGE))
        except (MissingObject, TypeError, ValueError):
            raise DataError(
                f"{self.store.uri}/{_key(number)}: missing or not readable; remove what was begun here and write anew"
            ) from None

    def _compare(self, found: Json, what: str) -> None:
        if found != self.plan:
            names = [name for name in {**self.plan, **found} if found.get(name) != self.plan.get(name)]
            theirs, ours = ([f"{name} {plan.get(name)!r}" for name in names] for plan in (found, self.plan))
            raise DataError(
                f"{self.store.uri}: {what} with {', '.join(theirs)}, this command has {', '.join(ours)}; give what it "
                "was begun with, choose another place, or remove it first"
            )


def _key(number: int) -> str:
    return f"{PARTS}/{number:06d}.json"


def _json(store: Store, key: str) -> Json | None:
    try:
        return small_json.read(store, key, dict, small_json.LARGE)
    except MissingObject:
        return None
    except small_json.Unreadable:
        return {}
