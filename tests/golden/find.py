"""Finds the unit that a case tests: by the folder's and the file's name, or else by the arrays that it holds."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.golden import units
from tests.golden.case import Case, find_cases, load_case

HERE = Path(__file__).parent
ALIKE = 0.5  # of the names of arrays in two cases, the share that both have, for them to be of one unit


def methods() -> dict[str, Any]:
    """Unit modules by the name of their method."""
    names = [module.name for module in pkgutil.iter_modules(units.__path__)]
    return {name: importlib.import_module(f"{units.__name__}.{name}") for name in names}


def find_unit(path: Path, case: Case) -> tuple[str, Any] | None:
    """Method and unit of a case.

    The method is that of the nearest folder named after one (or starting with its name). The unit is the one whose
    name is the longest that the file's name starts with; where that leaves none, or units of several methods, it is
    that of the known case whose arrays have the most names in common with this one's.
    """
    known = methods()
    method = method_of(path, known)
    names = [method] if method else sorted(known)
    named = [(name, unit) for name in names if (unit := longest_prefix(path.stem, known[name].UNITS))]
    longest = max((len(unit) for _, unit in named), default=0)
    named = [(name, unit) for name, unit in named if len(unit) == longest]
    if len(named) != 1:
        named = nearest(case, named or [(name, unit) for name in names for unit in known[name].UNITS])
    return (named[0][0], known[named[0][0]].UNITS[named[0][1]]) if named else None


def method_of(path: Path, known: Iterable[str]) -> str | None:
    longest_first = sorted(known, key=len, reverse=True)
    for folder in path.resolve().parent.parts[::-1]:
        for name in longest_first:
            if folder.replace("-", "_").startswith(name):
                return name
    return None


def longest_prefix(stem: str, registry: Mapping[str, Any]) -> str | None:
    return max((name for name in registry if stem.startswith(name)), key=len, default=None)


def nearest(case: Case, candidates: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The one of (method, unit) that has the case most like this one, if any is like it."""
    own = case.kinds()
    likeness = {
        (method, unit): len(own & kinds) / len(own | kinds)
        for method in {method for method, _ in candidates}
        for unit, kinds in known_kinds(method)
        if (method, unit) in candidates and len(own & kinds) >= ALIKE * len(own | kinds)
    }
    return [max(likeness, key=lambda each: likeness[each])] if likeness else []


@functools.cache
def known_kinds(method: str) -> list[tuple[str, set[str]]]:
    """(unit, names of arrays) of every case of a method in this folder."""
    registry = methods()[method].UNITS
    cases = [(longest_prefix(path.stem, registry), path) for path in find_cases(HERE / method)]
    return [(unit, load_case(path).kinds()) for unit, path in cases if unit is not None]
