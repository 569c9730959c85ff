"""Entries of a run's log, and parts of checkpoints, without having trained anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core import commits, parts
from core.commits import Claim
from core.folder import FileStore
from core.manifest import Manifest, Position, part
from core.snapshot import Part, Piece, Snapshot
from core.storage import Store, StoreError, open_store


def claim(attempt: int = 1, resumed: int | None = None, step: int = 0, **more: Any) -> Claim:
    return Claim(attempt, resumed, step, "here", 1.0, **more)


def manifest(step: int, claim: int = 1, stage: str = "main", world: int = 1, **more: Any) -> Manifest:
    known: dict[str, Any] = {"fingerprint": "f", "attempt": 1, "zero_stage": 1, "adam_step": step, "created": 1.0}
    return Manifest(Position(stage, step, step, False), claim=claim, world=world, shapes={}, **{**known, **more})


def log(run: Store, *entries: commits.Entry) -> None:
    """Append all."""
    for entry in entries:
        assert commits.append(run, entry, max(commits.numbers(run), default=0) + 1)


def pieces(value: float = 1.0, numel: int = 3) -> list[Piece]:
    return [Piece("m", "method", 0, torch.tensor([2])), Piece("w", "weight", 0, torch.full((numel,), value))]


def put_part(run: Store, about: Manifest, rank: int = 0, value: float = 1.0) -> Part:
    """As the courier of a rank leaves it: the file, then its description."""
    snapshot = Snapshot()
    snapshot.take(pieces(value))
    own = snapshot.describe()
    run.put(f"{about.key}/{part(rank)}.safetensors", bytes(snapshot.content()))
    run.put(f"{about.key}/{part(rank)}.json", parts.describe(about, own))
    return own


def put_checkpoint(run: Store, about: Manifest) -> Manifest:
    """All parts and the entry; the entry as it is read again."""
    for rank in range(about.world):
        put_part(run, about, rank)
    whole = parts.collect(run, about.key)
    assert isinstance(whole, Manifest)
    log(run, whole)
    entry = commits.read(run, commits.numbers(run)[-1])
    assert isinstance(entry, Manifest)
    return entry


def keys(run: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in run.list(prefix)]


def on_course(run: Store) -> list[int]:
    """Numbers of the checkpoints of the run's present course, newest first."""
    return [m.number for m in commits.checkpoints(run)]


def change(run: Store, key: str, **fields: Any) -> None:
    """Fields of an entry, behind its checksum's back."""
    body = json.loads(run.get(key))
    body["entry"] |= fields
    run.put(key, json.dumps(body).encode())


class Troubled(FileStore):
    """Remembers what is asked of it; `trouble` is asked before and after each writing request, and may raise."""

    def __init__(self, root: Path, trouble: Callable[[str, str, bool], None] = lambda verb, key, done: None) -> None:
        super().__init__(root)
        self.trouble = trouble
        self.asked: list[tuple[str, str]] = []

    def put(self, key: str, data: bytes) -> None:
        self._begin("put", key)
        super().put(key, data)
        self.trouble("put", key, True)

    def put_file(self, key: str, path: Path) -> None:
        self._begin("put", key)
        super().put_file(key, path)
        self.trouble("put", key, True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._begin("create", key)
        done = super().put_if_absent(key, data)
        self.trouble("create", key, True)
        return done

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._begin("delete", key)
            super().delete(key)
            self.trouble("delete", key, True)

    def _begin(self, verb: str, key: str) -> None:
        self.asked.append((verb, key))
        self.trouble(verb, key, False)


def fail(times: int, having: str = "", verb: str = "", done: bool = False) -> Callable[[str, str, bool], None]:
    """Trouble: so many matching requests fail; done: though the store has done what was asked."""
    left = iter(range(times))

    def trouble(asked: str, key: str, after: bool) -> None:
        if after == done and having in key and verb in asked and next(left, None) is not None:
            raise StoreError(f"{key}: no connection")

    return trouble


def a_run(folder: Path) -> Store:
    return open_store(f"file://{folder}/run")
