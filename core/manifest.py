"""What a checkpoint consists of: its slices, files, sums, and where training goes on. Written last, once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from core.storage import Store, StoreError, crc32c

FOLDER = "checkpoints"
SCHEMA = 1
NAME = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to something else."""


@dataclass(frozen=True)
class Slice:
    """A run of one tensor's flattened elements in one file."""

    name: str
    kind: str  # weight | exp_avg | exp_avg_sq | buffer | method
    start: int
    numel: int
    dtype: str
    offset: int  # bytes, in the file
    size: int
    crc32c: int
    file: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Position:
    """Where training goes on."""

    stage: str
    stage_step: int  # steps of this stage taken
    step: int  # steps taken over all stages
    finished: bool  # the stage is complete


@dataclass
class Manifest:
    position: Position
    fingerprint: str
    attempt: int
    world: int
    zero_stage: int
    adam_step: int
    created: float
    shapes: dict[str, list[int]]  # of every tensor, by "kind/name" for buffers and method state, else by name
    files: dict[str, dict[str, int]] = field(default_factory=dict)  # name -> size, crc32c
    slices: list[Slice] = field(default_factory=list)
    schema: int = SCHEMA
    key: str = ""  # of the checkpoint's folder in the run


def folder(step: int, attempt: int) -> str:
    """Key of a checkpoint's folder in the run."""
    return f"{FOLDER}/{step:08d}-a{attempt:04d}"


def commit(run: Store, manifest: Manifest) -> None:
    """Make the files of `manifest.key` a checkpoint.  Raises CheckpointError when somebody else already has."""
    content = asdict(manifest)
    content["crc32c"] = _sum(content)
    if not run.put_if_absent(f"{manifest.key}/{NAME}", json.dumps(content).encode()):
        raise CheckpointError(f"{run.uri}/{manifest.key}: another attempt has committed this checkpoint")


def committed(run: Store, key: str) -> bool:
    return run.size(f"{key}/{NAME}") is not None


def read(run: Store, key: str) -> Manifest:
    """Raises CheckpointError when it is damaged or not of this schema."""
    try:
        content: dict[str, Any] = json.loads(run.get(f"{key}/{NAME}"))
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{key}: checkpoint schema {content['schema']}, this Retort reads {SCHEMA}")
        if content.pop("crc32c") != _sum(content):
            raise CheckpointError(f"{key}/{NAME}: its checksum is wrong")
        content["position"] = Position(**content["position"])
        content["slices"] = [Slice(**s) for s in content["slices"]]
        return Manifest(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{key}/{NAME}: unreadable: {error}") from None


def keys(run: Store) -> list[str]:
    """Folders of committed checkpoints, oldest first. What a later attempt wrote is newer, whatever its step."""
    found = [e.key.rpartition("/")[0] for e in run.list(f"{FOLDER}/") if e.key.endswith(f"/{NAME}")]
    return sorted(found, key=lambda key: key.rpartition("-a")[::-1])


def retain(run: Store, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, manifests first."""
    for key in keys(run)[:-keep]:
        try:
            run.delete(f"{key}/{NAME}")
            run.delete(*[e.key for e in run.list(f"{key}/")])
        except StoreError:
            return  # a later checkpoint tries again


def _sum(content: dict[str, Any]) -> int:
    return crc32c(json.dumps(content, sort_keys=True).encode())
