"""gc: what goes, what stays, and what is only said."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boto3
import pytest

from core import commits
from core.config import from_yaml
from core.features import usage
from core.features.sets import FeatureSet
from core.folder import FileStore
from core.storage import open_store
from jobs import cli, extract
from jobs.record import Run, State, Transition, _dump, _key
from tests import toy
from tests.conftest import S3Server
from tests.core.logs import claim, log, manifest, put_checkpoint, put_part

MakeRun = Callable[..., Run]


def gc(root: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["gc", "--store", root, *options]) == 0
    return capsys.readouterr().out


def folders(run: Run) -> set[str]:
    return {entry.key.split("/")[1] for entry in run.store.list("checkpoints/")}


@pytest.fixture
def messy(new_run: MakeRun) -> Run:
    """A run with a checkpoint of step 4, half of one of step 2 and half of one of step 6."""
    run = new_run()
    log(run.store, claim())
    put_checkpoint(run.store, manifest(4))
    put_part(run.store, manifest(2))
    put_part(run.store, manifest(6, world=2))
    return run


def test_files_that_no_checkpoint_names_go_and_the_others_stay(
    messy: Run, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = gc(root, capsys, "--dry")
    assert "would remove" in said
    assert len(folders(messy)) == 3, "DRY=1 removes nothing"
    said = gc(root, capsys)
    assert folders(messy) == {"00000004-000001"}
    assert "00000002-000001" in said
    assert "00000006-000001" in said
    assert "0 found" in gc(root, capsys)


def test_what_a_living_attempt_is_uploading_stays(messy: Run, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    messy.move(State.QUEUED, 1)
    messy.move(State.RUNNING, 1)
    messy.beat({}, 1)
    gc(root, capsys)
    assert folders(messy) == {"00000004-000001", "00000006-000001"}


def test_a_complete_checkpoint_that_the_next_attempt_will_commit_stays(
    messy: Run, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put_part(messy.store, manifest(6, world=2), rank=1)
    gc(root, capsys)
    assert folders(messy) == {"00000004-000001", "00000006-000001"}


def test_nothing_goes_while_an_entry_of_the_log_cannot_be_read(
    messy: Run, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    messy.store.put(commits.key(3), b"{")
    gc(root, capsys)
    assert len(folders(messy)) == 3


def end(run: Run, days_ago: float) -> None:
    moves = ((1, State.QUEUED), (2, State.RUNNING), (3, State.SUCCEEDED))
    when = time.time() - 86400 * days_ago
    for number, state in moves:
        run.store.put(_key(number), _dump(asdict(Transition(number, state, when, 1))))
    age(run, when)


def age(run: Run, when: float) -> None:
    """Let the store say that the run's last transition is of `when`."""
    assert isinstance(run.store, FileStore)
    for path in (run.store.root / "transitions").iterdir():
        os.utime(path, (when, when))


