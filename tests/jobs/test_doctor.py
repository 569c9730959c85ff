"""doctor: one line per check, a fix beside each that fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.storage import StoreError
from jobs import cli, doctor
from jobs.errors import NOT_READY
from jobs.spec import REPOSITORY


def test_a_machine_and_a_recipe_that_work(tiny_recipe: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(tiny_recipe), "--store", root]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    for line in (
        "packages: ", "store: ", "shared memory: ", "collectives: all-reduce over 2 ranks on cpu",
        "data: 4 samples; 8 of 8 tried", "student: vit_tiny_patch16_224, 0.1 M parameters", "all is well",
    ):  # fmt: skip
        assert line in out


def test_what_does_not_work_is_named_with_its_fix(
    tiny_recipe: Path, photos: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for photo in photos.rglob("*.jpg"):
        photo.write_bytes(b"")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(doctor, "collective", lambda recipe: "not under test")
    options = ["--store", f"file://{tmp_path}/file", "--set", "student.name=vit_of_nobody"]
    assert cli.main(["doctor", str(tiny_recipe), *options]) == NOT_READY
    out = capsys.readouterr().out
    assert "FAIL  store: " in out
    assert "none of 8 samples can be decoded" in out
    assert "FAIL  student: " in out
    assert out.count("->") == out.count("FAIL") == 3
    assert "3 to mend" in out


def test_packages_are_compared_with_the_lock_file(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    import timm

    lock.write_text(f"timm=={timm.__version__} \\\n    --hash=sha256:00\n")
    assert doctor.packages(lock).fix == ""
    lock.write_text("timm==0.0.1 \\\n    --hash=sha256:00\nno-such-package==1.0 \\\n    --hash=sha256:00\n")
    finding = doctor.packages(lock)
    assert finding.fix == "make setup"
    assert f"timm {timm.__version__} instead of 0.0.1" in finding.text
    assert "no-such-package missing instead of 1.0" in finding.text


def test_too_little_room_is_a_failure(tmp_path: Path) -> None:
    assert doctor.disk("disk", tmp_path, 0, "fix").fix == ""
    assert "fix" in doctor.disk("disk", tmp_path, 1e9, "fix").fix


def test_a_quick_look_needs_no_torch_and_no_store() -> None:
    code = "import sys; from jobs.cli import main; end = main(sys.argv[1:]); sys.exit('torch' in sys.modules or end)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, "doctor", "--quick", "--store", "file:///proc/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "ok    python", "ok    packages", "ok    disk", "ok    shared memory", "all is well",
    ]  # fmt: skip


def test_a_quick_look_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "SHM_GB", 1e9)
    assert cli.main(["doctor", "--quick"]) == NOT_READY
    assert "FAIL  shared memory" in capsys.readouterr().out


def test_temporary_folders_of_somebody_else_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"retort-spool-{os.getuid()}"
    planted.symlink_to(tmp_path)
    with pytest.raises(StoreError, match=f"{planted}: it is a link"):
        doctor.folders(None)
    planted.unlink()
    assert doctor.folders(None) == str(tmp_path)


def test_a_temporary_directory_too_long_for_sockets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("j" * 76)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert re.fullmatch(f"{long}; sockets in /[a-z/]+, as its name is too long for them", doctor.folders(None))
