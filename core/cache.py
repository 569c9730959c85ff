"""Shards on the node's own disk: downloaded once for all its processes, verified, and dropped when space is needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import google_crc32c

from core.storage import Store, StoreError

PART = ".part"  # a folder holding one unfinished download
STRIPES = 2  # hexadecimal digits: 256 lock files, however many shards come and go


class ShardCache:
    """A folder shared by any number of processes, kept below `limit_bytes` by dropping what was fetched longest ago.

    Open what `fetch` returns at once: another process may drop the name at any time (an open file stays readable). On
    `FileNotFoundError`, fetch again. Files are named by store, key and checksum, so a rewritten shard is another file.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes

    def fetch(self, store: Store, key: str, size: int, crc: int) -> Path:
        """Local copy of `key`, whose size in bytes and CRC32C are known.

        Raises `StoreError` if it does not fit, cannot be had, or is corrupt in the store (two downloads were wrong).
        """
        uri = f"{store.uri}/{key}"
        name = f"{hashlib.sha256(uri.encode()).hexdigest()[:40]}-{crc:08x}"
        path = self.folder / name
        if size > self.limit_bytes:
            limit = f"the shard cache {self.folder} may hold {self.limit_bytes}"
            raise StoreError(f"{uri} has {size} bytes, {limit}: raise its limit or write smaller shards")
        if not _used(path, size):
            with self._lock(name[:STRIPES]):
                if not _used(path, size):  # else another process was faster
                    self._make_room(size)
                    self._download(store, key, size, crc, path)
            self._make_room(0, keep=name)
        return path

    def _download(self, store: Store, key: str, size: int, crc: int, path: Path) -> None:
        part = path.with_name(path.name + PART)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            for _ in range(2):
                store.get_file(key, part / path.name)
                found = _measured(part / path.name)
                if found == (size, crc):
                    _used(part / path.name, size)
                    os.replace(part / path.name, path)
                    return
        finally:
            shutil.rmtree(part, ignore_errors=True)
        wrong = f"expected (size, CRC32C) {(size, crc)}, two downloads gave {found}"
        raise StoreError(f"{store.uri}/{key} is corrupt: {wrong}: write it again")

    def _make_room(self, need: int, keep: str = "") -> None:
        with self._lock("room"):
            self._reap()
            files = sorted(_files(self.folder), key=lambda file: file[1].st_mtime_ns)
            excess = sum(stat.st_size for _, stat in files) + need - self.limit_bytes
            for path, stat in files:
                if excess > 0 and path.parent == self.folder and path.name != keep:
                    path.unlink(missing_ok=True)
                    excess -= stat.st_size

    def _reap(self) -> None:
        """Removes what killed processes have left half downloaded."""
        for part in self.folder.glob(f"*{PART}"):
            with suppress(BlockingIOError), self._lock(part.name[:STRIPES], fcntl.LOCK_NB):
                shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _lock(self, name: str, flags: int = 0) -> Iterator[None]:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | flags)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # said aloud: a process forked meanwhile holds the same open file


def _used(path: Path, size: int) -> bool:
    """Whether the file is there; marks it as used now."""
    try:
        now = time.time_ns()  # the kernel's own stamps are a few milliseconds coarse
        os.utime(path, ns=(now, now))
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Finished files and those in unfinished downloads, which count although they cannot be dropped."""
    found = []
    for path in [*folder.glob("*"), *folder.glob(f"*{PART}/*")]:
        with suppress(FileNotFoundError):
            if path.is_file():
                found.append((path, path.stat()))
    return found


def _measured(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC32C."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = int(google_crc32c.extend(crc, chunk))
            size += len(chunk)
    return size, crc
