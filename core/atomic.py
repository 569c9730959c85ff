"""Files that appear whole under their name, or not at all, and are on the disk by then."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

TEMP = ".tmp-"  # names a file that is being written: reserved, never listed
OWN_TEMP = re.compile(re.escape(TEMP) + "[0-9a-f]{32}")  # as they are made here: others may use the prefix as well


def publish(path: Path, fill: Callable[[BinaryIO], object], exclusive: bool = False) -> bool:
    """Write aside, flush to the disk, then give the file its name. False: `exclusive`, and the name was taken."""
    file = _open_temp(path.parent)
    temp = Path(file.name)
    try:
        with file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            with suppress(FileExistsError):
                os.link(temp, path)
            # The link count, not the error, tells who won: network file systems may repeat a link after a lost answer.
            won = temp.stat().st_nlink > 1
        else:
            os.replace(temp, path)
            won = True
        with suppress(FileNotFoundError):  # deleted again and its folder pruned
            _sync(path.parent)
        return won
    finally:
        temp.unlink(missing_ok=True)


def _open_temp(folder: Path) -> BinaryIO:
    for _ in range(100):
        with suppress(FileNotFoundError):  # a deletion elsewhere has just pruned the folder
            _make_folder(folder)
            return (folder / f"{TEMP}{uuid.uuid4().hex}").open("xb")
    raise FileNotFoundError(errno.ENOENT, "folder vanishes as fast as it is made", str(folder))


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
