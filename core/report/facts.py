"""All that the store says about a run, read once; what is missing stays empty."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from core import commits, small_json
from core.merge import load_yaml
from core.metrics import read_metrics
from core.storage import Entry, MissingObject, Store

Json = dict[str, Any]
CLOCKS_S = 5.0  # a store and a worker may disagree by this much
WORKING = ("created", "queued", "running")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    attempt: int
    size: int  # bytes
    written: float  # seconds since the epoch


@dataclass(frozen=True)
class Attempt:
    number: int
    state: str
    started: float | None = None  # seconds since the epoch, as the next
    ended: float | None = None
    info: Json = field(default_factory=dict)  # of all its transitions together

    def seconds(self, now: float) -> float:
        """Time at work."""
        return (self.ended or now) - self.started if self.started else 0.0


@dataclass(frozen=True)
class Facts:
    """What is known of a run at the time `now`."""

    uri: str
    root: str
    now: float
    recipe_yaml: str = ""
    record: Json = field(default_factory=dict)
    transitions: list[Json] = field(default_factory=list)
    heartbeat: Json = field(default_factory=dict)
    rows: list[Json] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)  # attempt -> step it started from
    evaluations: dict[str, Json] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)  # committed ones, oldest first
    exported: list[Entry] = field(default_factory=list)
    arguments: Json = field(default_factory=dict)  # of timm.create_model, for the export
    recipe: Json = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", _recipe(self.recipe_yaml))

    @property
    def id(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.id)

    @property
    def state(self) -> str:
        return str(self.transitions[-1]["state"]) if self.transitions else "unknown"

    def outdated(self, made: float) -> str:
        """Why what was made at that time is not of the newest checkpoint; nothing if it is."""
        newest = self.checkpoints[-1] if self.checkpoints else None
        late = newest is not None and newest.written > made + CLOCKS_S
        return f"before the checkpoint of step {newest.step:,} was written" if newest and late else ""

    def command(self, verb: str) -> str:
        """What to type for this run."""
        return f"make {verb} RUN={self.id} STORE={shlex.quote(self.root)}"

    def attempts(self) -> list[Attempt]:
        """Transitions put together by attempt; the creation of the run belongs to none."""
        moves: dict[int, list[Json]] = {}
        for move in self.transitions:
            if move["state"] != "created":
                moves.setdefault(int(move["attempt"]), []).append(move)
        return [_attempt(number, own) for number, own in sorted(moves.items())]


def _recipe(text: str) -> Json:
    """Nothing of a recipe that cannot be read: the page shows its text."""
    try:
        found = load_yaml(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def gather(run: Store, root: str, now: float) -> Facts:
    """Read a run folder.  Raises StoreError, also as Unreadable, for anything but what is not there."""
    course = list(commits.checkpoints(run, warn=_ignore))
    evaluations = [e.key for e in run.list("evaluations/") if e.key.endswith(".json")]
    return Facts(
        uri=run.uri,
        root=root,
        now=now,
        recipe_yaml=_text(run, "recipe.yaml"),
        record=_json(run, "record.json"),
        transitions=[_json(run, e.key) for e in run.list("transitions/")],
        heartbeat=_json(run, "heartbeat.json"),
        rows=read_metrics(run),
        starts=_starts(run),
        evaluations={key.rpartition("/")[2].removesuffix(".json"): _json(run, key) for key in evaluations},
        checkpoints=[Checkpoint(m.position.step, m.attempt, m.size, m.created) for m in reversed(course)],
        exported=list(run.list("export/")),
        arguments=_json(run, "export/config.json"),
    )


def _text(run: Store, key: str) -> str:
    try:
        return run.get(key).decode()
    except MissingObject:
        return ""


def _json(run: Store, key: str) -> Json:
    try:
        return small_json.read(run, key, dict)
    except MissingObject:
        return {}


def _starts(run: Store) -> dict[int, int]:
    """Step that each attempt went on from."""
    return {claim.attempt: claim.step for claim in commits.claims(run)}


def _ignore(text: str) -> None:
    pass


def _attempt(number: int, moves: list[Json]) -> Attempt:
    when = {move["state"]: float(move["time"]) for move in moves}
    state = str(moves[-1]["state"])
    info = {key: value for move in moves for key, value in (move.get("info") or {}).items()}
    return Attempt(number, state, when.get("running"), None if state in WORKING else when[state], info)
