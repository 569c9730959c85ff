"""Ranges of files, read by several threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.data.files import Files
from core.folder import FileStore

FILES, BYTES = 40, 64  # more files than are kept open at a time


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns so often that they meet inside a read."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switches")
def test_threads_read_more_files_than_are_kept_open_and_get_the_bytes_they_asked_for(tmp_path: Path) -> None:
    for i in range(FILES):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]) * BYTES)
    files = Files(FileStore(tmp_path), None)

    def wrong(start: int) -> list[int]:
        order = [(start + step * 7) % FILES for step in range(1000)]
        return [i for i in order if files.read(f"{i}.tar", BYTES, 0, 0, BYTES) != bytes([i]) * BYTES]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(wrong, range(0, 8 * 5, 5))) == [[]] * 8
