"""Sweeps: a wanted set of runs, declared by the values that differ. What is there already is not done again."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from core import small_json
from core.storage import MissingObject, open_store
from jobs import spec
from jobs.errors import OK, UserError, nearest, redact
from jobs.follow import follow
from jobs.launchers import Launcher, Order
from jobs.placement import Placement
from jobs.record import ID, Run, State
from jobs.settings import Settings, split
from jobs.steps import elsewhere
from jobs.table import table
from jobs.verbs.submit import checked, choose_launcher, described, say, wanted

FOLDER = "sweeps"


def submit_sweep(settings: Settings) -> int:
    """Submit what is missing of the set and resume what has stopped, as one array where the launcher queues."""
    members = expand(settings.sweep)
    recipes = [replace(settings, set=(*settings.set, *member)).load_recipe() for member in members]
    root = settings.root(recipes[0])
    ids = [spec.run_id(recipe) for recipe in recipes]
    _refuse_doubles(ids, members)
    launcher = choose_launcher(settings, recipes[0])
    places = [checked(recipe, root, launcher) for recipe in recipes]
    if settings.dry:
        say("\n".join(f"{run_id}  {' '.join(member)}" for run_id, member in zip(ids, members, strict=True)))
        say("nothing was submitted (DRY=1)")
        return OK
    found = [wanted(Run(root, run_id), recipe, launcher, replace(settings, set=(*settings.set, *member)))
             for run_id, recipe, member in zip(ids, recipes, members, strict=True)]  # fmt: skip
    name = f"{recipes[0].name}-sweep-{hashlib.sha256(' '.join(sorted(ids)).encode()).hexdigest()[:8]}"
    about = {"recipe": settings.recipe, "sweep": settings.sweep, "runs": dict(zip(ids, members, strict=True))}
    open_store(root).put(f"{FOLDER}/{name}.json", json.dumps(about, indent=1).encode())
    code = _launch([(o, p) for o, p in zip(found, places, strict=True) if o is not None], launcher, settings)
    say(f"next: make status SWEEP={name}{elsewhere(root)}\nsweep: {name}")
    return code


def _launch(todo: list[tuple[Order, Placement]], launcher: Launcher, settings: Settings) -> int:
    if not launcher.queues:  # a machine does one after the other
        codes = []
        for one, place in todo:
            if launcher.submit([one], place) == [True]:
                say(f"{one.run.id}: attempt {one.attempt} submitted to {described(launcher, place, one.run.root)}")
                codes.append(follow(one.run, one.attempt, launcher))
        return max(codes, default=OK)
    for place in dict.fromkeys(place for _, place in todo):  # an array's tasks are all alike
        orders = [one for one, own in todo if own == place]
        for one, won in zip(orders, launcher.submit(orders, place), strict=True):
            who = f"attempt {one.attempt} submitted" if won else "somebody else has just submitted it"
            say(f"{one.run.id}: {who}: {one.run.look(one.run.last()).text}")
    return OK


def expand(text: str) -> list[tuple[str, ...]]:
    """`a=1,2 b=3,4` -> (a=1, b=3), (a=1, b=4), (a=2, b=3), (a=2, b=4).  Raises UserError."""
    axes = []
    for item in split(text):
        key, sign, values = item.partition("=")
        if not sign or not key:
            raise UserError(f"SWEEP: {item!r} is not FIELD=VALUE,VALUE,...")
        axes.append([f"{key}={value}" for value in _values(values)])
    if not axes:
        raise UserError('SWEEP: nothing is swept; write SWEEP="train.lr=1e-4,3e-4 train.weight_decay=0,0.03"')
    return list(itertools.product(*axes))


def _values(text: str) -> list[str]:
    """Cut at commas that are not inside brackets or braces."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def _refuse_doubles(ids: list[str], members: Sequence[tuple[str, ...]]) -> None:
    for i, run_id in enumerate(ids):
        if run_id in ids[:i]:
            first = " ".join(members[ids.index(run_id)])
            raise UserError(f"SWEEP: {first} and {' '.join(members[i])} are the same run {run_id}: the result does not "
                            "depend on what differs")  # fmt: skip


def status_sweep(settings: Settings) -> int:
    """The members of a sweep with what they have come to."""
    root = settings.root()
    rows = [_row(Run(root, run_id), member) for run_id, member in _read(root, settings.sweep).items()]
    if settings.json:
        print(json.dumps(rows, indent=1))
        return OK
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(table(keys, [[_cell(row.get(key, "")) for key in keys] for row in rows]))
    return OK


def _read(root: str, name: str) -> dict[str, Sequence[str]]:
    """Runs of a sweep, with the values that are theirs.  Raises UserError, Unreadable."""
    store = open_store(root)
    try:
        about = small_json.read(store, f"{FOLDER}/{name}.json", dict)
    except MissingObject:
        known = [entry.key.removeprefix(f"{FOLDER}/").removesuffix(".json") for entry in store.list(f"{FOLDER}/")]
        raise UserError(f"SWEEP: there is no sweep {name!r} in {root}{nearest(name, known)} "
                        f"(there is: {', '.join(known) or 'none'})") from None  # fmt: skip
    runs = about.get("runs")
    if not isinstance(runs, dict) or not all(_is_member(*each) for each in runs.items()):
        raise small_json.Unreadable(f"{store.uri}/{FOLDER}/{name}.json", "it names no runs of a sweep")
    return runs


def _is_member(run_id: str, member: object) -> bool:
    swept = isinstance(member, list) and all(isinstance(item, str) and "=" in item for item in member)
    return swept and bool(re.fullmatch(ID, run_id))


def _row(run: Run, member: Sequence[str]) -> dict[str, Any]:
    swept = dict(item.split("=", 1) for item in member)
    if not run.exists():
        return {"run": run.id, **swept, "state": "missing"}
    try:
        return _told(run, swept)
    except (small_json.Unreadable, MissingObject) as error:
        return {"run": run.id, **swept, "state": redact(str(error))}


def _told(run: Run, swept: dict[str, str]) -> dict[str, Any]:
    view = run.view()
    beat = view.heartbeat
    row = {"run": run.id, **swept, "state": view.shown, "attempt": view.last.attempt, "step": beat.get("step", ""),
           "loss": beat.get("loss", "")}  # fmt: skip
    if view.last.state == State.SUCCEEDED:
        row |= _results(run)
    return row


def _results(run: Run) -> dict[str, float]:
    """The student's scores, by protocol."""
    found: dict[str, float] = {}
    for entry in run.store.list("evaluations/"):
        result = small_json.read(run.store, entry.key, dict) if entry.key.endswith(".json") else {}
        rows = result.get("rows")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and row.get("model") == "student":
                found |= {f"{result.get('protocol')} {k}": v for k, v in row.items() if isinstance(v, float)}
    return found


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
