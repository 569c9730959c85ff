from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from core.atomic import TEMP
from core.spool import Spool
from core.storage import open_store
from tests.core.logs import a_run


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(f"{tmp_path}/spool", a_run(tmp_path))


def test_a_file_is_kept_under_the_key_that_it_will_have(spool: Spool) -> None:
    path = spool.write("checkpoints/1/rank-0000.json", b"about")
    assert path == spool.folder / "checkpoints/1/rank-0000.json"
    assert path.read_bytes() == b"about"
    spool.write("checkpoints/1/rank-0000.json", memoryview(b"other"))
    assert path.read_bytes() == b"other"
    assert spool.keys() == ["checkpoints/1/rank-0000.json"]


def test_descriptions_come_behind_all_that_they_describe(spool: Spool) -> None:
    wanted = ["checkpoints/1/rank-0000.safetensors", "metrics/1.jsonl", "checkpoints/1/rank-0000.json",
              "checkpoints/2/rank-0000.json", "checkpoints/2/rank-0000.safetensors"]  # fmt: skip
    for key in wanted:
        spool.write(key, b"x")
    found = spool.keys()
    assert sorted(found) == sorted(wanted)
    assert [key.endswith(".json") for key in found] == [False, False, False, True, True]


def test_a_file_that_is_being_written_is_not_there_yet(spool: Spool) -> None:
    spool.write("a/whole", b"x")
    (spool.folder / "a" / f"{TEMP}123-part").write_bytes(b"torn")
    assert spool.keys() == ["a/whole"]


def test_what_a_killed_write_has_left_goes_once_it_is_old(spool: Spool) -> None:
    whole = spool.write("a/whole", b"x")
    for name, age_s in (("1-new", 60), ("2-old", 4000)):
        temp = whole.with_name(f"{TEMP}{name}")
        temp.write_bytes(b"torn")
        os.utime(temp, (time.time() - age_s,) * 2)
    os.utime(whole, (0, 0))
    spool.tidy()
    assert sorted(os.listdir(whole.parent)) == [f"{TEMP}1-new", "whole"]


def test_a_failed_write_leaves_the_file_before_and_no_rest(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spool.write("a/b", b"good")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(bytes(data[:1]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        spool.write("a/b", b"torn")
    assert path.read_bytes() == b"good"
    assert os.listdir(path.parent) == ["b"]


def test_a_removal_leaves_no_empty_folders_and_nothing_else_goes(spool: Spool) -> None:
    for key in ("checkpoints/1/a", "checkpoints/1/b", "checkpoints/2/a"):
        spool.write(key, b"x")
    spool.remove("checkpoints/1/a")
    assert spool.keys() == ["checkpoints/1/b", "checkpoints/2/a"]
    spool.remove("checkpoints/1/b")
    assert not (spool.folder / "checkpoints/1").exists()
    spool.remove("checkpoints/2/a")
    spool.remove("checkpoints/2/a")
    assert not spool.folder.exists()
    assert spool.keys() == []
    spool.write("checkpoints/1/a", b"again")
    assert spool.keys() == ["checkpoints/1/a"]


def test_every_run_has_a_folder_of_its_own_that_others_may_not_enter(tmp_path: Path) -> None:
    runs = [open_store(f"file://{tmp_path}/runs/{name}") for name in ("a", "b")]
    first, second = (Spool(str(tmp_path / "spool"), run) for run in runs)
    first.write("key", b"x")
    assert second.keys() == []
    assert Spool(str(tmp_path / "spool"), runs[0]).keys() == ["key"]
    assert first.folder.stat().st_mode & 0o777 == 0o700


def test_without_a_folder_of_its_own_it_lies_in_the_user_s_temporary_one(tmp_path: Path) -> None:
    folder = Spool("", a_run(tmp_path)).folder
    assert folder.parent == Path(tempfile.gettempdir()) / f"retort-spool-{os.getuid()}"


def test_what_somebody_else_has_planted_is_not_read(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.write("checkpoints/1/rank-0000.json", b"mine")
    monkeypatch.setattr(os, "getuid", lambda: 2**20)
    assert spool.keys() == []
    monkeypatch.undo()
    elsewhere = spool.folder.with_name("elsewhere")
    spool.folder.rename(elsewhere)
    spool.folder.symlink_to(elsewhere)
    assert spool.keys() == []


def test_a_base_that_is_no_folder_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Not a directory|File exists"):
        Spool(str(tmp_path / "file"), a_run(tmp_path)).write("a", b"x")


def test_nothing_is_written_through_a_link_or_into_a_folder_that_others_can_write(spool: Spool, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o755)
    spool.folder.parent.mkdir()
    spool.folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="it is a link"):
        spool.write("a", b"x")
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path / "theirs") == []
    spool.folder.unlink()
    spool.folder.mkdir()
    spool.folder.chmod(0o777)
    (spool.folder / "planted").write_bytes(b"x")
    assert spool.keys() == []
    with pytest.raises(PermissionError, match="others may write"):
        spool.write("a", b"x")


def test_the_temporary_base_is_private_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool("", a_run(tmp_path))
    spool.write("a", b"x")
    base = spool.folder.parent
    assert base.stat().st_mode & 0o777 == 0o700
    base.chmod(0o777)
    assert spool.keys() == []
    with pytest.raises(PermissionError, match="others may write"):
        spool.write("b", b"x")
