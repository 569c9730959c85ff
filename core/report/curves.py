"""From the rows of a run's metrics to panels: columns are grouped by their names alone, whatever method wrote them.

`NAME_<teacher>` belongs to the panel NAME, one line per teacher; `heldout_NAME` joins the panel NAME.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.report.charts import PLAIN, Panel, Series, colour

POSITION = ("stage", "step", "epoch", "steps", "eta_s", "time", "attempt")  # where a row is, not what was measured
MAIN = ("loss", "lr", "images_per_s", "data_wait")  # written by the loop for every method
HELDOUT = "heldout_"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Look:
    title: str
    unit: str = ""
    factor: float = 1.0
    zero: bool = False


LOOKS = {
    "loss": Look("Loss"),
    "lr": Look("Learning rate", zero=True),
    "images_per_s": Look("Throughput", "images/s", zero=True),
    "data_wait": Look("Waiting for data", "% of time", 100.0, zero=True),
    "t_coeff": Look("Share of kept pairs", "%", 100.0, zero=True),
}


@dataclass(frozen=True)
class Curves:
    main: list[Panel]
    teachers: list[Panel]
    others: list[Panel]
    constant: dict[str, float]  # columns that never changed
    broken: dict[str, int]  # column -> rows whose value is not finite


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """Numeric columns as (step, value) in the order of their first appearance; NaN for what is not finite."""
    found: dict[str, Points] = {}
    for row in rows:
        for name, value in row.items():
            if name not in POSITION and (y := _numeric(value)) is not None:
                found.setdefault(name, []).append((float(row["step"]), y))
    return found


def group(column: str, teachers: Sequence[str]) -> tuple[str, str]:
    """(panel, line) of a column; the line is a teacher, `held out` or nothing."""
    for teacher in sorted(teachers, key=len, reverse=True):
        if column.endswith((f"_{teacher}", f"/{teacher}")):
            return column[: -len(teacher) - 1], teacher
    if column.startswith(HELDOUT):
        return column.removeprefix(HELDOUT), "held out"
    return column, ""


def curves(rows: Sequence[dict[str, Any]], teachers: Sequence[str]) -> Curves:
    """All panels of a run.  Columns that repeat another one, or never change, get none."""
    data = columns(rows)
    broken = {name: bad for name, points in data.items() if (bad := sum(not math.isfinite(y) for _, y in points))}
    constant, panels = dict[str, float](), dict[str, dict[str, Points]]()
    for name, points in _distinct(data).items():
        panel, line = group(name, teachers)
        if not line and panel not in MAIN and len(points) > 1 and len({y for _, y in points}) == 1:
            constant[name] = points[0][1]
        else:
            panels.setdefault(panel, {})[line] = points
    shared = sorted((p for p, lines in panels.items() if p not in MAIN and set(lines) & set(teachers)), key=_family)
    others = [p for p in panels if p not in MAIN and p not in shared]

    steps = [float(row["step"]) for row in rows] or [0.0]
    span, marks = (min(steps), max(steps)), stages(rows)

    def build(names: Sequence[str]) -> list[Panel]:
        found = (_panel(name, panels[name], teachers) for name in names if name in panels)
        return [replace(panel, span=span, marks=marks) for panel in found]

    return Curves(build(MAIN), build(shared), build(others), constant, broken)


def stages(rows: Sequence[dict[str, Any]]) -> list[tuple[float, str]]:
    """(last step before it, name) of every stage; nothing when there is one."""
    starts: dict[str, float] = {}
    last = 0.0
    for row in rows:
        starts.setdefault(str(row.get("stage", "")), last)
        last = float(row["step"])
    return [(step, name) for name, step in starts.items()] if len(starts) > 1 else []


def _numeric(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    return float(value) if math.isfinite(float(value)) else math.nan


def _distinct(data: dict[str, Points]) -> dict[str, Points]:
    """Without columns whose every value another column before them has too."""
    seen: set[tuple[tuple[float, float], ...]] = set()
    kept = {}
    for name, points in data.items():
        same = tuple(points)
        changes = len({y for _, y in points}) > 1
        if name in MAIN or not changes or same not in seen:
            kept[name] = points
        seen.add(same)
    return kept


def _family(name: str) -> tuple[str, int, str]:
    """Panels of one prefix together, general ones before their parts."""
    return name.partition("/")[0], name.count("_"), name


def _panel(name: str, lines: dict[str, Points], teachers: Sequence[str]) -> Panel:
    look = LOOKS.get(name, Look(name))
    order = {teacher: colour(i) for i, teacher in enumerate(sorted(teachers))}

    def series(line: str) -> Series:
        points = [(x, y * look.factor) for x, y in lines[line]]
        return Series(_called(line, lines), points, _style(line, name, order), keyed=line in order)

    return Panel(look.title, [series(line) for line in sorted(lines)], look.unit, look.zero)


def _called(line: str, lines: dict[str, Points]) -> str:
    return line or ("training" if "held out" in lines else "all" if len(lines) > 1 else "")


def _style(line: str, name: str, teachers: dict[str, str]) -> str:
    if line in teachers:
        return teachers[line]
    return colour(1) if line == "held out" else PLAIN if name not in MAIN else colour(0)
