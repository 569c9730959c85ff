"""status and cancel: what is in the record of a run, whichever launcher ran it."""

from __future__ import annotations

import json
import time
from typing import Any

from core.small_json import Unreadable
from core.storage import MissingObject
from core.text import one_line
from jobs import demo, launchers
from jobs.errors import OK, UserError, redact
from jobs.follow import duration, progress_text
from jobs.launchers import Launcher
from jobs.record import ENDED, Run, State, Transition, View
from jobs.settings import Settings
from jobs.steps import elsewhere, steps
from jobs.table import table

CANCEL_WAIT_S = 60.0


def status(settings: Settings) -> int:
    if settings.sweep:
        from jobs.verbs.sweeps import status_sweep

        return status_sweep(settings)
    root = settings.root()
    if settings.run:
        return _detail(Run.find(root, settings.run), settings.json)
    rows = _rows(root)
    if settings.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(_table(rows))
    else:
        print(f"no runs in {root} yet: make submit RECIPE=demo starts one")
    if not settings.json and elsewhere(root) == "" and root != demo.place() and (rows := _rows(demo.place())):
        print(f"\nof make demo, with{elsewhere(demo.place())}\n{_table(rows)}")
    return OK


def _rows(root: str) -> list[dict[str, Any]]:
    """Of all runs of a store, the newest first."""
    return sorted((_row(Run(root, run_id)) for run_id in Run.list(root)), key=lambda row: -row["since"])


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [[r["run"], r["state"], str(r["attempt"]), r["progress"], _ago(r["since"]) if r["since"] else ""]
             for r in rows]  # fmt: skip
    return table(["run", "state", "attempt", "progress", "changed"], cells)


def _ago(when: float) -> str:
    return f"{duration(max(time.time() - when, 0.0))} ago"


def _row(run: Run) -> dict[str, Any]:
    """Of a table; a run that cannot be read keeps nobody from seeing the others."""
    try:
        return _told_row(run, run.view())
    except (Unreadable, MissingObject) as error:
        why = redact(str(error))
        return {"run": run.id, "state": "unreadable", "attempt": 0, "since": 0.0, "progress": why, "heartbeat": {}}


def _told_row(run: Run, view: View) -> dict[str, Any]:
    return {
        "run": run.id, "state": view.shown, "attempt": view.last.attempt, "since": view.last.time,
        "progress": _progress(view) if view.last.attempt else "", "heartbeat": view.heartbeat,
    }  # fmt: skip


def _progress(view: View) -> str:
    return redact(view.unread) or progress_text(view.heartbeat)


def _detail(run: Run, as_json: bool) -> int:
    view, history = run.view(), run.transitions()
    if as_json:
        moves = [{"state": t.state, "time": t.time, "attempt": t.attempt, "info": t.info} for t in history]
        facts = {**_told_row(run, view), "uri": run.uri, "lost": view.lost, "transitions": moves}
        facts["record"] = run.record()
        facts["queue"] = run.look(view.last).text if view.last.state not in (State.CREATED, *ENDED) else ""
        facts["checkpoints"] = _checkpoints(run)
        print(json.dumps(facts, indent=1))
        return OK
    record = run.record()
    print(f"run       {run.id}\nstate     {view.shown} (attempt {view.last.attempt})\nfolder    {run.uri}")
    given = record.get("dotlist")
    overrides = " ".join(map(str, given)) if isinstance(given, list) else ""
    print(one_line(f"recipe    {record.get('recipe', '?')}{' with ' * bool(overrides)}{overrides}"))
    print(one_line(f"code      {record.get('commit', '?')}{' + uncommitted changes' if record.get('dirty') else ''}"))
    print(one_line(f"progress  {_progress(view) or 'none yet'}"))
    look = run.look(view.last) if view.last.state not in (State.CREATED, *ENDED) else None
    if look and look.text and not view.lost:
        print(f"queue     {look.text}")
    for t in history:
        print(f"{_clock(t.time)}  {_told(t)}")
    if view.lost:
        print(f"reason    {view.lost}")
    _kept(run)
    print(f"next      {_next(run, view)}")
    return OK


