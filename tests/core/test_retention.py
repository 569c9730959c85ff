from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from core import retention
from core.checkpoint import newest
from core.manifest import Manifest
from core.retention import Policy, held, hold, reasons, retain
from core.storage import Store, StoreError, open_store
from tests.core.logs import (
    Troubled,
    a_run,
    claim,
    fail,
    keys,
    log,
    manifest,
    on_course,
    put_checkpoint,
    put_part,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return a_run(tmp_path)


def course(*about: Manifest) -> list[Manifest]:
    """With numbers, newest first."""
    for number, each in enumerate(about, 1):
        each.number = number
    return list(about)[::-1]


def trained(run: Store, *steps: int) -> list[Manifest]:
    """An attempt's start, and checkpoints at these steps with numbers from 2 on."""
    log(run, claim(1))
    return [put_checkpoint(run, manifest(step)) for step in steps]


def folders(run: Store) -> list[str]:
    return sorted({key.split("/")[1] for key in keys(run, "checkpoints/")})


# ---- why a checkpoint stays


def test_the_newest_stay_and_the_rest_may_go() -> None:
    found = reasons(course(*map(manifest, (2, 4, 6, 8))), Policy(keep=2), set())
    assert found == {4: "newest", 3: "one of the newest 2"}


def test_the_newest_stays_whatever_the_policy_says() -> None:
    assert reasons(course(manifest(2), manifest(4)), Policy(keep=0), set()) == {2: "newest"}
    assert reasons([], Policy(), set()) == {}


def test_every_so_many_steps_one_stays() -> None:
    found = reasons(course(*map(manifest, (2, 4, 6, 8, 10))), Policy(keep=1, every=4), set())
    assert found == {5: "newest", 2: "every 4 steps", 4: "every 4 steps"}


def test_the_best_of_the_present_stage_stay() -> None:
    scores = {2: 0.1, 4: 0.5, 6: 0.3, 8: None, 10: 0.4, 12: 0.6}
    about = [manifest(step, stage="one" if step == 2 else "two", score=score) for step, score in scores.items()]
    found = reasons(course(*about), Policy(keep=1, best=2), set())
    assert found == {6: "newest", 3: "best on held-out images: 0.3", 5: "best on held-out images: 0.4"}


def test_a_score_of_zero_is_the_best_and_no_missing_one() -> None:
    about = [manifest(2, score=0.5), manifest(4, score=0.0), manifest(6, score=-0.5), manifest(8, score=1.0)]
    assert set(reasons(course(*about), Policy(keep=1, best=2), set())) == {4, 3, 2}


def test_what_somebody_reads_stays() -> None:
    found = reasons(course(*map(manifest, (2, 4, 6))), Policy(keep=1), {1, 77})
    assert found == {3: "newest", 1: "being read"}


# ---- what is deleted


def test_entries_are_deleted_before_files_and_starts_never(tmp_path: Path) -> None:
    store = Troubled(tmp_path)
    first, second, _ = trained(store, 2, 4, 6)
    store.asked.clear()
    retain(store, Policy(keep=3))
    assert store.asked == []
    retain(store, Policy(keep=1))
    assert keys(store, "commits/") == ["commits/000001.json", "commits/000004.json"]
    assert folders(store) == ["00000006-000001"]
    gone = [key for verb, key in store.asked if verb == "delete"]
    parts = ("rank-0000.json", "rank-0000.safetensors")
    assert gone == ["commits/000002.json", *(f"{first.key}/{name}" for name in parts),
                    "commits/000003.json", *(f"{second.key}/{name}" for name in parts)]  # fmt: skip
    assert newest(store) is not None


def test_a_deletion_cut_short_never_leaves_an_entry_without_files(tmp_path: Path) -> None:
    whole = trained(Troubled(tmp_path), 2, 4, 6, 8)[0].size
    for limit in range(12):
        store = Troubled(tmp_path, busy_after(limit))
        with suppress(StoreError):
            retain(store, Policy(keep=1))
        for number in on_course(store):
            entry = retention.commits.read(store, number)
            assert isinstance(entry, Manifest)
            assert store.size(f"{entry.key}/rank-0000.safetensors") == whole
    retain(Troubled(tmp_path), Policy(keep=1))
    assert on_course(Troubled(tmp_path)) == [5]


def busy_after(limit: int) -> Callable[[str, str, bool], None]:
    left = iter(range(limit))

    def trouble(verb: str, key: str, done: bool) -> None:
        if verb == "delete" and not done and next(left, None) is None:
            raise StoreError("busy")

    return trouble


def test_the_newest_is_never_deleted_even_when_it_is_the_only_one_damaged(run: Store) -> None:
    trained(run, 2)
    retain(run, Policy(keep=1))
    retain(run, Policy(keep=0))
    assert on_course(run) == [2]
    assert newest(run) is not None


def test_a_dead_end_goes_with_its_files_and_the_course_does_not_miss_it(run: Store) -> None:
    trained(run, 2, 4, 6)
    log(run, claim(2, resumed=2))
    retain(run, Policy(keep=5))
    assert folders(run) == ["00000002-000001", "00000004-000001", "00000006-000001"], "it may still be the newest"
    put_checkpoint(run, manifest(4, claim=5))
    retain(run, Policy(keep=5))
    assert on_course(run) == [6, 2]
    assert folders(run) == ["00000002-000001", "00000004-000005"]
    assert keys(run, "commits/") == [f"commits/00000{n}.json" for n in (1, 2, 5, 6)]


def test_a_dead_end_that_has_come_to_life_again_keeps_its_files(run: Store) -> None:
    trained(run, 2, 4)
    log(run, claim(2, resumed=2))
    again = entry_three(run, manifest(4))
    log(run, again, claim(3, resumed=5))
    retain(run, Policy(keep=5))
    assert on_course(run) == [5, 2]
    assert folders(run) == ["00000002-000001", "00000004-000001"]
    found = newest(run)
    assert found is not None
    assert found.position.step == 4


def entry_three(run: Store, about: Manifest) -> Manifest:
    whole = retention.commits.read(run, 3)
    assert isinstance(whole, Manifest)
    assert whole.key == about.key
    return whole


def test_damaged_entries_and_other_files_are_left_alone(run: Store) -> None:
    trained(run, 2, 4, 6, 8)
    run.put("commits/000003.json", b"damaged")
    put_part(run, manifest(10))
    retain(run, Policy(keep=1))
    assert keys(run, "commits/") == [f"commits/00000{n}.json" for n in (1, 3, 5)]
    assert folders(run) == ["00000004-000001", "00000008-000001", "00000010-000001"]


def test_entries_are_read_once_by_a_policy_that_is_used_again(tmp_path: Path) -> None:
    read: list[str] = []

    class Counted(Troubled):
        def get_range(self, key: str, start: int, size: int) -> bytes:
            read.append(key)
            return super().get_range(key, start, size)

    run, policy = Counted(tmp_path), Policy(keep=2)
    trained(run, 2, 4)
    read.clear()
    retain(run, policy)
    put_checkpoint(run, manifest(6))
    read.clear()
    retain(run, policy)
    assert read == ["commits/000004.json"]
    assert all(not e.slices for e in policy._known.values() if isinstance(e, Manifest)), "they are large"


# ---- what somebody reads


def test_what_is_held_stays_until_it_is_let_go(store_uri: str) -> None:
    run = open_store(store_uri)
    trained(run, 2, 4, 6)
    with hold(run, 2), hold(run, 2), hold(run, 3):
        assert held(run) == {2, 3}
        retain(run, Policy(keep=1))
        assert on_course(run) == [4, 3, 2]
    assert held(run) == set()
    assert keys(run, "holds/") == []
    retain(run, Policy(keep=1))
    assert on_course(run) == [4]


def test_a_hold_is_let_go_when_reading_fails(run: Store) -> None:
    with pytest.raises(ValueError, match="broken"), hold(run, 2):
        raise ValueError("broken")
    assert keys(run, "holds/") == []


def test_a_hold_that_was_left_behind_ends_by_itself_and_is_cleared_away(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "HOLD_S", -1.0)
    with hold(run, 2):
        assert len(keys(run, "holds/")) == 1
        assert held(run) == set()
        assert keys(run, "holds/") == []


def test_a_file_that_is_no_hold_holds_nothing(run: Store) -> None:
    run.put("holds/000002-x.json", b"{")
    run.put("holds/000003-y.json", b"{}")
    run.put("holds/000005-w.json", b'{"until": "x"}')
    run.put("holds/000006-v.json", b"[" * 100_000)
    run.put("holds/000004-z.json", json.dumps({"until": 4e9}).encode())
    assert held(run) == {4}


def test_no_hold_lasts_longer_than_an_hour_whatever_it_says(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run.put("holds/000004-z.json", json.dumps({"until": 4e9}).encode())
    later = time.time() + retention.HOLD_S + retention.CLOCKS_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert held(run) == set()
    assert keys(run, "holds/") == []


def test_where_nothing_may_be_written_reading_goes_on(tmp_path: Path) -> None:
    with hold(Troubled(tmp_path, fail(9)), 2):
        pass
