"""gc: what goes, what stays, and what is only said."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from core import commits
from core.config import from_yaml
from core.features import usage
from core.storage import open_store
from jobs import cli
from jobs.record import Run, State, Transition, _dump, _key
from tests import toy
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
    for number, state in moves:
        moved = Transition(number, state, time.time() - 86400 * days_ago, 1)
        run.store.put(_key(number), _dump(asdict(moved)))


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
    fresh, stale = (tmp_path / "store" / "runs" / run.id / name for name in (".tmp-fresh", ".tmp-stale"))
    for path in (fresh, stale):
        path.write_bytes(b"half")
    os.utime(stale, (0, 0))
    gc(root, capsys)
    assert (fresh.exists(), stale.exists()) == (True, False)


RECIPE = toy.RECIPE + "features: auto\nstages: {first: {}, second: {}}\n"


@pytest.fixture
def features(root: str, tmp_path: Path) -> Callable[[], set[str]]:
    """Three sets of features, of which `young` was added to lately, and two orders; tells what is left."""
    store = open_store(root).sub("features")
    for name in ("read", "idle", "young"):
        store.put(f"{name}/about.json", b"{}")
        store.put(f"{name}/view-0/part-000000.json", b"{}")
    for name in ("old", "new"):
        store.put(f"orders/{name}.json", b"{}")
    for path in (tmp_path / "store" / "features").rglob("*.json"):
        if not path.match("young/view-0/*") and not path.match("orders/new.json"):
            os.utime(path, (0, 0))
    return lambda: {e.key.removesuffix("/about.json") for e in store.list() if "view-" not in e.key}


ALL = {"read", "idle", "young", "orders/old.json", "orders/new.json"}


def test_old_features_that_no_run_reads_go_when_asked_for(
    new_run: MakeRun, root: str, features: Callable[[], set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(recipe=RECIPE)
    usage.note(run.store, from_yaml(RECIPE), "first", ["read"])
    usage.note(run.store, from_yaml(RECIPE), "second", [])
    gc(root, capsys)
    assert features() == ALL, "features go only when asked for"
    said = gc(root, capsys, "--days", "30", "--dry")
    assert "would remove features/idle, which no run reads" in said
    assert features() == ALL
    gc(root, capsys, "--days", "30")
    assert features() == {"read", "young", "orders/new.json"}
    assert not list(open_store(root).list("features/idle/"))
    end(run, 90)
    gc(root, capsys, "--days", "30")
    assert features() == {"young", "orders/new.json"}, "the run that read them has gone"


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
    usage.note(run.store, from_yaml(RECIPE), "first", ["read"])
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
    assert features() == {"young", "orders/new.json"}


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
    ended = Transition(1, State.CANCELLED, time.time() - 10 * 86400)
    old.store.put(_key(1), _dump(asdict(ended)))
    damaged.store.put(_key(1), b"{")
    said = gc(root, capsys, "--days", "1")
    assert "runs stay, however old: run demo-2 may need any of them: unreadable: " in said
    assert "features stay: run demo-" in said
    assert old.exists()
    damaged.store.delete(_key(1))
    gc(root, capsys, "--days", "1")
    assert not old.exists()
