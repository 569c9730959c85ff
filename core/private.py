"""Folders and locks of this user alone, in places where other users of the machine can make files as well."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDERS = ("shards", "scans", "spool", "logs")  # what there may be of `own_folder`
OTHERS_WRITE, OTHERS = 0o022, 0o077


def own_folder(name: str) -> Path:
    """Name this user's folder in the system's temporary directory; `private_folder` makes it."""
    return Path(tempfile.gettempdir()) / f"retort-{name}-{os.getuid()}"


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter, or see that it is one.

    Others who may read it are shut out.  Raises PermissionError where they could have planted something: it is
    somebody else's, a link, or open to their writing; OSError.
    """
    with suppress(FileExistsError):
        path.mkdir(0o700, parents=True)
    if wrong := flaw(path):
        raise PermissionError(errno.EPERM, wrong, str(path))
    if path.lstat().st_mode & OTHERS:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchmod(handle, 0o700)
        finally:
            os.close(handle)
    return path


def flaw(path: Path) -> str:
    """Say why nobody should trust a folder, and what to do; empty where there is none, or one of this user alone."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return ""
    if stat.S_ISLNK(found.st_mode):
        return "it is a link: remove it, or name the folder that it leads to"
    if not stat.S_ISDIR(found.st_mode):
        return "it is no folder: remove it, or name another place"
    if found.st_uid != os.getuid():
        return f"it belongs to user {found.st_uid}, not to you ({os.getuid()}): use a folder of your own, or set TMPDIR"
    if found.st_mode & OTHERS_WRITE:
        mode = stat.S_IMODE(found.st_mode)
        return f"others may write to it (mode {mode:o}): look at what is in it, then chmod 700, or remove it"
    return ""


@contextmanager
def locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Hold a lock file, which is never emptied and never a link.  flags: fcntl.LOCK_NB raises BlockingIOError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # said aloud: a process forked meanwhile holds the same open file
    finally:
        os.close(handle)
