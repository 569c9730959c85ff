"""Two writers in one place: the second is sent away, unless the first has died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from core.data.sole_writer import FOLDER, OtherWriter, SoleWriter
from core.folder import FileStore
from core.storage import Store, open_store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.data.sole_writer.BEAT_S", 0.3)


def silent(text: str) -> None:
    pass


def test_a_second_writer_is_refused_while_the_first_one_lives(store_uri: str) -> None:
    store = open_store(store_uri)
    with SoleWriter(store, silent) as first:
        with (
            pytest.raises(OtherWriter, match=rf"process {os.getpid()} on .* writes here"),
            SoleWriter(store, silent),
        ):
            pass
        first.check()
    with SoleWriter(store, silent) as second:
        second.check()
    assert list(store.list()) == []


def test_of_two_that_come_at_the_same_time_one_wins(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    barrier, refused = threading.Barrier(4), []
    done = threading.Event()

    def enter() -> None:
        barrier.wait()
        try:
            with SoleWriter(store, silent):
                done.wait(60)
        except OtherWriter as error:
            refused.append(error)
            if len(refused) == 3:
                done.set()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3


def claim_and_die(store: Store) -> None:
    SoleWriter(store, silent).__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def dead(tmp_path: Path) -> FileStore:
    """A place whose writer was killed."""
    store = FileStore(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=claim_and_die, args=(store,))
    process.start()
    process.join()
    assert store.size(f"{FOLDER}/000001") is not None
    return store


def test_a_killed_writer_does_not_block_for_ever(dead: FileStore) -> None:
    said: list[str] = []
    with SoleWriter(dead, said.append) as writer:
        writer.check()
        assert dead.size(f"{FOLDER}/000002") is not None
    assert list(dead.list()) == []
    assert "whether process" in said[0]


def test_a_writer_that_slept_too_long_finds_out(dead: FileStore) -> None:
    slept = SoleWriter(dead, silent)
    slept._number = 1
    slept.check()
    with SoleWriter(dead, silent), pytest.raises(OtherWriter, match="writes here"):
        slept.check()
    with pytest.raises(OtherWriter):
        slept.check()


def test_a_writer_that_leaves_while_it_is_watched_makes_room(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    first = SoleWriter(store, silent)
    first.__enter__()
    with SoleWriter(store, lambda text: first.__exit__(None, None, None)) as second:
        second.check()
