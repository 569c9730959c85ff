"""The folder side of `core.storage`: every object is a file."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from core.atomic import OWN_TEMP, TEMP, publish
from core.storage import ABSENT, PIECE, Entry, Store, check_key, check_prefix, check_range, crc32c, local_errors


class FileStore(Store):
    """Objects as files below a folder, which the first put creates.

    home: no link below this folder is listed, or followed to delete.
    """

    def __init__(self, root: Path, home: Path | None = None) -> None:
        self.root, self.home = root, home
        self.uri = "file://" + str(root).replace("%", "%25").rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        with local_errors(self._where(key)):
            publish(self._path(key), lambda file: file.write(data))

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source, local_errors(self._where(key)):
            publish(self._path(key), lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with local_errors(self._where(key)):
            return publish(self._path(key), lambda file: file.write(data), exclusive=True)

    def get(self, key: str) -> bytes:
        with local_errors(self._where(key), *ABSENT):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, size: int) -> bytes:
        check_range(start, size)
        with local_errors(self._where(key), *ABSENT), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
        with local_errors(self._where(key), *ABSENT):
            source = self._path(key).open("rb", buffering=0)
        size = crc = 0
        with source:
            while data := source.read(PIECE):
                file.write(data)
                size, crc = size + len(data), crc32c(data, crc)
        return size, crc

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with local_errors(self._where(key)), suppress(*ABSENT):
            return path.stat().st_size if path.is_file() else None
        return None

    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        folder, _, _ = check_prefix(prefix).rpartition("/")
        with local_errors(self._where(prefix)):
            start = self.root / folder
            if self.home is None or not _has_link(start, self.home):
                links = self.home is None
                yield from _walk(start, f"{folder}/" if folder else "", prefix, after, (), links)

    def delete(self, *keys: str) -> None:
        for path in [self._path(key) for key in keys]:
            with local_errors(str(path)), suppress(*ABSENT):
                path.unlink() if self.home is None else _unlink_below(self.home, path)
                self._prune(path.parent)

    def abandoned(self, older_s: float, own: Callable[[str], bool], remove: bool) -> int:
        with local_errors(self.uri):
            temps = [path for path in _temps(self.root) if own(path.relative_to(self.root).as_posix())]
            limit = self.now() - older_s if temps else 0.0
            found = [path for path in temps if path.lstat().st_mtime <= limit]
            for path in found if remove else ():
                with suppress(*ABSENT):
                    _unlink_below(self.root, path)
        return len(found)

    def now(self) -> float:
        if not self.root.is_dir():
            return time.time()  # there is nothing whose age would matter
        probe = self.root / f"{TEMP}{uuid.uuid4().hex}"
        with local_errors(self.uri):
            try:
                probe.touch(exist_ok=False)
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    def confined(self) -> FileStore:
        return FileStore(self.root, self.root)

    def sub(self, prefix: str) -> FileStore:
        return FileStore(self.root / check_key(prefix.rstrip("/"), "prefix"), self.home)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _prune(self, folder: Path) -> None:
        with suppress(OSError):  # not empty, or somebody else's turn
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


def _walk(
    folder: Path, base: str, prefix: str, after: str, above: tuple[tuple[int, int], ...], links: bool
) -> Iterator[Entry]:
    """Files below `folder` in key order; `above` holds the folders passed on the way, against cycles of links."""
    try:
        here = folder.stat()
        items = [item for item in os.scandir(folder) if links or not item.is_symlink()]
        found = {base + item.name + "/" * item.is_dir(): item for item in items}
    except ABSENT:
        return
    identity = (here.st_dev, here.st_ino)
    for key in sorted(found) if identity not in above else ():
        item = found[key]
        if key.endswith("/"):
            if key.startswith(prefix) and (after < key or after.startswith(key)):
                yield from _walk(folder / item.name, key, prefix, after, (*above, identity), links)
        elif key.startswith(prefix) and key > after and not item.name.startswith(TEMP) and item.is_file():
            with suppress(FileNotFoundError):
                stat = item.stat()
                yield Entry(key, stat.st_size, stat.st_mtime)


def _temps(root: Path) -> Iterator[Path]:
    """Files below `root`, no link followed, that were being written."""
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if OWN_TEMP.fullmatch(name))


def _has_link(path: Path, home: Path) -> bool:
    """Whether a link leads from `home` down to `path`."""
    below = path.relative_to(home).parts
    return any(home.joinpath(*below[:count]).is_symlink() for count in range(1, len(below) + 1))


def _unlink_below(home: Path, path: Path) -> None:
    """Remove a file to which no link leads from `home`, also none that is put there meanwhile."""
    *folders, name = path.relative_to(home).parts
    here = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        os.unlink(name, dir_fd=here)
    finally:
        os.close(here)
