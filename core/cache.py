"""Shards on the node's own disk: downloaded once for all its processes, verified, and dropped when space is needed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import psutil

from core.private import flaw, locked, private_folder
from core.storage import PIECE, Store, StoreError, crc32c, local_errors

PART = ".part"  # a folder holding one unfinished download
OURS = re.compile(rf"[0-9a-f]{{40}}-[0-9a-f]{{8}}({re.escape(PART)})?")  # other names are never touched
LOCKS, MARK = "locks", "locks/retort-shards"  # the mark says that the folder is a cache
STRIPES = 3  # hexadecimal digits: 4096 lock files, however many shards come and go
HELD_S = 60.0  # what was fetched or marked so recently is in use: it makes no room for what is fetched ahead


class CacheFull(StoreError):  # noqa: N818 (says what is the matter)
    """All that is in the cache is in use."""


class _Wanted(NamedTuple):
    """What is to be in the cache, and where."""

    store: Store
    key: str
    size: int
    crc: int
    path: Path

    def is_in(self, path: Path) -> bool:
        """Whether a file has the size and the checksum."""
        size = crc = 0
        with path.open("rb", buffering=0) as file:
            while data := file.read(PIECE):
                size, crc = size + len(data), crc32c(data, crc)
        return (size, crc) == (self.size, self.crc)


class ShardCache:
    """A folder shared by this user's processes, kept below `limit_bytes` by dropping what was fetched longest ago.

    Open what `fetch` returns at once: another process may drop the name at any time (an open file stays readable). On
    `FileNotFoundError`, fetch again. Files are named by store, key and checksum, so a rewritten shard is another file.
    A file's time of change says when it was used last. Nothing is flushed to the disk: what has not been used since
    the machine started, and so may never have got there, is verified again. A folder that holds anything else, or that
    others could write to, is refused, and names that are not a cache's are never touched.

    ahead: how many shards a reader has fetched before it needs them.
    """

    def __init__(self, folder: Path, limit_bytes: int, ahead: int = 0) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.ahead = ahead

    def check(self) -> None:
        """Raises StoreError where the folder cannot be this user's cache; makes and changes nothing."""
        with self._errors():
            self._claim(make=False)

    def fetch(self, store: Store, key: str, size: int, crc: int) -> Path:
        """Local copy of `key`, whose size in bytes and CRC32C are known.

        Raises `StoreError` if it does not fit, cannot be had, or is corrupt in the store (two downloads were wrong).
        """
        wanted = self._wanted(store, key, size, crc)
        with self._errors():
            self._claim()
            if not _used(wanted.path, size):
                with self._lock(wanted.path.name[:STRIPES]):
                    if not self._has(wanted):  # else another process was faster
                        fits = self._reserve(wanted)
                        self._download(wanted)
                        if not fits:
                            self._trim(wanted.path)
        return wanted.path

    def fetch_ahead(self, store: Store, key: str, size: int, crc: int) -> bool:
        """Fetch what will be needed soon, or mark it as in use if it is there; whether it was downloaded.

        Left alone if another process is at it.  Raises `CacheFull` if only files in use could make room; `StoreError`.
        """
        wanted = self._wanted(store, key, size, crc)
        with self._errors():
            self._claim()
            if not _used(wanted.path, size):
                with suppress(BlockingIOError), self._lock(wanted.path.name[:STRIPES], fcntl.LOCK_NB):
                    if not self._has(wanted):
                        if not self._reserve(wanted, ahead=True):
                            raise CacheFull(f"{self.folder}: no room for {wanted.path.name}: raise loader.cache_gb")
                        self._download(wanted)
                        return True
        return False

    def _wanted(self, store: Store, key: str, size: int, crc: int) -> _Wanted:
        uri = f"{store.uri}/{key}"
        if size > self.limit_bytes:
            limit = f"the shard cache {self.folder} may hold {self.limit_bytes}"
            raise StoreError(f"{uri} has {size} bytes, {limit}: raise loader.cache_gb or write smaller shards")
        name = f"{hashlib.sha256(uri.encode()).hexdigest()[:40]}-{crc:08x}"
        return _Wanted(store, key, size, crc, self.folder / name)

    def _claim(self, make: bool = True) -> None:
        """Make the folder this user's cache, or see that it is one: anybody may have been faster in a shared place."""
        mark = self.folder / MARK
        marked = mark.exists()
        found = os.listdir(self.folder) if not marked and self.folder.is_dir() else []
        if foreign := sorted(name for name in found if name != LOCKS and not OURS.fullmatch(name)):
            raise StoreError(f"shard cache {self.folder}: it holds what is not Retort's, such as {foreign[0]}: name an "
                             "empty or a new folder in loader.cache_dir or RETORT_CACHE")  # fmt: skip
        if make:
            private_folder(self.folder)
            if not marked:
                private_folder(self.folder / LOCKS)
                mark.touch(0o600)
        elif wrong := flaw(self.folder):
            raise PermissionError(errno.EPERM, wrong)

    def _has(self, wanted: _Wanted) -> bool:
        """Whether the file is there, and whole if this machine has restarted since it came.  Under the file's lock."""
        if _used(wanted.path, wanted.size):
            return True
        with suppress(FileNotFoundError):
            if wanted.path.stat().st_size == wanted.size and wanted.is_in(wanted.path):
                _mark(wanted.path)
                return True
        return False

    def _download(self, wanted: _Wanted) -> None:
        part = _part(wanted.path)
        try:
            for _ in range(2):
                with part.open("r+b") as file:
                    found = wanted.store.load(wanted.key, file, wanted.size)
                if found == (wanted.size, wanted.crc):
                    _mark(part)
                    os.replace(part, wanted.path)
                    return
        finally:
            shutil.rmtree(part.parent, ignore_errors=True)
        wrong = f"expected (size, CRC32C) {(wanted.size, wanted.crc)}, two downloads gave {found}"
        raise StoreError(f"{wanted.store.uri}/{wanted.key} is corrupt: {wrong}: write it again")

    def _reserve(self, wanted: _Wanted, ahead: bool = False) -> bool:
        """Make room and take it, as an empty file of the size; whether that keeps to the limit.

        ahead: drop nothing that may be in use, and take no room beyond the limit; else it is taken in any case, as
        what is coming in at the moment cannot be dropped.
        """
        part = _part(wanted.path)
        with self._lock("room"):
            self._reap()
            shutil.rmtree(part.parent, ignore_errors=True)  # left by a killed process: we hold the file's lock
            fits = self._drop(wanted.size, time.time_ns() - int(HELD_S * 1e9) if ahead else None)
            if fits or not ahead:
                part.parent.mkdir()
                with part.open("wb") as file:
                    file.truncate(wanted.size)
        return fits

    def _trim(self, keep: Path) -> None:
        """Back to the limit, now that more has come in at once than it allows."""
        with self._lock("room"):
            self._drop(0, keep=keep)

    def _drop(self, need: int, before_ns: int | None = None, keep: Path | None = None) -> bool:
        """Drop what was used longest ago until `need` bytes fit; whether they do.

        before_ns: drop nothing that has been used since, and nothing at all where that would not be enough.
        """
        files = list(_files(self.folder))
        excess = sum(stat.st_size for _, stat in files) + need - self.limit_bytes
        old = [(stat.st_mtime_ns, stat.st_size, path) for path, stat in files if path.parent == self.folder]
        old = [file for file in old if file[2] != keep and (before_ns is None or file[0] < before_ns)]
        fits = excess <= sum(size for _, size, _ in old)
        for _, size, path in sorted(old) if fits or before_ns is None else ():
            if excess > 0:
                path.unlink(missing_ok=True)
                excess -= size
        return fits

    def _reap(self) -> None:
        """Removes what killed processes have left half downloaded."""
        for part in [path for path in self.folder.glob(f"*{PART}") if OURS.fullmatch(path.name)]:
            with suppress(BlockingIOError), self._lock(part.name[:STRIPES], fcntl.LOCK_NB):
                shutil.rmtree(part, ignore_errors=True)

    def _lock(self, name: str, flags: int = 0) -> AbstractContextManager[None]:
        return locked(self.folder / LOCKS / name, flags)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with local_errors(f"shard cache {self.folder}"):
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                advice = "free space, lower loader.cache_gb, or set loader.cache_dir to a larger disk"
                raise StoreError(f"shard cache {self.folder}: {error.strerror}: {advice}") from error


def _part(path: Path) -> Path:
    """Where a file lies while it comes in."""
    return path.with_name(path.name + PART) / path.name


def _mark(path: Path) -> None:
    """As used now."""
    now = time.time_ns()  # the kernel's own stamps are a few milliseconds coarse
    os.utime(path, ns=(now, now))


@lru_cache(maxsize=1)
def _machine_start() -> float:
    return float(psutil.boot_time())


def _used(path: Path, size: int) -> bool:
    """Whether the file is there and has been used since this machine started; marks it as used now."""
    try:
        stat = path.stat()
        if stat.st_size != size or not _machine_start() < stat.st_mtime < time.time() + HELD_S:
            return False
        _mark(path)
        return True
    except FileNotFoundError:
        return False


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Finished files and those of unfinished downloads, which count although they cannot be dropped."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # a download may end, and its folder go, meanwhile
        for entry in entries:
            with suppress(FileNotFoundError):
                ours = OURS.fullmatch(entry.name)
                if ours and entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path))
                elif ours and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat()
