"""Bytes in a folder or a bucket under one semantics: atomic puts, creation by one winner, ranged reads, ordered lists.

A key is "/"-separated and relative to the store: never absolute, without empty, "." or ".." parts. The one difference
left between the two: a folder cannot hold a key below another key ("a" and "a/b"), a bucket can.
"""

from __future__ import annotations

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import google_crc32c

from core import shortage
from core.atomic import TEMP, publish

PIECE = 1 << 20  # bytes copied at once: larger ones cost a page fault per page each time
FULL, LIMIT = ": free space or choose another store", f": {shortage.FILES}"
HINTS = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EMFILE: LIMIT, errno.ENFILE: LIMIT}
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class StoreError(RuntimeError):
    """A store did not do what was asked. The message says what, where and what to check."""


class MissingObject(StoreError):  # noqa: N818 (says what is the matter)
    """There is no object of this name."""


class ExpiredCredentials(StoreError):  # noqa: N818 (says what is the matter)
    """The credentials were valid once; new ones must be provided."""


class AccessDenied(StoreError):  # noqa: N818 (says what is the matter)
    """The credentials are missing, wrong or lack a right."""


@dataclass(frozen=True)
class Entry:
    key: str
    size: int  # bytes
    modified: float  # seconds since the epoch


class Store(ABC):
    """Objects below one URI. Safe to share between threads, to pickle and to use after a fork.

    Every method raises `StoreError` or a subclass. `put*` and `get_file` are atomic: a reader never sees a part.
    """

    uri: str

    @abstractmethod
    def put(self, key: str, data: bytes) -> None: ...
    @abstractmethod
    def put_file(self, key: str, path: Path) -> None: ...
    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """True if this call created the object, though an answer may have been lost. A `StoreError` leaves it open."""

    @abstractmethod
    def get(self, key: str) -> bytes: ...
    @abstractmethod
    def get_range(self, key: str, start: int, size: int) -> bytes:
        """Bytes [start, start + size), cut at the object's end like a slice."""

    def get_file(self, key: str, path: Path) -> None:
        with local_errors(str(path)):
            publish(path, lambda file: self.load(key, file))

    @abstractmethod
    def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
        """Fill an open local file, which nobody reads yet: size in bytes and CRC32C of what has come.

        expected: bytes, where they are known before; it only saves time.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes, or None if there is no such object."""

    @abstractmethod
    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        """Entries in key order whose key starts with `prefix` (not only a folder's) and sorts behind `after`."""

    @abstractmethod
    def delete(self, *keys: str) -> None:
        """Removes objects; absent ones are fine."""

    @abstractmethod
    def abandoned(self, older_s: float, own: Callable[[str], bool], remove: bool) -> int:
        """Number of writes that were broken off so long ago and left something no reader sees; `remove` clears them.

        own: whether the caller's programs write at this key; in a folder, one whose last part is a temporary name.
        """

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch by the clock that `Entry.modified` comes from, which need not be this machine's."""

    def confined(self) -> Store:
        """The same objects without what lies elsewhere: a folder's links are neither listed nor followed to delete."""
        return self

    @abstractmethod
    def sub(self, prefix: str) -> Store: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


def crc32c(data: bytes, before: int = 0) -> int:
    """Checksum of `data`, or of it behind something whose checksum is `before`."""
    return int(google_crc32c.extend(before, data))


def resolve(uri: str, root: str) -> str:
    """`store:a/b` below the store `root`; any other URI unchanged.  Raises StoreError for a path without a scheme."""
    if uri.startswith("store:"):
        return f"{root.rstrip('/')}/{uri.removeprefix('store:')}"
    if uri.startswith(("/", ".", "~")):
        raise StoreError(f"{uri!r} has no scheme: write file://{os.path.abspath(os.path.expanduser(uri))}")
    return uri


def open_store(uri: str) -> Store:
    scheme, mark, rest = uri.partition("://")
    if mark and scheme == "file" and rest.startswith("/"):
        from core.folder import FileStore

        return FileStore(Path(os.path.normpath(unquote(rest))))
    if mark and scheme == "s3" and re.fullmatch(r"[\w.-]{3,255}(/.*)?", rest, re.ASCII):
        from core.bucket import S3Store  # half a second of imports that folders do not need

        return S3Store(uri)
    shown = re.sub(r"//[^/]*@", "//...@", uri)
    valid = "s3://BUCKET/PREFIX (endpoint and credentials come from the AWS_* variables) or file:///FOLDER"
    raise StoreError(f"{shown!r} is no store: write {valid}")


def check_key(key: str, what: str = "key") -> str:
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") or part.startswith(TEMP) for part in parts):
        raise StoreError(f"{key!r} is no {what}: a/b/c, relative, without empty, '.', '..' or '{TEMP}*' parts")
    return key


def check_prefix(prefix: str) -> str:
    return prefix and check_key(prefix.removesuffix("/"), "prefix") + "/" * prefix.endswith("/")


@contextmanager
def local_errors(where: str, *absent: type[OSError]) -> Iterator[None]:
    try:
        yield
    except absent as error:
        raise MissingObject(f"{where} does not exist") from error
    except PermissionError as error:
        raise AccessDenied(f"{where}: {error.strerror}: check owner and mode of the folder") from error
    except OSError as error:
        raise StoreError(f"{where}: {error.strerror}{HINTS.get(error.errno or 0, '')}") from error


def check_range(start: int, size: int) -> None:
    if start < 0 or size < 0:
        raise StoreError(f"no such range: start {start}, size {size}")
