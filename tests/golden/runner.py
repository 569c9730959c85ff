"""Runs the unit that a case tests on the product, and compares what comes out with what is recorded."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import recorded
from tests.golden.case import Case, Recorded, find_cases, load_case
from tests.golden.find import find_unit, methods

__all__ = ["Case", "Check", "Result", "Unit", "deviation", "elsewhere", "find_cases", "load_case", "methods",
           "run_case"]  # fmt: skip

Check = tuple[str, Any, Any, float]  # array, got, want, tolerance
Unit = Callable[[Case], Iterable[Check]]
# A tolerance below the first is one for results in float64; a result in a narrower type is held to the second.
SHOWN = 5  # of the results that nothing is compared with
NARROW = {"float32": (1e-6, 2e-5), "float16": (1e-3, 2e-3)}


def elsewhere(module: str, name: str) -> Unit:
    """A unit of another module of this package, imported when a case needs it."""
    return lambda case: getattr(importlib.import_module(f"tests.golden.{module}"), name)(case)


@dataclass(frozen=True)
class Result:
    """What became of one case."""

    name: str
    ok: bool
    message: str
    unread: tuple[str, ...] = ()  # arrays that the unit never looked at

    @property
    def line(self) -> str:
        more = f"; never looked at: {', '.join(self.unread)}" if self.unread else ""
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}  {self.message}{more}"


def run_case(path: Path) -> Result:
    """Run one case; whatever goes wrong is a failed result, never an exception."""
    name = f"{path.resolve().parent.name}/{path.stem}"
    try:
        case = load_case(path)
        found = find_unit(path, case)
        if found is None:
            return Result(name, False, "no unit known for this case")
        method, unit = found
        checks = list(unit(case))
        unread = tuple(key for key in case if key not in case.read and not recorded.left_out(method, key, case))
        wrong = judge(method, case, checks)
        return Result(name, not wrong, ", ".join(wrong) or _worst(method, checks), unread)
    except Exception as error:  # a case that cannot run is a failed case
        return Result(name, False, f"{type(error).__name__}: {error}")


def judge(method: str, case: Case, checks: list[Check]) -> list[str]:
    """What is wrong with a case whose unit gave these checks."""
    return [*_copied(case, checks), *_deviations(method, checks), *_not_compared(method, case, checks)]


def _errors(method: str, checks: list[Check]) -> list[tuple[float, float, str]]:
    each = method in recorded.EACH
    return [(deviation(got, want, each), tolerance_of(want, tol), array) for array, got, want, tol in checks]


def _deviations(method: str, checks: list[Check]) -> list[str]:
    return [f"{array} err {e:.0e} (tol {tol:g})" for e, tol, array in _errors(method, checks) if not e <= tol]


def _copied(case: Case, checks: list[Check]) -> list[str]:
    """Values that stand for the product's, but are the file's own."""
    return [f"{array} is read from the file, not computed" for array, got, *_ in checks
            if isinstance(got, Recorded) and any(np.shares_memory(got, case[name]) for name in got.names)]  # fmt: skip


def _not_compared(method: str, case: Case, checks: list[Check]) -> list[str]:
    """Results without a check; and that there is no result at all with one."""
    if not checks:
        return ["the unit compared nothing"]
    compared = set().union(*(_names(want) for _, _, want, _ in checks))
    names = [name for name, *_ in checks]
    compared |= {key for key in case for name in names if name == key or re.match(rf"{re.escape(key)}[ .,]", name)}
    results = {key for key in case if recorded.is_result(method, key)}
    if results and not results & compared:
        return ["none of the recorded results is compared"]
    forgotten = [key for key in case if key in results - compared and not recorded.left_out(method, key, case)]
    more = [f"and {len(forgotten) - SHOWN} more"] if len(forgotten) > SHOWN else []
    return [*(f"{key} is recorded, but not compared" for key in forgotten[:SHOWN]), *more]


def _worst(method: str, checks: list[Check]) -> str:
    error, tol, _ = max(_errors(method, checks), key=lambda item: item[0] / item[1] if item[1] else item[0])
    return f"max err {error:.0e} (tol {tol:g})"


def _names(value: Any) -> frozenset[str]:
    """Of the recorded arrays that a value, or one of its parts, is made of."""
    if isinstance(value, Recorded):
        return value.names
    if isinstance(value, list | tuple):
        return frozenset().union(*(_names(part) for part in value))
    return frozenset()


def tolerance_of(want: Any, tolerance: float) -> float:
    least, narrow = NARROW.get(str(getattr(want, "dtype", "")).removeprefix("torch."), (0.0, 0.0))
    return narrow if 0 < tolerance < least else tolerance


def deviation(got: Any, want: Any, each: bool = True) -> float:
    """Largest |got - want| / max(1, |want|); infinite for another shape, other text, or a NaN on one side.

    each: |want| is that of the same number, else the largest one of the array.
    """
    got, want = _array(got), _array(want)
    if got.shape != want.shape:
        return float("inf")
    if got.dtype.kind not in "iuf" or want.dtype.kind not in "iuf":
        return 0.0 if np.array_equal(got, want) else float("inf")
    got, want = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    size = np.abs(want) if each else np.abs(want[np.isfinite(want)]).max(initial=0.0)
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(got - want) / np.maximum(1.0, size))
    error = np.where(np.isnan(error), np.inf, error)
    return float(error.max(initial=0.0))


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
