"""Folders of a machine: from the command or the machine's environment, never from a store."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from core import machine
from core.config import fingerprint, from_yaml, to_yaml
from core.recipe import Checkpoint, Loader, Method, Recipe

NAMED = Recipe(
    name="demo", method=Method("unic"), loader=Loader(workers=3, cache_dir="/nvme/cache"),
    checkpoint=Checkpoint(keep=7, spool="/nvme/spool"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.FIELDS:
        monkeypatch.delenv(name, raising=False)


def test_no_field_that_names_a_folder_has_been_forgotten() -> None:
    groups = yaml.safe_load(to_yaml(Recipe()))
    suspects = {(group, field) for group in ("launch", "loader", "checkpoint", "log", "zero") for field, value
                in groups[group].items() if isinstance(value, str)}  # fmt: skip
    assert suspects - {("launch", "launcher"), ("launch", "device")} == set(machine.FIELDS.values())


def test_folders_are_not_stored() -> None:
    stored = to_yaml(NAMED)
    assert "nvme" not in stored
    assert (from_yaml(stored).loader.workers, from_yaml(stored).checkpoint.keep) == (3, 7), "what else there is stays"
    assert fingerprint(from_yaml(stored)) == fingerprint(NAMED)


def test_folders_that_a_store_names_are_not_obeyed() -> None:
    content = yaml.safe_load(to_yaml(NAMED))
    content["loader"]["cache_dir"], content["checkpoint"]["spool"] = "/home/victim", "/home/victim"
    read = from_yaml(yaml.safe_dump(content))
    assert (read.loader.cache_dir, read.checkpoint.spool) == ("", "")


def test_a_command_s_folders_come_before_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.folder(machine.CACHE, "") == ""
    monkeypatch.setenv("RETORT_CACHE", "/scratch")
    assert machine.folder(machine.CACHE, "") == "/scratch"
    assert machine.folder(machine.CACHE, "/nvme") == "/nvme"


def test_folders_travel_as_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert machine.named(NAMED) == {"RETORT_CACHE": "/nvme/cache", "RETORT_SPOOL": "/nvme/spool"}
    relative = replace(NAMED, loader=Loader(cache_dir="cache"), checkpoint=Checkpoint())
    assert machine.named(relative) == {"RETORT_CACHE": f"{tmp_path}/cache"}


def test_they_are_told_for_as_long_as_the_command_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_SPOOL", "/before")
    with machine.told(NAMED):
        assert (os.environ["RETORT_CACHE"], os.environ["RETORT_SPOOL"]) == ("/nvme/cache", "/nvme/spool")
    assert ("RETORT_CACHE" in os.environ, os.environ["RETORT_SPOOL"]) == (False, "/before")
