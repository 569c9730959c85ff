"""Sockets of loader processes, however long the name of the temporary directory."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from core import sockets
from core.data.loader import in_workers
from core.storage import StoreError


class Doubles(Dataset[torch.Tensor]):
    def __getitem__(self, task: int) -> torch.Tensor:
        return torch.full((1000,), 2 * task)


@pytest.fixture
def long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of 90 characters, in a process that has opened no socket yet."""
    folder = tmp_path / ("j" * max(1, 90 - len(f"{tmp_path}/")))
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = config.pop("tempdir", None)
    yield folder
    config.pop("tempdir", None)
    if before:
        config["tempdir"] = before


def test_loader_processes_send_tensors_where_the_temporary_directory_has_a_long_name(long: Path) -> None:
    loader = in_workers(Doubles(), range(3), workers=1, prefetch=1)
    Listener(family="AF_UNIX").close()
    assert [int(item[0]) for item in loader] == [0, 2, 4]
    assert tempfile.gettempdir() == str(long), "files go where they always went"
    assert Path(util.get_temp_dir()).stat().st_mode & 0o777 == 0o700


def test_a_name_that_fits_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert sockets.place() == "/tmp"
    exact = tmp_path / ("é" * ((sockets.LONGEST - len(f"{tmp_path}/")) // 2))
    exact.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(exact))
    assert sockets.place() == str(exact)
    (tmp_path / f"{exact.name}éé").mkdir()
    monkeypatch.setattr("tempfile.tempdir", f"{exact}éé")
    assert sockets.place() in sockets.SHORT, "bytes count, not characters"


def test_without_a_short_place_it_says_what_to_do(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "SHORT", ("/proc/nowhere",))
    with pytest.raises(
        StoreError, match=r"TMPDIR: .* has \d+ bytes, more than the 75 .*set a shorter one, or loader"
    ):
        sockets.shorten()
