"""Finds the unit that a case tests, runs it on the product, and compares what comes out with what is recorded."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import units

Check = tuple[str, Any, Any, float]  # array, got, want, tolerance
EXPECTED = "expected.npz"  # results of a case that is a folder of files


class Case(Mapping[str, Any]):
    """Arrays of one case by name; remembers which were looked at. path: its file, or folder of files."""

    def __init__(self, arrays: Mapping[str, Any], path: Path) -> None:
        self._arrays, self.path = dict(arrays), path
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def below(self, prefix: str) -> dict[str, Any]:
        """Arrays whose names start with the prefix, under the rest of the name."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}


Unit = Callable[[Case], Iterable[Check]]


def elsewhere(module: str, name: str) -> Unit:
    """A unit of another module of this package, imported when a case needs it."""
    return lambda case: getattr(importlib.import_module(f"tests.golden.{module}"), name)(case)


@dataclass(frozen=True)
class Result:
    """What became of one case."""

    name: str
    ok: bool
    message: str
    unread: tuple[str, ...] = ()  # recorded results that the unit never looked at

    @property
    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}  {self.message}"


def find_cases(folder: Path) -> list[Path]:
    """Cases in a folder and below, in order; a file stands for itself, and a folder with EXPECTED for its files."""
    if folder.is_file() or (folder / EXPECTED).is_file():
        return [folder]
    files = [path for path in folder.rglob("*") if path.suffix in (".npz", ".json") and path.is_file()]
    whole = {path.parent for path in files if path.name == EXPECTED}
    return sorted({path for path in files if not whole & set(path.parents)} | whole)


def load_case(path: Path) -> Case:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return Case(content if isinstance(content, dict) else {"items": content}, path)
    with np.load(path / EXPECTED if path.is_dir() else path, allow_pickle=False) as archive:
        return Case({key: archive[key] for key in archive.files}, path)


def methods() -> dict[str, Any]:
    """Unit modules by the name of their method."""
    names = [module.name for module in pkgutil.iter_modules(units.__path__)]
    return {name: importlib.import_module(f"{units.__name__}.{name}") for name in names}


def find_unit(path: Path, case: Case) -> Unit | None:
    """The unit whose name is the longest one that the file's name starts with.

    The method is that of the nearest folder named after one (or starting with its name), else the one that knows the
    case's array names.
    """
    known = methods()
    for folder in path.resolve().parent.parts[::-1]:
        for name in sorted(known, key=len, reverse=True):
            if folder.replace("-", "_").startswith(name):
                return _longest_prefix(path.stem, known[name].UNITS)
    found = [_longest_prefix(path.stem, module.UNITS) for module in known.values() if module.claims(case)]
    return next((unit for unit in found if unit is not None), None)


def _longest_prefix(stem: str, registry: Mapping[str, Unit]) -> Unit | None:
    names = [name for name in registry if stem.startswith(name)]
    return registry[max(names, key=len)] if names else None


def run_case(path: Path) -> Result:
    """Run one case; whatever goes wrong is a failed result, never an exception."""
    name = f"{path.resolve().parent.name}/{path.stem}"
    try:
        case = load_case(path)
        unit = find_unit(path, case)
        if unit is None:
            return Result(name, False, "no unit known for this case")
        checks = list(unit(case))
        unread = tuple(key for key in case if key.startswith("out.") and key not in case.read)
        return _judge(name, checks, unread)
    except Exception as error:  # a case that cannot run is a failed case
        return Result(name, False, f"{type(error).__name__}: {error}")


def _judge(name: str, checks: list[Check], unread: tuple[str, ...]) -> Result:
    if not checks:
        return Result(name, False, "the unit compared nothing")
    errors = [(deviation(got, want), tol, array) for array, got, want, tol in checks]
    wrong = [f"{array} err {error:.0e} (tol {tol:g})" for error, tol, array in errors if not error <= tol]
    if wrong:
        return Result(name, False, ", ".join(wrong), unread)
    error, tol, _ = max(errors, key=lambda item: item[0] / item[1] if item[1] else item[0])
    return Result(name, True, f"max err {error:.0e} (tol {tol:g})", unread)


def deviation(got: Any, want: Any) -> float:
    """max |got - want| / max(1, |want|); infinite for another shape, other text, or a NaN on one side."""
    got, want = _array(got), _array(want)
    if got.shape != want.shape:
        return float("inf")
    if got.dtype.kind not in "iuf" or want.dtype.kind not in "iuf":
        return 0.0 if np.array_equal(got, want) else float("inf")
    got, want = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(got - want) / np.maximum(1.0, np.abs(want)))
    error = np.where(np.isnan(error), np.inf, error)
    return float(error.max(initial=0.0))


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
