"""The top of the report: what was made of what, how it stands, the numbers to remember."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from core.report.facts import WORKING, Attempt, Facts, Json
from core.report.page import NONE, Html, code, duration, join, moment, number, tag, warning

STYLES = {"succeeded": "good", "failed": "bad", "running": "busy"}
Tile = tuple[str, str, object]  # name, value, note


def header(f: Facts) -> Html:
    state = tag("span", f.state, cls=f"state {STYLES.get(f.state, '')}".strip())
    top = [tag("p", "Retort run ", code(f.id), cls="kicker"), tag("div", tag("h1", f.name), state, cls="top")]
    return join([*top, _lead(f), _standing(f)])


def _lead(f: Facts) -> Html:
    """One sentence: which student from which teachers."""
    if not f.recipe:
        return warning("There is no recipe in this run's folder: its creation was cut short. Submit the recipe again.")
    method = (f.recipe.get("method") or {}).get("name", "")
    student = (f.recipe.get("student") or {}).get("name", "")
    *others, last = [tag("b", name) for name in sorted(f.recipe.get("teachers") or {})] or [Html("")]
    source = [" distilled from ", join(others, ", "), " and " if others else "", last] if last else [" trained"]
    return tag("p", tag("b", student), *source, f" by method {method}.", cls="lead")


def _standing(f: Facts) -> Html:
    """Why the run is not finished, and what to do; nothing for one that is."""
    if f.state in ("succeeded", "unknown"):
        return Html("")
    if f.state in WORKING:
        beat = f"last sign of life {moment(f.heartbeat['time'])}" if "time" in f.heartbeat else "no sign of life yet"
        left = f", {duration(float(f.heartbeat['eta_s']))} left in this stage" if "eta_s" in f.heartbeat else ""
        text = f"Not finished: this is the run as of {moment(f.now)} ({beat}{left}). For a newer state: "
        return tag("div", tag("p", text, code(f.command("report"))), cls="note busy")
    last = f.transitions[-1]
    reason = str((last.get("info") or {}).get("reason", "")).strip()
    said = tag("pre", reason) if "\n" in reason else tag("p", reason) if reason else ""
    what = f"Attempt {last['attempt']} {'' if f.state == 'failed' else 'was '}{f.state} at {moment(last['time'])}."
    logs, resume = code(f.command("logs")), code(f.command("resume"))
    todo = tag("p", "What the ranks wrote: ", logs, ". To go on from the newest checkpoint: ", resume)
    return tag("div", tag("p", what), said, todo, cls="note bad" if f.state == "failed" else "note")


def tiles(f: Facts) -> Html:
    tries = f.attempts()
    top1 = [_top1(name, result) for name, result in f.evaluations.items() if result.get("rows")]
    top1 = top1 or [("Top-1", NONE, "not evaluated yet")]
    shown = [*top1, _throughput(f), _steps(f), _wall(f, tries), _tries(tries)]
    return tag("dl", *(_tile(*one) for one in shown), cls="tiles")


def _tile(name: str, value: str, note: object) -> Html:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", note)), cls="tile")


def _top1(protocol: str, result: Json) -> Tile:
    """The student against the best of those that it is compared with."""
    best: dict[str, float] = {}
    for row in result["rows"]:
        kind = str(row.get("model")).partition(" ")[0]
        best[kind] = max(best.get(kind, 0.0), float(row.get("top1", 0.0)))
    student = f"{best['student']:.1f} %" if "student" in best else NONE
    words = {"untrained": "untrained", "teacher": "best teacher"}
    note = join((f"{word} {best[kind]:.1f}" for kind, word in words.items() if kind in best), tag("br"))
    return f"{protocol} top-1", student, note


def _throughput(f: Facts) -> Tile:
    """Medians over the rows behind each stage's first one, which holds the warm-up."""
    pace = [row for row in f.rows if "images_per_s" in row]
    warm = [row for before, row in zip(pace, pace[1:], strict=False) if before.get("stage") == row.get("stage")] or pace
    if not warm:
        return "Images/s", NONE, "nothing logged yet"
    rate = statistics.median(float(row["images_per_s"]) for row in warm)
    wait = statistics.median(float(row.get("data_wait", 0.0)) for row in warm)
    return "Images/s", number(rate, 3), f"median, {100 * wait:.1f} % of time waiting for data"


def _steps(f: Facts) -> Tile:
    if not f.rows:
        return "Steps", "0", "nothing logged yet"
    last, stages = f.rows[-1], list(f.recipe.get("stages") or {})
    note = f"of {last['steps']:,}" if "steps" in last else ""
    if len(stages) > 1 and last.get("stage") in stages:
        note = f"in stage {last['stage']}, {stages.index(last['stage']) + 1} of {len(stages)}"
    return "Steps", f"{last['step']:,}", note


def _wall(f: Facts, tries: Sequence[Attempt]) -> Tile:
    seconds = sum(attempt.seconds(f.now) for attempt in tries)
    info = tries[-1].info if tries else {}
    ranks = f"{info['ranks']} x {info.get('device', 'unknown device')}" if "ranks" in info else ""
    return "Wall time", duration(seconds) if seconds else NONE, ranks


def _tries(tries: Sequence[Attempt]) -> Tile:
    early = sum(attempt.state in ("preempted", "failed", "cancelled") for attempt in tries)
    note = f"{early} stopped early" if early else "none stopped early" if tries else "not started yet"
    return "Attempts", str(len(tries)), note
