"""What a submission is made from, in an image: there the build has left word of its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs import spec
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
