from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from core import commits, courier, parts
from core.checkpoint import newest
from core.comm import Comm
from core.courier import Courier, Delivery, Fate
from core.folder import FileStore
from core.manifest import Manifest
from core.retention import Policy
from core.snapshot import Piece
from core.spool import Spool
from core.storage import Store, StoreError, open_store
from tests.core.logs import Troubled, claim, fail, keys, log, manifest, on_course, pieces, put_part

SOON_S = 30.0
Make = Callable[..., Courier]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Couriers of the run in tmp_path, which they claim; closed in the end."""
    monkeypatch.setattr(courier, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(courier, "LONGEST_PAUSE_S", 0.02)
    made: list[Courier] = []

    def a_courier(run: Store, rank: int = 0, base: Path | None = None, policy: Policy | None = None) -> Courier:
        if rank == 0:
            log(open_store(run.uri), claim(len(made) + 1))
        spool = Spool(str(base or tmp_path / "spool"), run)
        made.append(Courier(run, spool, rank, max(commits.numbers(run), default=0), policy or Policy(keep=5)))
        return made[-1]

    yield a_courier
    for one in made:
        one.close()


def done(delivery: Delivery) -> Fate:
    """What has become of it, once that is known."""
    limit = time.monotonic() + SOON_S
    while delivery.fate is Fate.PENDING and time.monotonic() < limit:
        time.sleep(0.002)
    return delivery.fate


def until(happened: Callable[[], object]) -> None:
    limit = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.002)


class Gated(Troubled):
    """Lets nobody write before the gate is open; remembers which threads came."""

    def __init__(self, root: Path) -> None:
        self.gate, self.threads = threading.Event(), set[str]()
        super().__init__(root, self.wait)

    def wait(self, verb: str, key: str, done: bool) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(SOON_S)


def weight(run: Store, about: Manifest, rank: int = 0) -> list[float]:
    values: list[float] = load(run.get(f"{about.key}/rank-{rank:04d}.safetensors"))["weight/w@0"].tolist()
    return values


# ---- when all is well


def test_a_checkpoint_arrives_whole_and_nothing_is_left_on_the_disk(store_uri: str, tmp_path: Path, make: Make) -> None:
    run = open_store(store_uri).sub("run")
    own = make(run, base=tmp_path / "disk")
    rows = ("metrics/000001-00000000.jsonl", b'{"step": 4}\n')
    assert done(own.save(manifest(4, metrics=[rows[0]]), pieces(7.0), rows)) is Fate.COMMITTED
    assert own.pending == 0
    found = newest(run, ["f"], verify=Comm(torch.device("cpu")))
    assert found is not None
    assert (found.number, found.position.step, found.metrics) == (2, 4, [rows[0]])
    assert weight(run, found) == [7.0] * 3
    assert run.get(rows[0]) == rows[1]
    assert not own.spool.folder.exists()


def test_checkpoints_are_committed_in_order_and_old_ones_go(tmp_path: Path, make: Make) -> None:
    run = FileStore(tmp_path / "run")
    own = make(run, policy=Policy(keep=2))
    sent = [own.save(manifest(step), pieces(float(step)), None) for step in range(1, 7)]
    assert [done(one) for one in sent] == [Fate.COMMITTED] * 6
    own.wait(SOON_S)
    until(lambda: on_course(run) == [7, 6])
    until(lambda: len(keys(run, "checkpoints/")) == 4)
    assert weight(run, manifest(6)) == [6.0] * 3


def test_a_part_s_description_comes_behind_the_part_and_the_entry_behind_all(tmp_path: Path, make: Make) -> None:
    run = Troubled(tmp_path / "run")
    own = make(run)
    done(own.save(manifest(4), pieces(), ("metrics/a", b"x")))
    about = manifest(4).key
    assert run.asked == [("put", "metrics/a"), ("put", f"{about}/rank-0000.safetensors"),
                         ("put", f"{about}/rank-0000.json"), ("create", "commits/000002.json")]  # fmt: skip


def test_the_loop_never_waits_for_the_store(tmp_path: Path, make: Make) -> None:
    run = Gated(tmp_path / "run")
    own = make(run)
    values = torch.ones(3)
    sent = []
    for step in range(1, 6):
        sent.append(own.save(manifest(step), [Piece("w", "weight", 0, values)], ("metrics/a", b"x")))
        own.keep("rows", lambda: run.put("rows", b"x"))
        values.add_(1)
    assert own.pending == 5
    assert own.spool.keys() != []
    run.gate.set()
    assert [done(one) for one in sent] == [Fate.COMMITTED] * 5
    assert run.threads == {"retort-upload"}
    assert [weight(run, manifest(step)) for step in range(1, 6)] == [[float(step)] * 3 for step in range(1, 6)]


def test_snapshots_are_used_again_as_soon_as_they_are_on_the_disk(tmp_path: Path, make: Make) -> None:
    run = Gated(tmp_path / "run")
    own = make(run)
    used = set()
    for step in range(1, 9):
        sent = own.save(manifest(step), pieces(), None)
        used.add(id(sent.snapshot))
        assert sent.written.wait(SOON_S)
    assert len(used) <= 2
    run.gate.set()


# ---- several ranks


def test_a_checkpoint_is_committed_by_the_first_rank_when_all_parts_are_there(tmp_path: Path, make: Make) -> None:
    run = FileStore(tmp_path / "run")
    first, second = make(run), make(run, rank=1)
    about = manifest(4, world=2)
    sent = first.save(about, pieces(1.0), None)
    until(lambda: keys(run, about.key))
    time.sleep(0.05)
    assert (sent.fate, on_course(run)) == (Fate.PENDING, [])
    assert done(second.save(about, pieces(2.0), None)) is Fate.COMMITTED
    assert done(sent) is Fate.COMMITTED
    found = newest(run)
    assert found is not None
    assert sorted(found.files) == ["rank-0000.safetensors", "rank-0001.safetensors"]
    assert (weight(run, found, 0), weight(run, found, 1)) == ([1.0] * 3, [2.0] * 3)


def test_a_part_with_a_nan_makes_no_checkpoint_and_leaves_nothing(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FileStore(tmp_path / "run")
    first, second = make(run), make(run, rank=1)
    bad, good = manifest(2, world=2), manifest(4, world=2)
    second.save(bad, pieces(float("nan")), None)
    assert done(first.save(bad, pieces(), None)) is Fate.REFUSED
    until(lambda: not keys(run, "checkpoints/"))
    assert f"warning: no checkpoint at step 2: {parts.REFUSED}" in capsys.readouterr().err
    second.save(good, pieces(), None)
    assert done(first.save(good, pieces(), None)) is Fate.COMMITTED, "life goes on"
    assert on_course(run) == [2]


# ---- when the store is in trouble


@pytest.mark.parametrize("done_so", [False, True], ids=["nothing was done", "only the answer was lost"])
@pytest.mark.parametrize("having", [".safetensors", "rank-0000.json", "metrics/", "commits/", ""])
def test_a_store_in_trouble_is_ridden_out(
    tmp_path: Path, make: Make, having: str, done_so: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Troubled(tmp_path / "run", fail(4, having, done=done_so))
    own = make(run)
    assert done(own.save(manifest(4), pieces(), ("metrics/a", b"x"))) is Fate.COMMITTED
    assert own.failing_s() == 0.0
    assert commits.numbers(run) == [1, 2]
    said = capsys.readouterr().err
    assert "no connection; trying again beside training" in said
    assert "store: answers again after" in said
    assert own.spool.keys() == []


def test_it_is_known_for_how_long_the_store_has_failed(tmp_path: Path, make: Make) -> None:
    own = make(Troubled(tmp_path / "run", fail(10**6)))
    assert own.failing_s() == 0.0
    own.save(manifest(4), pieces(), None)
    until(lambda: own.failing_s() > 0.03)
    before = own.failing_s()
    until(lambda: own.failing_s() > before)
    assert own.pending == 1


def test_what_has_not_arrived_when_it_is_closed_stays_on_the_disk(tmp_path: Path, make: Make) -> None:
    run = Troubled(tmp_path / "run", fail(10**6))
    own = make(run)
    sent = [own.save(manifest(step), pieces(float(step)), (f"metrics/{step}", b"x")) for step in (2, 4)]
    until(lambda: own.failing_s() > 0)
    began = time.monotonic()
    own.close()
    assert time.monotonic() - began < 2
    assert [one.fate for one in sent] == [Fate.PENDING] * 2
    assert own.spool.keys() == ["checkpoints/00000002-000001/rank-0000.safetensors",
                                "checkpoints/00000004-000001/rank-0000.safetensors", "metrics/2", "metrics/4",
                                "checkpoints/00000002-000001/rank-0000.json",
                                "checkpoints/00000004-000001/rank-0000.json"]  # fmt: skip
    on_disk = open_store(f"file://{own.spool.folder}")
    whole = parts.collect(on_disk, manifest(4).key)
    assert isinstance(whole, Manifest)
    assert weight(on_disk, whole) == [4.0] * 3


def test_what_has_arrived_when_it_is_closed_is_not_on_the_disk_any_more(tmp_path: Path, make: Make) -> None:
    run = FileStore(tmp_path / "run")
    first, _ = make(run), make(run, rank=1)
    sent = first.save(manifest(4, world=2), pieces(), None)
    until(lambda: len(keys(run, "checkpoints/")) == 2)
    first.close()
    assert sent.fate is Fate.PENDING, "the other rank's part is missing"
    put_part(run, manifest(4, world=2), 1)
    assert isinstance(parts.collect(run, sent.manifest.key), Manifest)


def test_nothing_more_is_begun_once_it_is_closed(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "LAST_PUT_S", 0.05)
    run = Gated(tmp_path / "run")
    own = make(run)
    for step in (2, 4):
        own.save(manifest(step), pieces(), None)
    until(lambda: run.threads)
    own.close()
    run.gate.set()
    until(lambda: not own._net._thread.is_alive())
    assert len(keys(run, "checkpoints/")) == 1, "what was under way"
    assert len(own.spool.keys()) == 4


# ---- when the disk is


def test_a_part_that_the_disk_does_not_take_is_uploaded_from_memory(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").write_bytes(b"")
    run = Gated(tmp_path / "run")
    own, values = make(run, base=tmp_path / "full"), torch.ones(3)
    sent = []
    for step in (2, 4):
        sent.append(own.save(manifest(step), [Piece("w", "weight", 0, values)], ("metrics/a", b"x")))
        values.add_(1)
    run.gate.set()
    assert [done(one) for one in sent] == [Fate.COMMITTED] * 2
    assert "checkpoint of step 2: " in (said := capsys.readouterr().err)
    assert "uploading it from memory" in said
    assert (weight(run, manifest(2)), weight(run, manifest(4))) == ([1.0] * 3, [2.0] * 3)


def test_a_spooled_file_that_a_newer_attempt_has_uploaded_is_no_trouble(tmp_path: Path, make: Make) -> None:
    run = Gated(tmp_path / "run")
    own = make(run)
    sent = own.save(manifest(4), pieces(), ("metrics/a", b"x"))
    assert sent.written.wait(SOON_S)
    spool, plain = own.spool, FileStore(tmp_path / "run")
    waiting = spool.keys()
    for key in waiting:
        plain.put_file(key, spool.folder / key)
        spool.remove(key)
    run.gate.set()
    assert done(sent) is Fate.COMMITTED


# ---- when another attempt has started


def test_a_superseded_courier_says_so_and_commits_nothing(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FileStore(tmp_path / "run")
    old = make(run)
    assert done(old.save(manifest(2), pieces(), None)) is Fate.COMMITTED
    log(run, claim(2, resumed=2))
    sent = old.save(manifest(4), pieces(), None)
    until(lambda: old.superseded)
    assert sent.fate is Fate.PENDING
    old.save(manifest(6), pieces(), None)
    until(lambda: len(capsys.readouterr().err.split("attempt 2 has started on here: leaving")) > 1)
    old.wait(SOON_S)
    assert on_course(run) == [2]
    assert commits.numbers(run) == [1, 2, 3]


# ---- what a run can do without


def test_who_waits_for_parts_that_a_newer_attempt_has_removed_learns_of_it(tmp_path: Path, make: Make) -> None:
    run = FileStore(tmp_path / "run")
    own = make(run)
    sent = own.save(manifest(4, world=2), pieces(), None)
    until(lambda: len(keys(run, "checkpoints/")) == 2)
    log(run, claim(2))
    for key in keys(run, "checkpoints/"):
        run.delete(key)
    until(lambda: own.superseded)
    assert sent.fate is Fate.PENDING


def test_of_several_puts_of_one_name_the_newest_happens(tmp_path: Path, make: Make) -> None:
    run = Gated(tmp_path / "run")
    own, happened = make(run), list[str]()
    own.save(manifest(2), pieces(), None)
    until(lambda: run.threads)
    for n in range(5):
        own.keep("rows", lambda n=n: happened.append(f"rows {n}"))  # type: ignore[misc]
        own.keep("board", lambda n=n: happened.append(f"board {n}"))  # type: ignore[misc]
    assert happened == []
    run.gate.set()
    own.wait(SOON_S)
    until(lambda: len(happened) == 2)
    own.keep("rows", lambda: happened.append("rows again"))
    until(lambda: len(happened) == 3)
    assert happened == ["rows 4", "board 4", "rows again"]


def test_a_put_that_fails_is_not_tried_again_and_holds_nothing_up(tmp_path: Path, make: Make) -> None:
    own, tried = make(FileStore(tmp_path / "run")), list[str]()

    def failing() -> None:
        tried.append("rows")
        raise StoreError("no connection")

    own.keep("rows", failing)
    until(lambda: own.failing_s() > 0)
    assert done(own.save(manifest(2), pieces(), None)) is Fate.COMMITTED
    assert tried == ["rows"]
    assert own.failing_s() == 0.0


def test_no_put_is_forgotten_however_the_threads_meet(tmp_path: Path, make: Make) -> None:
    own, seen = make(FileStore(tmp_path / "run")), [-1]
    for n in range(3000):
        own.keep("rows", lambda n=n: seen.append(n))  # type: ignore[misc]
    until(lambda: seen[-1] == 2999)
    assert seen == sorted(set(seen))
    own.wait(0.0)


def test_waiting_ends_with_the_last_arrival_or_at_the_limit(tmp_path: Path, make: Make) -> None:
    run = Gated(tmp_path / "run")
    own = make(run)
    own.save(manifest(2), pieces(), None)
    began = time.monotonic()
    own.wait(0.05)
    assert 0.05 <= time.monotonic() - began < 2
    run.gate.set()
    own.wait(SOON_S)
    assert (own.pending, time.monotonic() - began < SOON_S) == (0, True)


def test_a_courier_without_work_waits_and_closes_at_once(tmp_path: Path, make: Make) -> None:
    own: Any = make(FileStore(tmp_path / "run"))
    began = time.monotonic()
    own.wait(SOON_S)
    own.close()
    assert time.monotonic() - began < 2
    assert not own._disk._thread.is_alive()
    assert not own._net._thread.is_alive()
