from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from core import commits
from core.comm import Comm
from core.commits import Claim, SupersededError
from core.folder import FileStore
from core.manifest import CheckpointError, Manifest
from core.salvage import adopt, begin, upload
from core.spool import Spool
from core.storage import Entry, Store, StoreError, open_store
from tests.core.logs import Troubled, a_run, claim, keys, log, manifest, on_course, put_checkpoint, put_part
from tests.ranks import run_ranks

ALONE = Comm(torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return a_run(tmp_path)


@pytest.fixture
def spool(tmp_path: Path, run: Store) -> Spool:
    return Spool(f"{tmp_path}/spool", run)


def started(run: Store, *steps: int) -> None:
    """Entry 1 is an attempt's start, then come checkpoints."""
    log(run, claim(1))
    for step in steps:
        put_checkpoint(run, manifest(step))


def adopted(run: Store, *fingerprints: str) -> Manifest | None:
    """The checkpoint that is committed by who begins now."""
    number = adopt(run, list(fingerprints), max(commits.numbers(run), default=0))
    if number is None:
        return None
    entry = commits.read(run, number)
    assert isinstance(entry, Manifest)
    return entry


# ---- a complete checkpoint that nobody has committed


def test_what_an_attempt_left_complete_is_committed_the_newest_alone(run: Store) -> None:
    started(run, 2)
    for step in (4, 6):
        for rank in range(2):
            put_part(run, manifest(step, world=2), rank)
    put_part(run, manifest(8, world=2), 0)
    found = adopted(run, "f")
    assert found is not None
    assert found.position.step == 6
    assert on_course(run) == [3, 2]
    entry = commits.read(run, 3)
    assert isinstance(entry, Manifest)
    assert (entry.key, len(entry.files), len(entry.slices)) == ("checkpoints/00000006-000001", 2, 4)
    assert adopted(run, "f") is None, "nothing is newer"


@pytest.mark.parametrize(
    "about", [manifest(4), manifest(3), manifest(6, fingerprint="another"), manifest(6, claim=0)],
    ids=["committed", "older", "of another recipe", "of a claim before the newest checkpoint's"],
)  # fmt: skip
def test_what_is_no_progress_is_not_committed(run: Store, about: Manifest) -> None:
    started(run, 2, 4)
    put_part(run, about)
    assert adopted(run, "f", "g") is None
    assert on_course(run) == [3, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_newer_one_that_is_not_finite_or_torn_gives_way_to_one_before(run: Store, value: float) -> None:
    started(run)
    put_part(run, manifest(2))
    put_part(run, manifest(4), value=value)
    put_part(run, manifest(6))
    run.put(f"{manifest(6).key}/rank-0000.safetensors", b"torn")
    put_part(run, manifest(8))
    run.put(f"{manifest(8).key}/rank-0000.json", b"{torn")
    found = adopted(run, "f")
    assert found is not None
    assert found.position.step == 2


def test_nothing_that_a_rewind_has_left_behind_is_committed(run: Store) -> None:
    started(run, 2, 4)
    log(run, claim(1, resumed=2, rewound=True))
    put_part(run, manifest(6, claim=1))
    assert adopted(run, "f") is None
    log(run, claim(2, resumed=2))
    assert adopted(run, "f") is None, "a start after it does not bring it back"
    put_part(run, manifest(6, claim=4))
    found = adopted(run, "f")
    assert found is not None
    assert found.claim == 4


def test_what_a_resumed_attempt_left_is_committed_though_a_later_one_has_begun(run: Store) -> None:
    started(run, 2)
    log(run, claim(2, resumed=2, step=2))
    put_part(run, manifest(4, claim=1))
    assert adopted(run, "f") is not None
    assert on_course(run) == [4, 2]


def test_somebody_who_begins_in_this_moment_goes_first(tmp_path: Path) -> None:
    def overtake(verb: str, key: str, done: bool) -> None:
        if verb == "create" and not done and key == "commits/000002.json" and key not in keys(plain):
            log(plain, claim(2))

    plain, run = Troubled(tmp_path), Troubled(tmp_path, overtake)
    log(plain, claim(1))
    put_part(plain, manifest(4))
    assert adopted(run, "f") is None
    assert on_course(plain) == []


# ---- what lies on the node's disk


def spooled(spool: Spool, about: Manifest, rank: int = 0) -> None:
    """What the courier of a rank wrote there and could not upload."""
    put_part(open_store(f"file://{spool.folder}"), about, rank)


def test_what_waits_on_the_disk_is_uploaded_its_description_last(tmp_path: Path, spool: Spool) -> None:
    run = Troubled(tmp_path / "run")
    log(run, claim(1))
    spooled(spool, manifest(4))
    spool.write("metrics/000001-00000000.jsonl", b"{}\n")
    run.asked.clear()
    upload(run, spool)
    assert [key.rpartition("/")[2] for _, key in run.asked] == [
        "rank-0000.safetensors", "000001-00000000.jsonl", "rank-0000.json",
    ]  # fmt: skip
    assert spool.keys() == []
    assert run.get("metrics/000001-00000000.jsonl") == b"{}\n"
    assert adopted(run, "f") is not None


def test_parts_that_are_not_newer_than_the_newest_checkpoint_are_dropped(run: Store, spool: Spool) -> None:
    started(run, 2, 4)
    log(run, claim(1, resumed=3, rewound=True))
    before = keys(run)
    spooled(spool, manifest(3))
    spooled(spool, manifest(6, claim=1))
    upload(run, spool)
    assert spool.keys() == []
    assert keys(run) == before


def test_what_the_store_does_not_take_stays_on_the_disk(tmp_path: Path, spool: Spool) -> None:
    def refuse(verb: str, key: str, done: bool) -> None:
        if key.endswith(".json"):
            raise StoreError("no connection")

    spooled(spool, manifest(4))
    with pytest.raises(StoreError, match="no connection"):
        upload(Troubled(tmp_path / "run", refuse), spool)
    left = spool.keys()
    assert [key.rpartition("/")[2] for key in left] == ["rank-0000.json"]


def test_a_file_that_somebody_else_uploads_meanwhile_is_no_trouble(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_store(store_uri).sub("run")
    spool = Spool(f"{tmp_path}/spool", run)
    spooled(spool, manifest(4))
    listed = spool.keys()
    monkeypatch.setattr(spool, "keys", lambda: listed)
    spool.remove(listed[0])
    upload(run, spool)
    assert keys(run) == [f"{manifest(4).key}/rank-0000.json"]


# ---- the start of an attempt


def test_an_attempt_starts_from_nothing_in_an_empty_run(run: Store, spool: Spool) -> None:
    begun = begin(run, ["f"], 1, ALONE, spool)
    assert begun.manifest is None
    own = begun.claim
    assert (own.attempt, own.resumed, own.step, own.number, own.lost) == (1, None, 0, 1, 0)
    assert (own.host, own.skipped, own.rewound) == (socket.gethostname(), (), False)


def test_an_attempt_goes_on_from_what_was_left_on_the_disk(run: Store, spool: Spool) -> None:
    started(run, 2)
    spooled(spool, manifest(4, metrics=["metrics/000001-00000000.jsonl"]))
    spool.write("metrics/000001-00000000.jsonl", b'{"step": 4}\n')
    spool.write("metrics/000001-00000004.jsonl", b'{"step": 5}\n{"step": 6}\n')
    begun = begin(run, ["f"], 2, ALONE, spool)
    assert begun.manifest is not None
    assert begun.manifest.position.step == 4
    assert (begun.claim.number, begun.claim.resumed, begun.claim.step, begun.claim.lost) == (4, 3, 4, 2)


@pytest.mark.parametrize(("attempt", "allowed"), [(1, False), (2, True), (3, True)])
def test_an_attempt_older_than_the_last_is_refused(run: Store, spool: Spool, attempt: int, allowed: bool) -> None:
    started(run, 2)
    log(run, claim(2, resumed=2))
    put_checkpoint(run, manifest(4, claim=3))
    if allowed:
        assert begin(run, ["f"], attempt, ALONE, spool).claim.number == 5
        return
    with pytest.raises(SupersededError, match=f"a newer attempt than {attempt} has started"):
        begin(run, ["f"], attempt, ALONE, spool)
    assert commits.numbers(run) == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_passed_over_and_so_leaves_the_course(run: Store, spool: Spool) -> None:
    started(run, 2, 4)
    key = f"{manifest(4).key}/rank-0000.safetensors"
    data = bytearray(run.get(key))
    data[-1] ^= 1
    run.put(key, bytes(data))
    begun = begin(run, ["f"], 2, ALONE, spool)
    assert (begun.claim.resumed, begun.claim.step) == (2, 2)
    assert on_course(run) == [2]


def test_a_rewind_keeps_in_mind_what_was_left_out_before(run: Store, spool: Spool) -> None:
    log(run, claim(1, skipped=((3, 4),)))
    put_checkpoint(run, manifest(6, skipped=[(3, 4)]))
    begun = begin(run, ["f"], 1, ALONE, spool, skip=(7, 9))
    assert (begun.claim.skipped, begun.claim.rewound) == (((3, 4), (7, 9)), True)
    again = begin(run, ["f"], 2, ALONE, spool)
    assert (again.claim.skipped, again.claim.rewound) == (((3, 4), (7, 9)), False)


def test_a_checkpoint_that_comes_in_meanwhile_is_gone_on_from(tmp_path: Path, spool: Spool) -> None:
    plain = Troubled(tmp_path / "run")
    started(plain, 2)
    late = [manifest(4), manifest(6)]

    def overtake(verb: str, key: str, done: bool) -> None:
        if verb == "create" and not done and late:
            put_checkpoint(plain, late.pop(0))

    begun = begin(Troubled(tmp_path / "run", overtake), ["f"], 2, ALONE, spool)
    assert begun.manifest is not None
    assert (begun.manifest.position.step, begun.claim.resumed, begun.claim.number) == (6, 4, 5)


class Sleeper(FileStore):
    """Before its request number `moment`, somebody else does something."""

    def __init__(self, root: Path, moment: int, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self.left, self.meanwhile = moment, meanwhile

    def _turn(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.meanwhile()

    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        self._turn()
        return iter([*super().list(prefix, after)])

    def get_range(self, key: str, start: int, size: int) -> bytes:
        self._turn()
        return super().get_range(key, start, size)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._turn()
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("complete", [True, False])
def test_an_attempt_that_falls_asleep_while_it_begins_takes_nothing_from_one_that_began_meanwhile(
    complete: bool, tmp_path: Path
) -> None:
    """Wherever it sleeps: before it reads the log, behind, or on the way to its own entry."""
    plain = a_run(tmp_path)
    started(plain, 2)
    if complete:
        put_part(plain, manifest(4))
    refused, spool = 0, Spool(f"{tmp_path}/none", plain)
    for moment in range(1, 40):
        root = tmp_path / str(moment)
        shutil.copytree(tmp_path / "run", root)
        awake = FileStore(root)
        sleeper = Sleeper(root, moment, partial(begin, awake, ["f"], 3, ALONE, spool))
        try:
            begin(sleeper, ["f"], 2, ALONE, spool)
        except SupersededError:
            refused += 1
        attempts = [c.attempt for c in commits.claims(awake)]
        assert attempts == sorted(attempts), f"request {moment}: attempt 2 took the run from attempt 3"
    assert refused >= 5


def all_begin(folder: str, attempts: list[int]) -> list[Any]:
    run, comm, said = a_run(Path(folder)), Comm(torch.device("cpu")), list[Any]()
    for attempt in attempts:
        try:
            begun = begin(run, ["f"], attempt, comm, Spool(f"{folder}/spool", run))
            said.append((begun.claim, begun.manifest.number if begun.manifest else None))
        except SupersededError as error:
            said.append(str(error))
    return said


def test_all_ranks_get_the_same_answer_and_one_claims(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    started(run, 2)
    for rank in range(2):
        spooled(Spool(f"{tmp_path}/spool", run), manifest(4, world=2), rank)
    first, second = run_ranks(all_begin, 2, str(tmp_path), [3, 2, 4])
    assert first == second
    (one, from_one), refused, (other, from_other) = first
    assert "a newer attempt than 2 has started" in refused
    assert isinstance(one, Claim)
    assert (one.number, from_one, other.number, from_other) == (4, 3, 5, 3)
    assert commits.numbers(run) == [1, 2, 3, 4, 5]


def test_a_run_whose_checkpoints_all_belong_to_another_recipe_is_not_begun_anew(run: Store, spool: Spool) -> None:
    started(run, 2)
    with pytest.raises(CheckpointError, match=r"00000002-000001 belongs to another recipe \(f\)"):
        begin(run, ["g"], 2, ALONE, spool)
    assert commits.numbers(run) == [1, 2]
    begun = begin(run, ["g", "f"], 2, ALONE, spool)
    assert begun.manifest is not None
