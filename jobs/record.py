"""The record of a run in the store: a state machine kept as an append-only list of numbered transitions.

Each transition is one small object created with put-if-absent, so of two writers one wins and the other reads again.
runs/<id>/: recipe.yaml, record.json, transitions/NNNNNN.json, heartbeat.json, logs/, metrics/, checkpoints/ ...
"""

from __future__ import annotations

import builtins
import json
import re
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from core import small_json
from core.small_json import Unreadable
from core.storage import MissingObject, Store, open_store
from jobs.errors import JobError, UserError, nearest
from jobs.pulse import is_time, silent

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.launchers import Look


class State(StrEnum):
    CREATED = "created"
    QUEUED = "queued"
    RUNNING = "running"
    PREEMPTED = "preempted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


LEGAL = {
    State.CREATED: {State.QUEUED, State.FAILED, State.CANCELLED},
    State.QUEUED: {State.RUNNING, State.PREEMPTED, State.FAILED, State.CANCELLED},
    State.RUNNING: {State.PREEMPTED, State.SUCCEEDED, State.FAILED, State.CANCELLED},
    State.PREEMPTED: {State.QUEUED, State.FAILED, State.CANCELLED},
    State.FAILED: {State.QUEUED, State.CANCELLED},
    State.CANCELLED: {State.QUEUED},
    State.SUCCEEDED: set(),
}
ACTIVE = (State.QUEUED, State.RUNNING)  # somebody works on it
ENDED = (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class IllegalMove(JobError):  # noqa: N818
    """The run is not in a state from which this is possible, or belongs to a newer attempt."""


@dataclass(frozen=True)
class Transition:
    number: int
    state: State
    time: float  # seconds since the epoch, by the writer's clock
    attempt: int = 0
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What is to be said about a run now."""

    id: str
    last: Transition
    heartbeat: dict[str, Any]
    lost: str = ""  # why the run, though queued or running by its record, has nobody working on it
    coming: bool = False  # it rests, and whoever works on it is about to begin another attempt
    unread: str = ""  # why there is no heartbeat though one was written

    @property
    def shown(self) -> str:
        return "lost" if self.lost else str(self.last.state)

    @property
    def active(self) -> bool:
        return self.coming or (self.last.state in ACTIVE and not self.lost)


ID = r"[a-z0-9][a-z0-9-]*"


class Run:
    """One run folder in the store."""

    def __init__(self, root: str, run_id: str) -> None:
        if not re.fullmatch(ID, run_id):
            raise UserError(f"run {run_id!r}: not a run id; `make status` lists them")
        self.root, self.id = root, run_id
        self.uri = f"{root}/runs/{run_id}"
        self.store: Store = open_store(root).sub(f"runs/{run_id}")

    @classmethod
    def find(cls, root: str, run_id: str) -> Run:
        """A run that exists.  Raises UserError with the nearest id."""
        run = cls(root, run_id)
        if not run.exists():
            hint = nearest(run_id, cls.list(root))
            raise UserError(f"run {run_id!r} is not in {root}{hint} (make status lists runs)")
        return run

    @staticmethod
    def list(root: str) -> list[str]:
        """Ids of all runs of a store: one short listing per run, however many objects it has."""
        store, ids, after = open_store(root), [], ""
        while entry := next(iter(store.list("runs/", after=after)), None):
            run_id = entry.key.split("/")[1]
            if re.fullmatch(ID, run_id) and Run(root, run_id).exists():  # else somebody's own file
                ids.append(run_id)
            after = f"runs/{run_id}0"  # "0" follows "/" in key order
        return ids

    def exists(self) -> bool:
        return self.store.size(_key(0)) is not None

    def create(self, recipe_yaml: str, record: dict[str, Any]) -> bool:
        """Make the run.  False: somebody else did, before."""
        created = Transition(0, State.CREATED, time.time())
        if not self.store.put_if_absent(_key(0), _dump(asdict(created))):
            return False
        self.store.put("record.json", _dump(record))
        self.write_recipe(recipe_yaml)
        return True

    def write_recipe(self, recipe_yaml: str) -> None:
        self.store.put("recipe.yaml", recipe_yaml.encode())

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        from core.config import from_yaml

        try:
            text = small_json.fetch(self.store, "recipe.yaml").decode()
        except MissingObject:
            raise UserError(f"run {self.id}: its creation was cut short; submit its recipe again") from None
        except UnicodeDecodeError as error:
            raise Unreadable(f"{self.uri}/recipe.yaml", str(error)) from None
        return from_yaml(text, f"{self.uri}/recipe.yaml")

    def record(self) -> dict[str, Any]:
        """What the run was made from; empty where there is none.  Raises Unreadable."""
        return self._json("record.json")

    def heartbeat(self) -> dict[str, Any]:
        """The newest progress, with `time` and `attempt`; empty before the first.  Raises Unreadable."""
        beat = self._json("heartbeat.json")
        if beat and not (is_time(beat.get("time")) and type(beat.get("attempt")) is int):
            raise Unreadable(f"{self.uri}/heartbeat.json", "it has no time or no attempt")
        return beat

    def last(self) -> Transition:
        """The newest transition.  Raises MissingObject when there is no such run, Unreadable."""
        keys = [entry.key for entry in self.store.list("transitions/")]
        if not keys:
            raise MissingObject(f"{self.uri}: no such run")
        return self._transition(keys[-1])

    def transitions(self) -> builtins.list[Transition]:
        return [self._transition(entry.key) for entry in self.store.list("transitions/")]

    def move(
        self, state: State, attempt: int | None = None, *, only_from: State | None = None, **info: Any
    ) -> Transition:
        """Append a transition; `queued` starts attempt number `attempt`, others belong to the current one.

        Raises IllegalMove when the newest state does not allow it or the attempt is not the current one.
        """
        while True:
            last = self.last()
            number = last.attempt if attempt is None else attempt
            self._check(last, state, number)
            if only_from not in (None, last.state):
                raise IllegalMove(f"run {self.id} is {last.state}, no longer {only_from}")
            new = Transition(last.number + 1, state, time.time(), number, info)
            if self.store.put_if_absent(_key(new.number), _dump(asdict(new))):
                return new

    def _check(self, last: Transition, state: State, attempt: int) -> None:
        due = last.attempt + (state == State.QUEUED)
        if attempt != due:
            raise IllegalMove(f"run {self.id}: attempt {attempt} cannot become {state}: attempt {due} is due")
        if state not in LEGAL[last.state]:
            raise IllegalMove(f"run {self.id} is {last.state} (attempt {last.attempt}) and cannot become {state}")

    def beat(self, progress: dict[str, Any], attempt: int) -> None:
        """Say that the run is alive, and how far it is."""
        self.store.put("heartbeat.json", _dump({**progress, "time": time.time(), "attempt": attempt}))

    def view(self) -> View:
        """State, progress and whether anybody still works on it.  Raises MissingObject, Unreadable."""
        last, unread = self.last(), ""
        try:
            heartbeat = self.heartbeat()
        except Unreadable as error:  # the next beat replaces it
            heartbeat, unread = {}, str(error)
        lost = self._lost(last, heartbeat) if last.state in ACTIVE else ""
        coming = last.state in (State.PREEMPTED, State.FAILED) and bool(self.look(last).alive)
        return View(self.id, last, heartbeat, lost, coming, unread)

    def handle(self, last: Transition) -> dict[str, Any]:
        """What the launcher wrote down when it queued the attempt of `last`; empty before the first.

        Whoever may write to the store can write it, so a launcher believes only what this machine is set up for.
        """
        while last.state not in (State.QUEUED, State.CREATED):
            last = self._transition(_key(last.number - 1))
        return last.info

    def look(self, last: Transition) -> Look:
        """What the launcher of the newest attempt sees of it from this machine."""
        from jobs import launchers

        handle = self.handle(last)
        try:
            return launchers.of(handle).look(self, handle)
        except launchers.Elsewhere as error:
            return launchers.Look(None, str(error))

    def _lost(self, last: Transition, heartbeat: dict[str, Any]) -> str:
        look = self.look(last)
        if look.alive is not None:
            return "" if look.alive else look.text
        if last.state != State.RUNNING:
            return ""
        said = {_key(last.number): last.time}
        if heartbeat.get("attempt") == last.attempt:
            said["heartbeat.json"] = float(heartbeat["time"])
        return silent(self.store, said)

    def _transition(self, key: str) -> Transition:
        raw = self._json(key, present=True)
        try:
            found = Transition(**{**raw, "state": State(str(raw.get("state")))})
        except (TypeError, ValueError) as error:
            raise Unreadable(f"{self.uri}/{key}", str(error)) from None
        whole = type(found.number) is type(found.attempt) is int and is_time(found.time)
        if not whole or not isinstance(found.info, dict) or _key(found.number) != key:
            raise Unreadable(f"{self.uri}/{key}", "it is no transition of this number")
        return found

    def _json(self, key: str, present: bool = False) -> dict[str, Any]:
        try:
            return small_json.read(self.store, key, dict)
        except MissingObject:
            if present:
                raise
            return {}


def _key(number: int) -> str:
    return f"transitions/{number:06d}.json"


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()
