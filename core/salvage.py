"""How an attempt begins: it brings in what earlier ones left behind, chooses a checkpoint, and claims the run."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass

import torch

from core import commits, manifest, parts
from core.checkpoint import newest
from core.comm import Comm
from core.commits import Claim, SupersededError
from core.manifest import Manifest, Window
from core.metrics import last_step
from core.spool import Spool
from core.storage import Store

OLD = -1
NAME = re.compile(rf"{manifest.FOLDER}/(\d+)-(\d+)/")


@dataclass(frozen=True)
class Beginning:
    claim: Claim
    manifest: Manifest | None  # to go on from


def begin(
    run: Store, fingerprints: list[str], attempt: int, comm: Comm, spool: Spool, skip: Window | None = None
) -> Beginning:
    """All ranks call it and get the same answer.  skip: rewind, and leave these steps' samples out.

    Raises SupersededError when a newer attempt has started, StoreError.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        upload(run, spool)
    comm.barrier()
    while True:
        seen = _look(run, fingerprints, attempt) if comm.rank == 0 else 0
        if _agree(comm, seen) == OLD:
            raise SupersededError(f"{run.uri}: a newer attempt than {attempt} has started")
        last = newest(run, fingerprints, verify=comm)
        won = comm.rank == 0 and commits.append(run, _claim(run, attempt, last, skip), seen + 1)
        if number := _agree(comm, seen + 1 if won else 0):
            claim = commits.read(run, number)
            assert isinstance(claim, Claim)
            return Beginning(claim, last)


def upload(run: Store, spool: Spool) -> None:
    """What earlier attempts left on this node's disk: parts that are newer than every checkpoint, rows of metrics."""
    waiting = spool.keys()
    above = _border(run) if waiting else (0, 0)
    for key in waiting:
        place = NAME.match(key)
        if place is None or _is_newer(place, above):
            print(f"uploading what an earlier attempt left on this node: {key}", flush=True)
            run.put_file(key, spool.folder / key)
        spool.remove(key)


def adopt(run: Store, fingerprints: list[str]) -> Manifest | None:
    """Commit the newest checkpoint of which all parts are there though nobody has: its attempt died before it could."""
    above, last = _border(run), max(commits.numbers(run), default=0)
    found = {place[0]: place for e in run.list(f"{manifest.FOLDER}/") if (place := NAME.match(e.key))}
    for key in sorted((k for k, place in found.items() if _is_newer(place, above)), reverse=True):
        whole = parts.collect(run, key.rstrip("/"))
        if isinstance(whole, Manifest) and whole.fingerprint in fingerprints:
            try:
                commits.commit(run, whole, last)
            except SupersededError:
                return None  # somebody else begins in this moment
            print(f"committed {whole.key}, which an earlier attempt had left complete", flush=True)
            return whole
    return None


def _border(run: Store) -> tuple[int, int]:
    """(step, claim) of the newest checkpoint; behind a rewind, nothing of the claims before it counts."""
    claim = 0
    for entry in commits.entries(run, warn=lambda text: None):
        if isinstance(entry, Manifest):
            return entry.position.step, max(claim, entry.claim)
        if entry.rewound:
            claim = max(claim, entry.number)
    return 0, claim


def _is_newer(place: re.Match[str], above: tuple[int, int]) -> bool:
    step, claim = int(place[1]), int(place[2])
    return step > above[0] and claim >= above[1]


def _look(run: Store, fingerprints: list[str], attempt: int) -> int:
    """Number of the log's last entry, or OLD when a newer attempt has started."""
    last = next((e for e in commits.entries(run) if isinstance(e, Claim)), None)
    if last is not None and last.attempt > attempt:
        return OLD
    adopt(run, fingerprints)
    return max(commits.numbers(run), default=0)


def _agree(comm: Comm, number: int) -> int:
    """Rank 0's number (the others' are 0), on all ranks."""
    return int(comm.sum(torch.tensor(float(number), device=comm.device)).item())


def _claim(run: Store, attempt: int, last: Manifest | None, skip: Window | None) -> Claim:
    before = next(commits.entries(run, warn=lambda text: None), None)
    skipped = tuple(before.skipped) if before is not None else ()
    skipped += () if skip is None else (skip,)
    step = last.position.step if last else 0
    return Claim(attempt, last.number if last else None, step, socket.gethostname(), time.time(),
                 max(last_step(run) - step, 0), skipped, skip is not None)  # fmt: skip
