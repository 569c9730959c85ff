"""Which checkpoints stay: the newest, every so many steps, the best, and those that somebody reads."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from core import commits, small_json
from core.commits import Claim, Entry
from core.manifest import CheckpointError, Manifest
from core.storage import MissingObject, Store, StoreError

HOLDS = "holds"
HOLD_S = 3600.0
CLOCKS_S = 60.0  # by which the clocks of two machines may differ


@dataclass
class Policy:
    """keep: newest ones.  every: multiples of so many steps.  best: lowest losses on held-out images, by stage."""

    keep: int = 2
    every: int = 0
    best: int = 0
    _known: dict[int, Entry] = field(default_factory=dict, repr=False)  # entries never change

    def read(self, run: Store, number: int) -> Entry:
        if number not in self._known:
            entry = commits.read(run, number)
            self.learn(entry, number)
        return self._known[number]

    def learn(self, entry: Entry, number: int) -> None:
        """An entry that need not be read again."""
        light = replace(entry, slices=[]) if isinstance(entry, Manifest) else entry
        self._known[number] = replace(light, number=number)


def reasons(course: list[Manifest], policy: Policy, held: set[int]) -> dict[int, str]:
    """Why each checkpoint stays, by its number; course: newest first. What is not named may go."""
    found = {m.number: "newest" if i == 0 else f"one of the newest {policy.keep}"
             for i, m in enumerate(course[: max(policy.keep, 1)])}  # fmt: skip
    for m in course:
        if policy.every and m.position.step % policy.every == 0:
            found.setdefault(m.number, f"every {policy.every} steps")
        if m.number in held:
            found.setdefault(m.number, "being read")
    stage = course[0].position.stage if course else ""
    scored = [m for m in course if m.score is not None and m.position.stage == stage]
    for m in sorted(scored, key=lambda m: m.score or 0.0)[: policy.best]:
        found.setdefault(m.number, f"best on held-out images: {m.score:.4g}")
    return found


def retain(run: Store, policy: Policy) -> None:
    """Delete what the policy does not keep, entries of the log first.  Raises StoreError: a later call goes on."""
    course = list(_course(run, policy.read))
    stay = reasons(course, policy, held(run)).keys()
    if not course:
        return
    files = {m.key for m in course if m.number in stay}  # a dead end may have come to life again under another number
    for number in commits.numbers(run):
        if number in stay or number > course[0].number:
            continue
        with suppress(CheckpointError, MissingObject):
            entry = policy.read(run, number)
            if isinstance(entry, Manifest):
                run.delete(commits.key(number))
                if entry.key not in files:
                    drop(run, entry.key)


def drop(run: Store, key: str) -> None:
    """Delete the files of a checkpoint that is none, or no more."""
    run.delete(*[entry.key for entry in run.list(f"{key}/")])


@contextmanager
def hold(run: Store, number: int) -> Iterator[None]:
    """While a checkpoint is read, retention leaves it alone, for an hour at most.

    Where the store may only be read, nothing is held: the newest checkpoint is not deleted at once anyway.
    """
    key = f"{HOLDS}/{number:06d}-{uuid.uuid4().hex}.json"
    with suppress(StoreError):
        run.put(key, json.dumps({"until": time.time() + HOLD_S}).encode())
    try:
        yield
    finally:
        with suppress(StoreError):
            run.delete(key)


def held(run: Store) -> set[int]:
    """Numbers of the checkpoints that somebody reads now; outdated holds are cleared away."""
    found = set()
    for entry in list(run.list(f"{HOLDS}/")):
        with suppress(MissingObject, ValueError, KeyError, TypeError):
            until = small_json.read(run, entry.key, dict)["until"]
            if min(until, entry.modified + HOLD_S + CLOCKS_S) > time.time():  # none lasts longer, whatever it says
                found.add(int(entry.key.removeprefix(f"{HOLDS}/").partition("-")[0]))
            else:
                run.delete(entry.key)
    return found


def _course(run: Store, read: Callable[[Store, int], Entry]) -> Iterator[Manifest]:
    for entry in commits.entries(run, warn=lambda text: None, read=read):
        if not isinstance(entry, Claim):
            yield entry
