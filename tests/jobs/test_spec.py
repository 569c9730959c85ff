"""What a submission is made from, in an image: there the build has left word of its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

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
