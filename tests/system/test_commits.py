"""Who may commit, and what a crash between any two requests leaves: the old checkpoint or the new one."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from core import commits, sweep
from core.checkpoint import Reader, newest
from core.comm import Comm
from core.courier import Courier
from core.folder import FileStore
from core.fragments import KINDS
from core.manifest import Manifest, Position
from core.metrics import read_metrics, segment_key
from core.retention import Policy
from core.salvage import begin
from core.snapshot import Piece
from core.spool import Spool
from core.storage import Store, open_store
from tests.cli import wait_for
from tests.faults import Exchange, FaultyProxy
from tests.ranks import Ranks, run_ranks
from tests.system.attempts import Attempt, losses, prepared, recipe_of, run

pytestmark = pytest.mark.system
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared(f"file://{tmp_path_factory.mktemp('commits')}", "toy")


def toy(tmp_path: Path, *overrides: str) -> Any:
    more = ("loader.workers=0", f"checkpoint.spool={tmp_path}/spool", "launch.hang_s=0", *overrides)
    return recipe_of("toy", 1, 6, *more)


# ---- two attempts at once


class Sleepy(FileStore):
    """Falls asleep before it commits the second checkpoint, with the request on its lips."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if key == commits.key(3) and os.environ["RANK"] == "0":
            (self.root / "asleep").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().put_if_absent(key, data)


def sleepy(store: Store) -> Store:
    assert isinstance(store, FileStore)
    return Sleepy(store.root)


def test_an_attempt_that_slept_while_another_one_started_commits_nothing_and_stops(root: str, tmp_path: Path) -> None:
    old = Ranks(run, 2, Attempt(toy(tmp_path), root, "slept", 1, store=sleepy))
    folder = Path(f"{root.removeprefix('file://')}/runs/slept")
    wait_for("the old attempt's sleep", (folder / "asleep").exists)
    new = run_ranks(run, 2, Attempt(toy(tmp_path), root, "slept", 2))
    before = {e.key: e.modified for e in open_store(f"file://{folder}").list("commits/")}
    old.signal(0, signal.SIGCONT)
    ends = old.results()
    assert [end for end, _, _ in new] == ["FINISHED"] * 2
    assert [end for end, _, _ in ends] == ["SUPERSEDED"] * 2
    store = open_store(f"file://{folder}")
    assert {e.key: e.modified for e in store.list("commits/")} == before
    attempts = [commits.read(store, number).attempt for number in commits.numbers(store)]
    assert attempts == sorted(attempts), "the old attempt committed behind the new one"
    assert len(losses(root, "slept")) == 6


# ---- a crash between any two requests


STEPS = (2, 4, 6)


def saves(uri: str, spool: str, attempt: int = 1) -> list[str]:
    """Three checkpoints, one after the other, of tensors whose every element is the step; their fates on this rank."""
    comm, store = Comm(CPU), open_store(uri)
    begun = begin(store, ["f"], attempt, comm, Spool(spool, store))
    courier = Courier(store, Spool(spool, store), comm.rank, begun.claim.number, Policy(keep=1))
    start = begun.manifest.position.step if begun.manifest else 0
    segments = list(begun.manifest.metrics) if begun.manifest else []
    fates = []
    for step in [s for s in STEPS if s > start]:
        rows = segment_key(begun.claim.number, step - 2), json.dumps({"step": step}).encode()
        segments = [*segments, rows[0]]
        place, shapes = Position("main", step, step, False), {"w": [100 * comm.world]}
        whole = Manifest(place, "f", begun.claim.number, attempt, comm.world, 1, step, 0.0, shapes, metrics=segments)
        value = torch.full((100,), float(step))
        pieces = [Piece("w", kind, 100 * comm.rank, value) for kind in KINDS]
        sent = courier.save(whole, pieces, rows if comm.rank == 0 else None)
        courier.wait(60)
        comm.barrier()
        fates.append(sent.fate.name)
    courier.close()
    return fates


class Killer:
    """Counts the requests that a run makes from its second checkpoint on, and kills a rank at one of them."""

    def __init__(self, at: int, rank: int, forwarded: bool) -> None:
        self.at, self.rank, self.forwarded = at, rank, forwarded
        self.ranks: Ranks | None = None
        self.count = -1
        self.dead = False
        self._first = threading.Event()  # the first checkpoint is committed

    def __call__(self, exchange: Exchange) -> bool:
        if exchange.command == "PUT" and exchange.path.endswith(commits.key(2)):
            exchange.answer(exchange.forward())
            self._first.set()
            return True
        if exchange.command == "PUT" and "/checkpoints/00000004-" in exchange.path:
            self._first.wait(30)  # the other rank may be ahead
            self.count = max(self.count, 0)
        if self.count < 0 or "/runs/" not in exchange.path:
            return False
        self.count += 1
        if self.count != self.at or self.ranks is None:
            return False
        if self.forwarded:
            exchange.forward()
        self.ranks.signal(self.rank, signal.SIGKILL)
        self.dead = True
        exchange.hang_up()
        return True


def step_of(store: Store) -> int:
    """Of the newest checkpoint, all of whose elements must be that step."""
    manifest = newest(store, verify=Comm(CPU))
    assert manifest is not None
    reader, step = Reader(store, manifest), manifest.position.step
    for kind in KINDS:
        assert reader.whole(kind)["w"].eq(step).all()
    return step


POINTS = 18


@pytest.mark.parametrize(
    ("rank", "every"), [(0, 3), (1, 7), *(pytest.param(rank, 1, marks=pytest.mark.soak) for rank in (0, 1))]
)
def test_a_crash_between_any_two_requests_leaves_the_old_or_the_new_checkpoint(
    rank: int, every: int, bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """Request by request, in turn before and after the server has done what it was asked."""
    found, reached = set(), 0
    for at in range(1, POINTS + 1, every):
        uri = f"{bucket}/runs/crash-{at}"
        killer = Killer(at, rank, forwarded=at % 2 == 0)
        proxy.faults = [killer]
        killer.ranks = Ranks(saves, 2, uri, f"{tmp_path}/{at}")
        wait_for("the crash or the end", lambda k=killer: k.dead or not alive(k.ranks), poll_s=0.01)
        killer.ranks.end()
        proxy.faults, store = [], open_store(uri)
        reached += killer.dead
        found.add(step_of(store))
        if not killer.dead:
            break
        if at % 7 == 1:
            goes_on(uri, f"{tmp_path}/{at}")
    assert reached >= 14 / every, "the walk must meet the requests of a save"
    assert {2, 4} <= found, "both sides of the commit"


def goes_on(uri: str, spool: str) -> None:
    """The next attempt ends as if nothing had happened, and sweeping leaves what is named and nothing else."""
    run_ranks(saves, 2, uri, spool, 2)
    store = open_store(uri)
    assert step_of(store) == 6
    assert [row["step"] for row in read_metrics(store)] == [2, 4, 6]
    for orphan in sweep.orphans(store, live=False):
        sweep.remove(store, orphan)
    named = {m.key for m in commits.checkpoints(store)}
    assert {e.key.rpartition("/")[0] for e in store.list("checkpoints/")} == named
    assert step_of(store) == 6


def alive(ranks: Ranks | None) -> bool:
    return ranks is not None and all(p.is_alive() for p in ranks.processes)
