"""The folder side of `core.storage`: every object is a file."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from core.atomic import TEMP, publish
from core.storage import (
    ABSENT,
    PIECE,
    Entry,
    Store,
    check_key,
    check_prefix,
    check_range,
    crc32c,
    file_uri,
    local_errors,
)


class FileStore(Store):
    """Objects as files below a folder, which the first put creates."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = file_uri(root)

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
            yield from _walk(self.root / folder, f"{folder}/" if folder else "", prefix, after, ())

    def delete(self, *keys: str) -> None:
        for path in [self._path(key) for key in keys]:
            with local_errors(str(path)), suppress(*ABSENT):
                path.unlink()
                self._prune(path.parent)

    def abandoned(self, older_s: float, remove: bool) -> int:
        with local_errors(self.uri):
            found = [p for p in self.root.rglob(f"{TEMP}*") if p.stat().st_mtime <= time.time() - older_s]
            for path in found if remove else ():
                path.unlink(missing_ok=True)
        return len(found)

    def sub(self, prefix: str) -> FileStore:
        return FileStore(self.root / check_key(prefix.rstrip("/"), "prefix"))

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _prune(self, folder: Path) -> None:
        with suppress(OSError):  # not empty, or somebody else's turn
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


def _walk(folder: Path, base: str, prefix: str, after: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Files below `folder` in key order; `above` holds the folders passed on the way, against cycles of links."""
    try:
        here = folder.stat()
        found = {base + item.name + "/" * item.is_dir(): item for item in os.scandir(folder)}
    except ABSENT:
        return
    identity = (here.st_dev, here.st_ino)
    for key in sorted(found) if identity not in above else ():
        item = found[key]
        if key.endswith("/"):
            if key.startswith(prefix) and (after < key or after.startswith(key)):
                yield from _walk(folder / item.name, key, prefix, after, (*above, identity))
        elif key.startswith(prefix) and key > after and not item.name.startswith(TEMP) and item.is_file():
            with suppress(FileNotFoundError):
                stat = item.stat()
                yield Entry(key, stat.st_size, stat.st_mtime)
