"""What a submission is made from, in an image: there the build has left word of its commit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from jobs import spec
from jobs.launchers import crew
from jobs.launchers.ranks import common_environment, rank_environment
from jobs.placement import Placement
from jobs.spec import Code, code


@pytest.mark.parametrize("built", [Code("c0ffee", False), Code("c0ffee", True)])
def test_an_image_knows_what_it_was_built_from(built: Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_COMMIT", str(built))
    assert code(tmp_path) == built


def test_a_repository_knows_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_COMMIT", "c0ffee")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    found = code(tmp_path)
    assert len(found.commit) == 40
    assert str(found) == found.commit


def test_another_commit_than_was_submitted_is_told_where_both_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "code", lambda: Code("aaa", False))
    assert spec.difference("bbb") == "this is the code of aaa; what it works on was submitted with bbb"
    assert not [wanted for wanted in ("aaa", "", "unknown") if spec.difference(wanted)]
    monkeypatch.setattr(spec, "code", lambda: Code("unknown", False))
    assert not spec.difference("bbb")


ONE = Placement(1, "cpu", 1)


@pytest.mark.parametrize(
    "environment",
    [lambda: {**os.environ, **spec.imports()}, lambda: common_environment(ONE), lambda: rank_environment(0, ONE, 1),
     lambda: crew.environment(0, 1, ONE)],
)  # fmt: skip
def test_what_is_started_imports_nothing_from_the_folder_it_works_in(
    environment: Callable[[], Mapping[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f":{spec.REPOSITORY}::")  # an empty part is the working directory, too
    for name in ("jobs/__init__.py", "jobs/__main__.py", "argparse.py", "core/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('a stranger runs')")
    command = [sys.executable, "-m", "jobs", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m jobs")


def test_the_search_path_does_not_grow_from_process_to_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/own/methods")
    once = spec.imports()
    monkeypatch.setenv("PYTHONPATH", once["PYTHONPATH"])
    assert spec.imports() == once == {"PYTHONPATH": f"{spec.REPOSITORY}:/own/methods", "PYTHONSAFEPATH": "1"}
