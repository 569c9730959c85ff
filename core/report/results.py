"""How good the student is, protocol by protocol, and how the training went, curve by curve."""

from __future__ import annotations

import json
from collections.abc import Sequence

from core.report import charts
from core.report.curves import Curves, curves
from core.report.facts import Facts, Json
from core.report.page import Html, code, join, moment, number, table, tag, value, warning


def evaluation(f: Facts) -> Html:
    head = tag("h2", "Results")
    if not f.evaluations:
        what = " compares the student with its teachers, untrained students and raw pixels."
        return tag("section", head, tag("p", "Not evaluated yet: ", code(f.command("eval")), what))
    return tag("section", head, *(_protocol(f, name, result) for name, result in f.evaluations.items()))


def _protocol(f: Facts, name: str, result: Json) -> Html:
    rows: list[Json] = result.get("rows") or []
    settings = [f"{k.replace('_', ' ')} {value(v)}" for k, v in (result.get("settings") or {}).items()]
    made = float(result.get("time", f.now))
    parts = [
        tag("h3", name),
        _rows(rows) if rows else tag("pre", json.dumps(result, indent=1)),
        _margin(result.get("margin")),
        tag("p", "; ".join([f"Evaluated {moment(made)}", *settings]), ".", cls="soft"),
    ]
    if late := f.outdated(made):
        parts.append(warning(f"Evaluated {late}; again: ", code(f.command("eval"))))
    return join(parts)


def _rows(rows: Sequence[Json]) -> Html:
    """Models by top-1 and top-5; what else a probe reports about itself comes behind, muted."""
    more = list(dict.fromkeys(k for row in rows for k in row if k not in ("model", "top1", "top5")))
    columns = [("Model", "model"), ("Top-1 %", "num"), ("", "wide"), ("Top-5 %", "num")]
    cells = [[*_scores(row), *(value(row.get(name)) for name in more)] for row in rows]
    students = [i for i, row in enumerate(rows) if str(row.get("model")).startswith("student")]
    best = max(students, key=lambda i: float(rows[i].get("top1", 0.0)), default=None)
    return table([*columns, *((name, "num soft") for name in more)], cells, best)


def _margin(margin: Json | None) -> Html:
    if not margin:
        return Html("")
    reached, asked = float(margin["reached"]), float(margin["asked"])
    text = f"The student is {abs(reached):.2f} points {'above' if reached >= 0 else 'below'} the best untrained one"
    if not asked:
        return tag("p", f"{text}; the recipe asks for no margin.")
    verdict = tag("b", "reached" if margin["ok"] else "missed", cls="good" if margin["ok"] else "bad")
    return tag("p", f"{text}; the recipe asks for {asked:.2f}: ", verdict, ".")


def _scores(row: Json) -> list[object]:
    return [row.get("model", ""), _percent(row, "top1"), _bar(row), _percent(row, "top5")]


def _percent(row: Json, name: str) -> str:
    return f"{float(row[name]):.2f}" if name in row else ""


def _bar(row: Json) -> Html:
    share = min(max(float(row.get("top1", 0.0)), 0.0), 100.0)
    return tag("span", cls="bar", style=f"width:{share:.1f}%", aria_hidden="true")


# -- training -----------------------------------------------------------------------------------------------------


def training(f: Facts) -> Html:
    head = tag("h2", "Training")
    if not f.rows:
        said = tag("p", "Nothing has been logged yet. What the ranks wrote so far: ", code(f.command("logs")))
        return tag("section", head, said)
    teachers = sorted(f.recipe.get("teachers") or {})
    c = curves(f.rows, teachers)
    parts = [head, _broken(c), _grid(c.main, charts.LARGE)]
    if c.teachers:
        parts += [tag("h3", "By teacher"), _teacher_key(c, teachers), _grid(c.teachers)]
    if c.others:
        parts += [tag("h3", "More"), _grid(c.others)]
    if c.constant:
        words = ", ".join(f"{name} {number(y)}" for name, y in c.constant.items())
        parts.append(tag("p", f"Constant throughout: {words}.", cls="soft"))
    return tag("section", *parts, tag("p", "All rows, as JSON lines: ", code(f"{f.uri}/metrics/"), cls="soft"))


def _teacher_key(c: Curves, teachers: Sequence[str]) -> Html:
    names = [(name, charts.colour(i)) for i, name in enumerate(teachers)]
    if any(s.style == charts.PLAIN for panel in c.teachers for s in panel.series):
        names.append(("all together", charts.PLAIN))
    return charts.key(names)


def _broken(c: Curves) -> Html:
    if not c.broken:
        return Html("")
    words = ", ".join(f"{name} ({count})" for name, count in c.broken.items())
    return warning(f"Not finite, and marked by crosses (rows): {words}.")


def _grid(panels: Sequence[charts.Panel], frame: charts.Frame = charts.SMALL) -> Html:
    cls = "charts large" if frame == charts.LARGE else "charts"
    return tag("div", *(charts.chart(panel, frame) for panel in panels), cls=cls)
