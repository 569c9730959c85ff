"""Whether a run that was interrupted is the one that nothing happened to, and whether its log tells one story."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from core import checkpoint, commits, sweep
from core.comm import Comm
from core.commits import Claim
from core.manifest import Manifest
from core.storage import Store
from tests.system.attempts import equal, metrics, tensors
from tests.system.soak_plan import Plan

Micro = list[Any]  # step of the run, number, samples, checksum of images


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run computed."""

    rows: list[dict[str, Any]]
    tensors: dict[str, Any]
    trained: dict[tuple[int, int], Micro]


@dataclass(frozen=True)
class Flip:
    number: int  # of the entry whose checkpoint was damaged
    last: int  # entry of the log at that time


def whole(root: str, name: str, trained: list[Micro]) -> Whole:
    return Whole(metrics(root, name), tensors(root, name), {(t[0], t[1]): t for t in trained})


def differences(plan: Plan, root: str, name: str, trained: list[Micro], reference: Whole) -> Iterator[str]:
    """In samples, in the rows of metrics, in the final state: bit for bit where nothing moved, else to rounding."""
    wrong = [t for t in trained if reference.trained.get((t[0], t[1])) != t]
    if wrong:
        yield f"other samples or images than in the uninterrupted run: {wrong[:3]}"
    if missing := reference.trained.keys() - {(t[0], t[1]) for t in trained}:
        yield f"never trained: {sorted(missing)}"
    rows, state = metrics(root, name), tensors(root, name)
    steps, wanted = [row["step"] for row in rows], [row["step"] for row in reference.rows]
    if steps != wanted:
        yield f"metrics hold steps {steps}"
    elif not plan.moves and rows != reference.rows:
        yield f"metrics differ: {next((a, b) for a, b in zip(rows, reference.rows, strict=True) if a != b)}"
    elif losses(rows) != pytest.approx(losses(reference.rows), rel=2e-5):
        pairs = zip(losses(rows), losses(reference.rows), strict=True)
        yield f"losses differ by up to {max(abs(a / b - 1) for a, b in pairs):.2g}"
    if not (together(state, reference.tensors) if plan.moves else equal(state, reference.tensors)):
        yield "the final weights, moments or method state differ"


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def together(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), rtol=2e-2, atol=2e-4) for k in a)


def breaches(run: Store, plan: Plan, flips: list[Flip]) -> Iterator[str]:
    """Of what the log promises: no attempt goes on from less than was committed, none from damaged files."""
    best, entries = 0, [commits.read(run, number) for number in commits.numbers(run)]
    for entry in entries:
        if isinstance(entry, Manifest):
            best = max(best, 0 if entry.number in {f.number for f in flips} else entry.position.step)
            continue
        if entry.resumed in {f.number for f in flips if f.last < entry.number}:
            yield f"attempt {entry.attempt} went on from entry {entry.resumed}, which was damaged"
        if entry.step < best:
            yield f"attempt {entry.attempt} went on from step {entry.step} though step {best} was committed"
    newest = checkpoint.newest(run, verify=Comm(torch.device("cpu")))
    if newest is None or newest.position.step != plan.steps or not newest.position.finished:
        yield "the newest sound checkpoint is not the last step's"
    for orphan in sweep.orphans(run, live=False):
        sweep.remove(run, orphan)
    named = {m.key for m in commits.checkpoints(run)}
    if (found := {e.key.rpartition("/")[0] for e in run.list("checkpoints/")}) != named:
        yield f"after sweeping there are {sorted(found ^ named)}"


def committed(run: Store) -> int:
    """Step of the newest checkpoint."""
    return next((m.position.step for m in commits.checkpoints(run)), 0)


def author(run: Store) -> int:
    """Attempt whose checkpoint is the newest."""
    return next((m.attempt for m in commits.checkpoints(run)), 0)


def flip(run: Store, share: float) -> Flip | None:
    """Change a byte of the newest checkpoint's tensors, in the place that the share names."""
    newest = next(commits.checkpoints(run), None)
    if newest is None:
        return None
    pieces = [s for s in newest.slices if s.size]
    piece = pieces[int(share * len(pieces))]
    key = f"{newest.key}/{piece.file}"
    content = bytearray(run.get(key))
    content[piece.offset + int(share * piece.size)] ^= 0x10
    run.put(key, bytes(content))
    return Flip(newest.number, max(commits.numbers(run)))


def lost(claims: list[Claim], reached: dict[int, int]) -> int:
    """Steps trained in vain.  reached: by each attempt, when it was interrupted."""
    total = before = 0
    by_attempt = {claim.attempt: claim for claim in claims}
    for number in sorted(reached):
        if claim := by_attempt.get(number):
            total += max(before - claim.step, 0)
            before = max(reached[number], claim.step)
    return total


def keep(run: Store, folder: Path) -> None:
    """A copy of all that the run's store holds, for whoever looks into a mismatch."""
    for entry in run.list():
        (folder / entry.key).parent.mkdir(parents=True, exist_ok=True)
        run.get_file(entry.key, folder / entry.key)
