"""How an attempt begins: it brings in what earlier ones left behind, chooses a checkpoint, and claims the run."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from core import commits, manifest, parts
from core.checkpoint import newest
from core.comm import Comm
from core.commits import Claim, SupersededError
from core.manifest import CheckpointError, Manifest, Window
from core.metrics import last_step
from core.spool import Spool
from core.storage import MissingObject, Store

OLD = -1
NAME = re.compile(rf"{manifest.FOLDER}/(\d+)-(\d+)(/|$)")
Place = tuple[int, int]  # step and claim


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
        if last is None and (other := _of_another_recipe(run, fingerprints)):
            raise CheckpointError(
                f"{run.uri}/{other.key} belongs to another recipe ({other.fingerprint[:10]}), and so does every sound "
                "checkpoint of this run: resume it with its own recipe, or with FORCE=1"
            )
        won = comm.rank == 0 and commits.append(run, _claim(run, attempt, last, skip), seen + 1)
        if number := _agree(comm, seen + 1 if won else 0):
            claim = commits.read(run, number)
            assert isinstance(claim, Claim)
            return Beginning(claim, last)


def upload(run: Store, spool: Spool) -> None:
    """What earlier attempts left on this node's disk: parts that are newer than every checkpoint, rows of metrics."""
    spool.tidy()
    waiting = spool.keys()
    above = border(run) if waiting else (0, 0)
    for key in waiting:
        place = place_of(key)
        if place is None or is_newer(place, above):
            print(f"uploading what an earlier attempt left on this node: {key}", flush=True)
            with suppress(FileNotFoundError):  # done by a node that shares the folder, or by an attempt that lives
                run.put_file(key, spool.folder / key)
        spool.remove(key)


def adopt(run: Store, fingerprints: list[str], after: int) -> int | None:
    """Commit the newest checkpoint of which all parts are there though nobody has: its attempt died before it could.

    after: the last entry read.  Returns the number of the new one.
    """
    above = border(run)
    folders = {e.key.rpartition("/")[0] for e in run.list(f"{manifest.FOLDER}/")}
    coming = {key for key in folders if (place := place_of(key)) and is_newer(place, above)}
    for key in sorted(coming - (_named(run) if coming else set()), reverse=True):
        whole = parts.collect(run, key)
        if isinstance(whole, Manifest) and whole.fingerprint in fingerprints:
            try:
                number = commits.commit(run, whole, after)
            except SupersededError:
                return None  # somebody else begins in this moment
            print(f"committed {whole.key}, which an earlier attempt had left complete", flush=True)
            return number
    return None


def _named(run: Store) -> set[str]:
    """Folders that entries of the log name, those included that were found damaged."""
    found = set()
    for number in commits.numbers(run):
        with suppress(CheckpointError, MissingObject):
            entry = commits.read(run, number)
            found |= {entry.key} if isinstance(entry, Manifest) else set()
    return found


def border(run: Store) -> Place:
    """(step, claim) of the newest checkpoint; behind a rewind, nothing of the claims before it counts."""
    last = next(commits.checkpoints(run, warn=lambda text: None), None)
    step, claim, number = (last.position.step, last.claim, last.number) if last else (0, 0, 0)
    rewound = [c.number for c in commits.claims(run, number) if c.rewound]  # also when others have started since
    return step, max([claim, *rewound])


def place_of(key: str) -> Place | None:
    """Step and claim of a checkpoint's folder or of a file in it; None for any other key."""
    found = NAME.match(key)
    return (int(found[1]), int(found[2])) if found else None


def is_newer(place: Place, above: Place) -> bool:
    return place[0] > above[0] and place[1] >= above[1]


def _look(run: Store, fingerprints: list[str], attempt: int) -> int:
    """Number of the log's last entry, or OLD when a newer attempt has started.

    The number is taken before the log is read: whatever is appended in the meantime makes the claim behind it fail.
    """
    seen = max(commits.numbers(run), default=0)
    last = next((e for e in commits.entries(run) if isinstance(e, Claim)), None)
    if last is not None and last.attempt > attempt:
        return OLD
    return adopt(run, fingerprints, seen) or seen


def _of_another_recipe(run: Store, fingerprints: list[str]) -> Manifest | None:
    course = commits.checkpoints(run, warn=lambda text: None)
    return next((m for m in course if m.fingerprint not in fingerprints), None)


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