def test_old_runs_go_when_asked_for_but_never_what_another_run_was_made_from(
    new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = new_run("teacher-0000000000")
    student = new_run("student-0000000000", recipe="teachers: {one: {weights: 'run:teacher-0000000000'}}")
    old, young = new_run("old-0000000000"), new_run("young-0000000000")
    for run, days in ((teacher, 90), (student, 2), (old, 90), (young, 2)):
        end(run, days)
    gc(root, capsys)
    assert len(Run.list(root)) == 4, "runs go only when asked for"
    gc(root, capsys, "--days", "30")
    assert set(Run.list(root)) == {teacher.id, student.id, young.id}
    end(student, 60)
    gc(root, capsys, "--days", "30")
    assert set(Run.list(root)) == {young.id}, "the whole lineage is old now"
    assert {e.key.split("/")[1] for e in open_store(root).list("runs/")} == {young.id}


def test_uploads_that_were_broken_off_long_ago_go(
    new_run: MakeRun, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    fresh, stale = (tmp_path / "store" / "runs" / run.id / f".tmp-{letter * 32}" for letter in "ab")
    for path in (fresh, stale):
        path.write_bytes(b"half")
    os.utime(stale, (0, 0))
    gc(root, capsys)
    assert (fresh.exists(), stale.exists()) == (True, False)


@pytest.mark.parametrize(
    "place",
    [".tmp-notes", "runs/demo-0123456789/.tmp-notes", f"photos/.tmp-{'a' * 32}", f"runs/of-others/.tmp-{'a' * 32}",
     f"features/of-others/.tmp-{'a' * 32}", f"features/{'a' * 16}/.tmp-{'a' * 32}"],
)  # fmt: skip
def test_temporary_files_of_others_stay_however_old(
    place: str, new_run: MakeRun, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_run()
    path = tmp_path / "store" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (0, 0))
    assert "0 found" in gc(root, capsys)
    assert path.exists()


def test_uploads_of_others_to_the_same_bucket_are_not_aborted(
    bucket: str, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(bucket, "demo-0123456789").create("", {})
    run = "runs/demo-0123456789"
    ours = [f"{run}/checkpoints/00000004-000001/rank-0000.safetensors", "weights/timm--x/model.safetensors"]
    theirs = ["photos/film.mp4", f"{run}/film.mp4", "runs/film/logs/attempt-0001/rank-0000.log",
              "features/0123456789abcdef/view-0/part-000000-0a1b2c3d.safetensors"]  # fmt: skip
    client = boto3.client("s3")
    _, _, place = bucket.removeprefix("s3://").partition("/")
    for key in (*ours, *theirs):
        client.create_multipart_upload(Bucket=s3_server.bucket, Key=f"{place}/{key}")
    assert "2 uploads" in gc(bucket, capsys)
    left = client.list_multipart_uploads(Bucket=s3_server.bucket, Prefix=f"{place}/")["Uploads"]
    assert {upload["Key"] for upload in left} == {f"{place}/{key}" for key in theirs}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., set[str]]:
    """elsewhere(path): have a folder of the store lie elsewhere, behind a link; the names that lie there now."""

    def move(path: Path) -> Callable[[], set[str]]:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        return lambda: {found.name for found in (tmp_path / "elsewhere").rglob("*") if found.is_file()}

    return move


@pytest.mark.parametrize("linked", ["checkpoints", "", "."], ids=["checkpoints", "run", "runs"])
def test_what_lies_behind_a_link_stays(
    linked: str, messy: Run, root: str, tmp_path: Path, elsewhere: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    end(messy, 90)
    runs = tmp_path / "store" / "runs"
    stale = runs / messy.id / "checkpoints" / f".tmp-{'a' * 32}"
    stale.touch()
    os.utime(stale, (0, 0))
    there = elsewhere(runs if linked == "." else runs / messy.id / linked)
    before = there()
    gc(root, capsys)
    gc(root, capsys, "--days", "30")
    assert there() == before


def test_a_run_behind_a_link_keeps_what_it_was_made_from(
    new_run: MakeRun, root: str, tmp_path: Path, elsewhere: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = new_run("teacher-0000000000")
    student = new_run("student-0000000000", recipe="teachers: {one: {weights: 'run:teacher-0000000000'}}")
    end(teacher, 90)
    end(student, 2)
    elsewhere(tmp_path / "store" / "runs" / student.id)
    gc(root, capsys, "--days", "30")
    assert set(Run.list(root)) == {teacher.id, student.id}


@pytest.mark.parametrize("ahead_days", [400, -400])
def test_a_wrong_clock_of_this_machine_makes_nothing_old(
    ahead_days: int, new_run: MakeRun, root: str, features: Callable[[], set[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    now, young, old = time.time(), new_run("young-0000000000"), new_run("old-0000000000")
    end(young, 0)
    end(old, 90)
    half = tmp_path / "store" / "runs" / young.id / f".tmp-{'a' * 32}"
    half.touch()
    monkeypatch.setattr(time, "time", lambda: now + 86400 * ahead_days)
    gc(root, capsys, "--days", "30")
    assert Run.list(root) == [young.id]
    assert half.exists()
    assert features() == {"young", "new"}


def test_a_wrong_clock_of_the_machine_that_ran_a_run_does_not_make_it_old(
    new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    end(run, 400)
    age(run, time.time())
    gc(root, capsys, "--days", "30")
    assert Run.list(root) == [run.id]


RECIPE = toy.RECIPE + "features: auto\nstages: {first: {}, second: {}}\n"


NAMES = ("read", "idle", "young")


def feature_set(root: str, what: str) -> FeatureSet:
    made = FeatureSet(open_store(root), {"of": what}, [1])
    return FeatureSet(open_store(root).sub(f"features/{made.name}"), made.about, made.ends)


@pytest.fixture
def features(root: str, tmp_path: Path) -> Callable[[], set[str]]:
    """Three sets of features, of which `young` was added to lately, and two orders; tells what is left."""
    sets = {name: feature_set(root, name) for name in NAMES}
    for made in sets.values():
        made.begin()
        made.store.put("view-0/part-000000.json", b"{}")
    orders = {name: extract.order(root, from_yaml(RECIPE), split) for name, split in (("old", []), ("new", ["train"]))}
    keep = {f"features/{sets['young'].name}/view-0/part-000000.json", f"features/orders/{orders['new']}.json"}
    for path in (tmp_path / "store" / "features").rglob("*.json"):
        if path.relative_to(tmp_path / "store").as_posix() not in keep:
            os.utime(path, (0, 0))
    known = {f"features/{made.name}/about.json": name for name, made in sets.items()}
    known |= {f"features/orders/{order}.json": name for name, order in orders.items()}
    return lambda: {known[entry.key] for entry in open_store(root).list("features/") if entry.key in known}


ALL = {"read", "idle", "young", "old", "new"}


def test_old_features_that_no_run_reads_go_when_asked_for(
    new_run: MakeRun, root: str, features: Callable[[], set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, idle = new_run(recipe=RECIPE), feature_set(root, "idle").name
    usage.note(run.store, from_yaml(RECIPE), "first", [feature_set(root, "read").name])
    usage.note(run.store, from_yaml(RECIPE), "second", [])
    gc(root, capsys)
    assert features() == ALL, "features go only when asked for"
    said = gc(root, capsys, "--days", "30", "--dry")
    assert f"would remove features/{idle}, which no run reads" in said
    assert features() == ALL
    gc(root, capsys, "--days", "30")
    assert features() == {"read", "young", "new"}
    assert not list(open_store(root).list(f"features/{idle}/"))
    end(run, 90)
    gc(root, capsys, "--days", "30")
    assert features() == {"young", "new"}, "the run that read them has gone"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [(RECIPE, "it has not begun its stage second"), ("nonsense: 1", "its recipe cannot be read"),
     (RECIPE.replace("auto", "require"), "it has not begun its stage first, or not with its present recipe")],
    ids=["begins", "unread", "changed"],
)
def test_no_features_go_while_a_run_may_come_to_need_them(
    recipe: str, why: str,
    new_run: MakeRun, root: str, features: Callable[[], set[str]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = new_run(recipe=recipe)
    usage.note(run.store, from_yaml(RECIPE), "first", [feature_set(root, "read").name])
    said = gc(root, capsys, "--days", "30")
    assert f"features stay: run {run.id} may need any of them: {why}" in said
    assert features() == ALL


@pytest.mark.parametrize(
    "recipe", ["", RECIPE.replace("features: auto", "features: off")], ids=["cut short", "without features"]
)
def test_runs_that_will_never_read_features_keep_none(
    recipe: str, new_run: MakeRun, root: str, features: Callable[[], set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(recipe=recipe)
    if not recipe:
        run.store.delete("recipe.yaml")
    gc(root, capsys, "--days", "30")
    assert features() == {"young", "new"}


@pytest.mark.parametrize("key", ["transitions/000000.json", "transitions/000009.json", "heartbeat.json", "record.json",
                                 "recipe.yaml", "commits/000001.json", "features/main.json", "holds/000001-x.json",
                                 "checkpoints/00000002-000001/rank-0000.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]", b'{"a": 1}', b"\xff"])
def test_a_damaged_object_of_one_run_does_not_keep_others_from_being_cleared(
    messy: Run, new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str], key: str, content: bytes
) -> None:
    new_run("demo-2", "name: demo\n").store.put(key, content)
    said = gc(root, capsys)
    assert folders(messy) == {"00000004-000001"}
    if key.startswith("transitions"):
        assert f"run demo-2 stays as it is: unreadable: {root}/runs/demo-2/{key}" in said
    gc(root, capsys, "--days", "1")


def test_while_a_run_cannot_be_read_what_it_may_need_stays(
    new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, damaged = new_run("demo-1", "name: demo\n"), new_run("demo-2", "name: demo\n")
    when = time.time() - 10 * 86400
    old.store.put(_key(1), _dump(asdict(Transition(1, State.CANCELLED, when))))
    age(old, when)
    damaged.store.put(_key(1), b"{")
    said = gc(root, capsys, "--days", "1")
    assert "runs stay, however old: run demo-2 may need any of them: unreadable: " in said
    assert "features stay: run demo-" in said
    assert old.exists()
    damaged.store.delete(_key(1))
    gc(root, capsys, "--days", "1")
    assert not old.exists()


@pytest.mark.parametrize(
    "key",
    ["features/embeddings.npy", "features/of-others/about.json", f"features/{'a' * 16}/about.json",
     f"features/{'a' * 16}/x/about.json", f"features/orders/{'a' * 32}.json", "features/orders/list.json"],
)  # fmt: skip
@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000, b'{"fingerprint": "a", "about": {}, "ends": []}', b"\xff"])
def test_features_that_retort_has_not_made_stay(
    key: str, content: bytes, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_store(root).put(key, content)
    os.utime(tmp_path / "store" / key, (0, 0))
    assert "0 found" in gc(root, capsys, "--days", "30")
    assert open_store(root).get(key) == content


def test_features_behind_a_link_stay(
    root: str, features: Callable[[], set[str]], tmp_path: Path, elsewhere: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    elsewhere(tmp_path / "store" / "features" / feature_set(root, "idle").name)
    gc(root, capsys, "--days", "30")
    assert features() == {"idle", "young", "new"}
