"""Files of a run that are not in the store yet, in a folder of this node, under the keys that they will have there."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Union

from core.atomic import TEMP
from core.private import flaw, own_folder, private_folder
from core.storage import Store

LONGEST_WRITE_S = 3600.0
Bytes = Union[bytes, "memoryview[int]"]  # noqa: UP007 (not a type at run time in Python 3.11)


class Spool:
    """A run's folder on this node's disk (or on one that nodes share). Writes are atomic, nothing is flushed: what
    must survive is the process, not the machine, and whoever reads compares checksums."""

    def __init__(self, base: str, run: Store) -> None:
        """base: folder for all runs; "" = one of this user's in the system's temporary directory."""
        name = hashlib.sha256(run.uri.encode()).hexdigest()[:24]
        self.folder = (Path(base) if base else own_folder("spool")) / name
        self._private = [self.folder] if base else [self.folder.parent, self.folder]  # a given base may be shared

    def write(self, key: str, data: Bytes) -> Path:
        """Raises OSError: no space, no rights, or the folder is somebody else's."""
        path = self.folder / key
        temp = path.with_name(f"{TEMP}{os.getpid()}-{path.name}")
        try:
            self._open(temp).write_bytes(data)
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
        return path

    def remove(self, key: str) -> None:
        path = self.folder / key
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or somebody else's turn
            while path != self.folder:
                path = path.parent
                path.rmdir()

    def keys(self) -> list[str]:
        """What waits to be uploaded, a part's description behind the part."""
        found = [path for path in self._files() if not path.name.startswith(TEMP)]
        return [str(p.relative_to(self.folder)) for p in sorted(found, key=lambda p: (p.suffix == ".json", p))]

    def tidy(self) -> None:
        """Remove what a write that was killed has left, once it is too old to be going on."""
        for path in self._files():
            with suppress(FileNotFoundError):
                if path.name.startswith(TEMP) and time.time() - path.stat().st_mtime > LONGEST_WRITE_S:
                    self.remove(str(path.relative_to(self.folder)))

    def _files(self) -> list[Path]:
        if not self.folder.is_dir() or any(map(flaw, self._private)):  # others could have planted what is there
            return []
        return [Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names]

    def _open(self, temp: Path) -> Path:
        for _ in range(100):
            with suppress(FileNotFoundError):  # another rank's removal has just pruned the folder
                for folder in self._private:
                    private_folder(folder)
                temp.parent.mkdir(parents=True, exist_ok=True)
                temp.touch()
                break
        return temp
