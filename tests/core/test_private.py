"""Folders and locks that nobody else of the machine can read, write or plant."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from core.private import flaw, locked, own_folder, private_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_folder_is_made_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert mode(private_folder(tmp_path / "a" / "b")) == 0o700
    finally:
        os.umask(before)
    assert private_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"


def test_an_own_folder_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    assert flaw(tmp_path / "open") == ""
    assert mode(private_folder(tmp_path / "open")) == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o720, 0o702])
def test_a_folder_that_others_may_write_is_refused_as_it_is(tmp_path: Path, bits: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(bits)
    with pytest.raises(PermissionError, match=f"others may write to it .mode {bits:o}.*chmod 700"):
        private_folder(tmp_path / "open")
    assert mode(tmp_path / "open") == bits


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 2**20)
    with pytest.raises(PermissionError, match=r"belongs to user \d+, not to you .1048576.*folder of your own.*TMPDIR"):
        private_folder(tmp_path / "theirs")


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_link_is_refused_and_what_it_leads_to_left_alone(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(PermissionError, match="it is a link"):
        private_folder(tmp_path / "link")
    assert mode(tmp_path / "there") == 0o755
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PermissionError, match="it is no folder"):
        private_folder(tmp_path / "file")


def test_names_in_the_temporary_directory_are_this_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert own_folder("shards") == tmp_path / f"retort-shards-{os.getuid()}"


def test_a_lock_is_private_and_keeps_what_is_in_its_file(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        assert mode(tmp_path / "lock") == 0o600
    (tmp_path / "lock").write_text("kept")
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock", fcntl.LOCK_NB):
        pass
    with locked(tmp_path / "lock", fcntl.LOCK_NB):
        assert (tmp_path / "lock").read_text() == "kept"


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"
