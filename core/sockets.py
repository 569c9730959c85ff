"""Sockets between processes of one machine: Linux gives their paths 107 bytes, which TMPDIR alone may exceed."""

from __future__ import annotations

import multiprocessing.util
import os
import tempfile

from core.storage import StoreError

# multiprocessing listens in a folder of its own, with a random name and mode 0700, in the temporary directory.
LONGEST = 107 - len("/pymp-12345678/listener-12345678")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - see above: the folder's name cannot be guessed


def place() -> str:
    """The system's temporary directory, or a short one where it has too long a name.  Raises StoreError."""
    usual = tempfile.gettempdir()
    for folder in (usual, *SHORT):
        if len(os.fsencode(folder)) <= LONGEST and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise StoreError(f"TMPDIR: {usual} has {len(os.fsencode(usual))} bytes, more than the {LONGEST} in which processes "
                     f"can open sockets, and none of {', '.join(SHORT)} can be written: set a shorter one, or "
                     "loader.workers=0")  # fmt: skip


def shorten() -> None:
    """Have this process, and those that it forks, open sockets where their paths fit.  Raises StoreError."""
    usual, short = tempfile.gettempdir(), place()
    if short == usual:
        return
    tempfile.tempdir = short
    try:
        multiprocessing.util.get_temp_dir()  # made once, then kept for good
    finally:
        tempfile.tempdir = usual
