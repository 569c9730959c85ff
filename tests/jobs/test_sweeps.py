"""Sweeps: what is declared, what is submitted, and what is never done twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from core.storage import open_store
from jobs import cli
from jobs.errors import UserError
from jobs.launchers import local
from jobs.record import Run, State
from jobs.verbs.sweeps import expand
from tests.jobs.conftest import fake_worker


@pytest.mark.parametrize(
    ("text", "members"),
    [("a=1,2", [("a=1",), ("a=2",)]),
     ("a=1,2 b=3,4", [("a=1", "b=3"), ("a=1", "b=4"), ("a=2", "b=3"), ("a=2", "b=4")]),
     ("a=[1,2],[3] b=x", [("a=[1,2]", "b=x"), ("a=[3]", "b=x")]),
     ("'a={x: 1, y: 2},{x: 3}'", [("a={x: 1, y: 2}",), ("a={x: 3}",)])],
)  # fmt: skip
def test_every_combination_is_a_member(text: str, members: list[tuple[str, ...]]) -> None:
    assert expand(text) == members


@pytest.mark.parametrize(
    ("text", "words"),
    [("a", "not FIELD=VALUE"), ("=1", "not FIELD=VALUE"), ("a={x: 1}", "not FIELD=VALUE"), ("'a=1", "quotation")],
)
def test_what_is_no_sweep_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        expand(text)


Sweep = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sweep(tiny_recipe: Path, root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(local.LAUNCHER, "worker", fake_worker("ok"))
    monkeypatch.setattr(local.LAUNCHER, "preload", ())

    def run(text: str, *options: str) -> tuple[int, str, str]:
        arguments = ["submit", str(tiny_recipe), "--launcher", "local", "--store", root, "--sweep", text, *options]
        code = cli.main(arguments)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_missing_members_are_run_and_existing_ones_are_not_run_again(
    sweep: Sweep, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = sweep("train.lr=1e-3,2e-3")
    assert code == 0
    name = out.strip().splitlines()[-1].removeprefix("sweep: ")
    assert len(Run.list(root)) == 2
    assert all(Run(root, run).last().state == State.SUCCEEDED for run in Run.list(root))
    code, out, _ = sweep("train.lr=1e-3,2e-3,3e-3")
    assert out.count("is already done") == 2
    assert len(Run.list(root)) == 3
    assert cli.main(["status", "--sweep", name, "--store", root]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"tiny-\w+ +[12]e-3 +succeeded +1 +5", table)) == 2, table


def test_a_dry_sweep_says_which_runs_it_would_make(sweep: Sweep, root: str) -> None:
    code, out, _ = sweep("train.lr=1e-3,2e-3", "--dry")
    assert code == 0
    assert len(re.findall(r"tiny-\w+  train.lr=[12]e-3", out)) == 2
    assert Run.list(root) == []


def test_values_that_make_no_difference_are_refused(sweep: Sweep, root: str) -> None:
    code, _, error = sweep("loader.workers=0,1")
    assert code == 2
    assert "are the same run" in error
    assert Run.list(root) == []


def test_a_wrong_field_is_named_before_anything_is_queued(sweep: Sweep, root: str) -> None:
    code, _, error = sweep("train.lr=1e-3 train.rl=1,2")
    assert code == 2
    assert "did you mean" in error
    assert Run.list(root) == []


def test_an_unknown_sweep_is_told_with_those_that_there_are(
    sweep: Sweep, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("train.lr=1e-3")
    assert cli.main(["status", "--sweep", "tiny-sweep-0", "--store", root]) == 2
    assert "there is: tiny-sweep-" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"{}", b'{"runs": 3}', b'{"runs": {"../x": ["a=1"]}}',
                                     b'{"runs": {"demo-1": ["a"]}}', b'{"runs": {"demo-1": 3}}'])  # fmt: skip
def test_a_damaged_sweep_is_named(root: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(root).put("sweeps/tiny-sweep-1.json", content)
    assert cli.main(["status", "--sweep", "tiny-sweep-1", "--store", root]) == 3
    assert f"error: unreadable: {root}/sweeps/tiny-sweep-1.json: " in capsys.readouterr().err


@pytest.mark.parametrize("key", ["transitions/000003.json", "evaluations/knn.json"])
def test_a_damaged_member_is_a_row(root: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo-1", "demo-2"):
        run = Run(root, name)
        run.create("", {})
        for state in (State.QUEUED, State.RUNNING, State.SUCCEEDED):
            run.move(state, 1)
    run.store.put(key, b"[" * 100_000)
    about = {"runs": {"demo-1": ["a=1"], "demo-2": ["a=2"]}}
    open_store(root).put("sweeps/tiny-sweep-1.json", json.dumps(about).encode())
    assert cli.main(["status", "--sweep", "tiny-sweep-1", "--store", root]) == 0
    out = capsys.readouterr().out
    assert re.search(r"demo-1 +1 +succeeded", out)
    assert re.search(rf"demo-2 +2 +unreadable: {run.uri}/{key}: ", out)