def _told(t: Transition) -> str:
    """A transition in one line: attempt, where, and why, with the whole reason."""
    where = t.info.get("nodes", "") if t.state == State.RUNNING else ""
    job = f"{t.info.get('launcher')} job {t.info['job']}" if t.state == State.QUEUED and t.info.get("job") else ""
    reason = t.info.get("reason", "")
    parts = [f" (attempt {t.attempt})" if t.attempt else "", f" on {where}" if where else "", f", {job}" if job else "",
             f": {reason}" if reason else ""]  # fmt: skip
    return f"{t.state}{''.join(parts)}"


def _checkpoints(run: Run) -> list[dict[str, Any]]:
    from core import commits

    return [{"step": m.position.step, "bytes": m.size, "ranks": m.world, "attempt": m.attempt, "time": m.created}
            for m in commits.checkpoints(run.store)]  # fmt: skip


def _kept(run: Run) -> None:
    """What attempts went on from, what was computed twice, and which checkpoints there are."""
    from core import commits, retention
    from core.merge import ConfigError

    for claim in commits.claims(run.store):
        if claim.number > 1:
            lost = f", {claim.lost} logged steps computed again" if claim.lost else ""
            how = "rewound" if claim.rewound else "went on"
            print(f"attempt {claim.attempt} {how} from step {claim.step} on {claim.host}{lost}")
    try:
        settings = run.recipe().checkpoint
    except (ConfigError, UserError, Unreadable) as error:
        print(f"recipe    {redact(str(error))}")
        return
    policy = retention.Policy(settings.keep, settings.keep_every, settings.keep_best)
    course = list(commits.checkpoints(run.store))
    why = retention.reasons(course, policy, retention.held(run.store))
    rows = [[str(m.position.step), f"{m.size / 1e6:.1f} MB", str(m.world), str(m.attempt), _ago(m.created),
             why.get(m.number, "goes with the next one")] for m in course]  # fmt: skip
    if rows:
        print(f"checkpoints, {sum(m.size for m in course) / 1e6:.1f} MB in all")
        print(table(["step", "size", "ranks", "attempt", "made", "kept as"], rows))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _next(run: Run, view: View) -> str:
    if view.last.state == State.SUCCEEDED:
        return steps(run.root, run.id, "eval", "export", "report")
    return steps(run.root, run.id, "logs", "cancel" if view.active else "resume")


def cancel(settings: Settings) -> int:
    """Mark the run cancelled, then tell its ranks, which save and leave."""
    run = Run.find(settings.root(), settings.need("run"))
    view = run.view()
    handle = run.handle(view.last)
    if view.last.state == State.CANCELLED:
        still = run.look(view.last).alive and _reach(run, handle, at_once=True)
        print(f"{run.id} is already cancelled" + ("; what is left of it is ended now" if still else ""))
        return OK
    if view.last.state in ENDED and not view.coming:
        raise UserError(f"run {run.id} has already {view.last.state}: there is nothing to cancel")
    run.move(State.CANCELLED, by="cancel")
    if view.active and (launcher := _reach(run, handle)):
        print(f"{run.id} is cancelled; its ranks save and end ...", flush=True)
        _wait_for_end(launcher, run, handle)
    elif view.active:
        print(f"{run.id} is cancelled; its ranks on {handle.get('host', 'another machine')} notice within seconds")
    else:
        print(f"{run.id} is cancelled")
    return OK


def _reach(run: Run, handle: dict[str, Any], at_once: bool = False) -> Launcher | None:
    """The launcher that has told a run's ranks to end; None where they cannot be reached from here."""
    try:
        launcher = launchers.of(handle)
    except launchers.Elsewhere:
        return None
    return launcher if launcher.cancel(run, handle, at_once) else None


def _wait_for_end(launcher: Launcher, run: Run, handle: dict[str, Any]) -> None:
    limit = time.monotonic() + CANCEL_WAIT_S
    while launcher.look(run, handle).alive and time.monotonic() < limit:
        time.sleep(0.2)
    late = f"still saving after {CANCEL_WAIT_S:.0f} s; it ends by itself, and at once when it is cancelled again"
    print(late if launcher.look(run, handle).alive else "ended")
