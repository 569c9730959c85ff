from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core import parts
from core.folder import FileStore
from core.manifest import Manifest
from core.storage import Store, StoreError, open_store
from tests.core.logs import a_run, manifest, put_part

NAN = float("nan")


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return a_run(tmp_path)


def test_the_whole_has_every_rank_s_files_and_slices(store_uri: str) -> None:
    run, about = open_store(store_uri), manifest(4, world=3, score=0.25, metrics=["metrics/a"])
    own = [put_part(run, about, rank, float(rank)) for rank in range(3)]
    whole = parts.collect(run, about.key)
    assert isinstance(whole, Manifest)
    names = [f"rank-000{rank}.safetensors" for rank in range(3)]
    assert whole.files == {n: {"size": p.size, "crc32c": p.crc32c} for n, p in zip(names, own, strict=True)}
    assert [s.file for s in whole.slices] == [name for name in names for _ in range(2)]
    assert [s.crc32c for s in whole.slices] == [s.crc32c for p in own for s in p.slices]
    assert len({s.crc32c for s in whole.slices}) == 4, "three weights that differ, and the same method state"
    assert whole.key == about.key
    assert (whole.position, whole.score, whole.metrics) == (about.position, 0.25, ["metrics/a"])


@pytest.mark.parametrize("missing", [f"rank-000{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")])
def test_there_is_no_answer_while_a_file_is_missing(run: Store, missing: str) -> None:
    about = manifest(4, world=2)
    for rank in range(2):
        put_part(run, about, rank)
    left = run.get(f"{about.key}/{missing}")
    run.delete(f"{about.key}/{missing}")
    assert parts.collect(run, about.key) is None
    run.put(f"{about.key}/{missing}", left)
    assert isinstance(parts.collect(run, about.key), Manifest)


def test_a_neighbour_s_files_do_not_count(run: Store) -> None:
    put_part(run, manifest(4, claim=1))
    assert parts.collect(run, manifest(4, claim=2).key) is None
    assert parts.collect(run, "checkpoints/00000004-00000") is None


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_s_nan_is_the_reason_why_it_can_be_none(run: Store, rank: int) -> None:
    about = manifest(4, world=2)
    for each in range(2):
        put_part(run, about, each, NAN if each == rank else 1.0)
    assert parts.collect(run, about.key) == "the state holds infinities or NaN"


def test_a_file_of_another_size_is_named(run: Store) -> None:
    about = manifest(4)
    own = put_part(run, about)
    key = f"{about.key}/rank-0000.safetensors"
    run.put(key, run.get(key)[:-1])
    assert parts.collect(run, about.key) == f"{key} has {own.size - 1} bytes instead of {own.size}"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "change", [lambda data: b"", lambda data: b"[]", lambda data: data[:-1], lambda data: b'{"part": {"size": 1}}',
               lambda data: json.dumps({k: [v] for k, v in json.loads(data).items()}).encode()]
)  # fmt: skip
def test_a_description_that_says_nothing_is_a_reason_and_no_crash(
    run: Store, rank: int, change: Callable[[bytes], bytes]
) -> None:
    about = manifest(4, world=2)
    for each in range(2):
        put_part(run, about, each)
    key = f"{about.key}/rank-000{rank}.json"
    run.put(key, change(run.get(key)))
    said = parts.collect(run, about.key)
    assert isinstance(said, str)
    assert "unreadable" in said


def test_a_description_of_another_retort_is_a_reason_and_no_crash(run: Store) -> None:
    about = manifest(4)
    put_part(run, about)
    key = f"{about.key}/rank-0000.json"
    content = json.loads(run.get(key))
    content["about"]["invented"] = 1
    run.put(key, json.dumps(content).encode())
    assert "unreadable" in str(parts.collect(run, about.key))


def test_descriptions_are_read_beside_each_other(tmp_path: Path) -> None:
    gate = threading.Barrier(4, timeout=20)

    class Slow(FileStore):
        def get_range(self, key: str, start: int, size: int) -> bytes:
            if threading.current_thread() is not threading.main_thread():
                gate.wait()
            return super().get_range(key, start, size)

    run, about = Slow(tmp_path), manifest(4, world=4)
    for rank in range(4):
        put_part(run, about, rank)
    assert isinstance(parts.collect(run, about.key), Manifest)


def test_trouble_with_the_store_is_told(tmp_path: Path) -> None:
    class Down(FileStore):
        def get_range(self, key: str, start: int, size: int) -> bytes:
            raise StoreError("no connection")

    about = manifest(4)
    put_part(FileStore(tmp_path), about)
    with pytest.raises(StoreError, match="no connection"):
        parts.collect(Down(tmp_path), about.key)
