"""Work shared among processes that have nothing but a store in common, some of which die."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from core.features.claims import Claims, shared
from core.storage import Store, open_store
from jobs.spec import REPOSITORY

ITEMS = [f"0-{number}" for number in range(12)]
HOLDER = """
import sys, time
from core.features.claims import Claims
from core.storage import open_store
with Claims(open_store(sys.argv[1]), beat_s=0.05) as claims:
    print(*[item for item in sys.argv[2:] if claims.take(item)], flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/work")


class Board:
    """What has been done, and by whom."""

    def __init__(self) -> None:
        self.by: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def done(self) -> set[str]:
        with self._lock:
            return {item for item, _ in self.by}

    def is_done(self, item: str) -> bool:
        return item in self.done()

    def work(self, claims: Claims, pause_s: float = 0.0) -> None:
        """Until everything is done."""
        with claims:
            for taken in shared(ITEMS, claims, self.done, self.is_done):
                for item in taken:
                    time.sleep(pause_s)
                    with self._lock:
                        self.by.append((item, claims.owner))

    def work_together(self, crew: list[Claims], pause_s: float) -> None:
        threads = [threading.Thread(target=self.work, args=(claims, pause_s)) for claims in crew]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def holder(store: Store, *items: str) -> subprocess.Popen[str]:
    """A process that has taken items and beats."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.uri, *items], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().split() == list(items)
    return process


def test_of_many_who_want_an_item_one_has_it(store_uri: str) -> None:
    store, won = open_store(store_uri), []
    crew = [Claims(store) for _ in range(6)]
    threads = [threading.Thread(target=lambda c=c: won.append(c.take("0-1"))) for c in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]


def test_workers_share_everything_and_do_nothing_twice(store: Store) -> None:
    board = Board()
    crew = [Claims(store, beat_s=0.05, lease_s=30) for _ in range(3)]
    board.work_together(crew, 0.02)
    assert Counter(item for item, _ in board.by) == dict.fromkeys(ITEMS, 1)
    assert len({owner for _, owner in board.by}) == 3


def test_a_worker_that_lives_keeps_what_it_has_however_long_it_takes(store: Store) -> None:
    process = holder(store, "0-1")
    try:
        watcher = Claims(store, lease_s=0.6)
        limit = time.monotonic() + 1.5
        while time.monotonic() < limit:
            assert not watcher.take_over("0-1")
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


def test_what_a_killed_worker_had_is_done_by_another_once_and_nothing_twice(store: Store) -> None:
    process = holder(store, *ITEMS[2:6])
    process.kill()
    process.wait()
    board = Board()
    crew = [Claims(store, beat_s=0.05, lease_s=0.5) for _ in range(2)]
    board.work_together(crew, 0.01)
    assert Counter(item for item, _ in board.by) == dict.fromkeys(ITEMS, 1)


def test_a_worker_that_leaves_gives_back_at_once_what_it_had(store: Store) -> None:
    with Claims(store, lease_s=600) as gone:
        assert gone.take("0-3")
    assert Claims(store, lease_s=600).take_over("0-3")


def test_of_two_who_take_over_one_has_it(store: Store) -> None:
    with Claims(store) as gone:
        gone.take("0-3")
    one, other = Claims(store), Claims(store)
    with one, other:
        assert one.take_over("0-3")
        assert not other.take_over("0-3")


def test_an_item_that_was_dropped_while_it_was_held_is_done_again(store: Store) -> None:
    with Claims(store, lease_s=600) as claims:
        assert claims.take("0-3")
        assert claims.take_over("0-3")


def test_who_comes_when_claims_are_already_removed_does_no_finished_item_again(store: Store) -> None:
    board = Board()
    claims = Claims(store, beat_s=0.05, lease_s=30)

    answers = iter([set[str]()])  # at first nothing; by the time of the first claim, all is done
    with claims:
        for taken in shared(ITEMS, claims, lambda: next(answers, set(ITEMS)), lambda item: True):
            board.by += [(item, "") for item in taken]
    assert not board.by


def test_who_has_to_wait_says_so(store: Store) -> None:
    process = holder(store, "0-1")
    board, said = Board(), list[str]()
    board.by = [(item, "") for item in ITEMS[2:]]

    def waiting() -> None:
        said.append("waits")
        process.kill()
        process.wait()

    with Claims(store, beat_s=0.05, lease_s=0.4) as claims:
        for taken in shared(ITEMS, claims, board.done, board.is_done, waiting):
            board.by += [(item, "") for item in taken]
    assert said
    assert Counter(item for item, _ in board.by) == dict.fromkeys(ITEMS, 1)
