"""One recorded case: its arrays by name, which remember what they are, so that the runner can tell what was used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

EXPECTED = "expected.npz"  # results of a case that is a folder of files


class Recorded(np.ndarray):  # type: ignore[type-arg]
    """An array of a case, or a part of one; `names` says of which arrays."""

    names: frozenset[str] = frozenset()

    def __array_finalize__(self, source: Any) -> None:
        self.names = getattr(source, "names", frozenset())


class Case(Mapping[str, Any]):
    """Arrays of one case by name; remembers which were looked at. path: its file, or folder of files."""

    def __init__(self, arrays: Mapping[str, Any], path: Path) -> None:
        self._arrays, self.path = dict(arrays), path
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._arrays[key]
        self.read.add(key)
        if not isinstance(value, np.ndarray):
            return value
        recorded = value.view(Recorded)
        recorded.names = frozenset([key])
        return recorded

    def __contains__(self, key: object) -> bool:
        """Asking whether an array is there is no look at it."""
        return key in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def below(self, prefix: str) -> dict[str, Any]:
        """Arrays whose names start with the prefix, under the rest of the name."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}

    def kinds(self) -> set[str]:
        """What the arrays are called, without numbers and without the names of parameters and teachers."""
        found = {"/".join(re.split(r"[./]", re.sub(r"\d+", "#", key))[:2]) for key in self}
        inner = self._arrays.get("meta", self._arrays.get("items", ""))
        if isinstance(inner, np.ndarray):
            inner = json.loads(str(inner))
        inner = inner[0] if isinstance(inner, list) and inner else inner
        return found | ({f"meta:{key}" for key in inner} if isinstance(inner, dict) else set())


def load_case(path: Path) -> Case:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return Case(content if isinstance(content, dict) else {"items": content}, path)
    with np.load(path / EXPECTED if path.is_dir() else path, allow_pickle=False) as archive:
        return Case({key: archive[key] for key in archive.files}, path)


def find_cases(folder: Path) -> list[Path]:
    """Cases in a folder and below, in order; a file stands for itself, and a folder with EXPECTED for its files."""
    if folder.is_file() or (folder / EXPECTED).is_file():
        return [folder]
    files = [path for path in folder.rglob("*") if path.suffix in (".npz", ".json") and path.is_file()]
    whole = {path.parent for path in files if path.name == EXPECTED}
    return sorted({path for path in files if not whole & set(path.parents)} | whole)
