"""The Makefile: values reach Python exactly as given, and nothing in them is ever run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs import cli
from jobs.spec import REPOSITORY

RECORDER = """#!/bin/sh
[ "$1" = jobs/bootstrap.py ] && exit 0
printf '%s\\n' "$@" > "$SEEN.arguments"
env -0 > "$SEEN"
exit ${CODE:-0}
"""
NASTY = [
    "a b", "it's", 'say "hi"', "$(touch {marker})", "$(shell touch {marker})", "`touch {marker}`",
    "x; touch {marker}", "a & touch {marker}", "$$HOME ${HOME}", "a.b='c d' e=\"f g\"",
    "100%", "#no comment", "back\\slash", "a|b>c<d", "=x",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile beside an interpreter that writes down what it is called with."""
    folder = tmp_path / "project"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    shutil.copy(REPOSITORY / "Makefile", folder)
    return folder


def make(project: Path, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run make with the recorder as its Python; returns what became of it and the environment Python saw."""
    record = project / "record"
    record.unlink(missing_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    own = {**keep, **variables, "SEEN": str(record)}
    done = subprocess.run(
        ["make", f"PYTHON={project}/.venv/bin/python", *words], cwd=project, env=own, capture_output=True, text=True
    )
    pairs = record.read_text().split("\0") if record.exists() else []
    return done, dict(pair.split("=", 1) for pair in pairs if pair)


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_values_arrive_as_they_are_and_are_not_run(project: Path, value: str, way: str) -> None:
    marker = project / "marker"
    value = value.replace("{marker}", str(marker))
    given = {"RECIPE": value, "SET": value}
    if way == "argument":
        done, seen = make(project, "submit", *(f"{name}={text}" for name, text in given.items()))
    else:
        done, seen = make(project, "submit", **given)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    assert (seen["RECIPE"], seen["SET"]) == (value, value)
    assert (project / "record.arguments").read_text().split() == ["-m", "jobs", "submit"]


@pytest.mark.parametrize("verb", ["submit", "demo", "bench"])
def test_commands_take_their_code_from_the_makefile_s_folder_alone(project: Path, verb: str) -> None:
    _, seen = make(project, verb, PYTHONPATH="/own/methods")
    assert (seen["PYTHONSAFEPATH"], seen["PYTHONPATH"]) == ("1", f"{project}:/own/methods")
    _, seen = make(project, verb)
    assert seen["PYTHONPATH"] == str(project)


def test_every_option_of_the_command_line_is_passed_on(project: Path) -> None:
    names = {name.upper() for verb in cli.VERBS.values() for name in (*verb.takes, *verb.options)}
    _, seen = make(project, "submit", *(f"{name}=v-{name}" for name in names))
    assert {name: seen.get(name) for name in names} == {name: f"v-{name}" for name in names}


def test_every_verb_has_its_target(project: Path) -> None:
    for verb in cli.VERBS:
        done, seen = make(project, verb)
        assert done.returncode == 0, done.stderr
        assert (project / "record.arguments").read_text().split() == ["-m", "jobs", verb]


def test_soak_hands_its_numbers_on_as_they_are(project: Path) -> None:
    marker = project / "marker"
    done, _ = make(project, "soak", f"RUNS=$(shell touch {marker})", "SEED=`id`", CODE="2")
    assert not marker.exists()
    arguments = (project / "record.arguments").read_text().splitlines()
    assert arguments == ["-m", "tests.system.soak", "--runs", f"$(shell touch {marker})", "--seed", "`id`"]
    assert "Error 2" in done.stderr


def test_the_code_of_a_command_is_shown(project: Path) -> None:
    done, _ = make(project, "submit", CODE="75")
    assert "Error 75" in done.stderr


def test_help_is_the_default_and_needs_no_set_up(project: Path) -> None:
    shutil.rmtree(project / ".venv")
    done, _ = make(project)
    assert done.returncode == 0
    for target in [*cli.VERBS, "setup", "test", "test-system", "soak", "packages", "lint"]:
        assert f" {target} " in done.stdout, target
