"""`make demo`: the whole journey on this machine, against an embedded S3 server that starts and ends with it.

The server keeps objects in memory; what must outlive it is mirrored under .retort/demo and loaded again next time.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import small_json
from jobs import steps
from jobs.demo_server import serving
from jobs.errors import BUG, OK, PREEMPTED
from jobs.leaving import as_interrupts
from jobs.mirror import Mirror
from jobs.settings import Settings

MIRROR = Path(".retort") / "demo"
BUCKET = "retort-demo"
TOLERANCE = 1e-4  # largest difference of features between the exported and the trained student


def place() -> str:
    """URI of the store in which the demo's runs are once it has ended."""
    return f"file://{Path.cwd() / MIRROR}"


def main(settings: Settings) -> int:
    """Run, evaluate, export, report; shows the results when it is all done already.  Returns an exit code."""
    from core.storage import open_store
    from jobs.launchers.local import TIED
    from jobs.record import Run

    began = time.monotonic()
    with serving(BUCKET) as endpoint, as_interrupts():
        root = f"s3://{BUCKET}/store"
        mirror = Mirror(open_store(place()), open_store(root))
        _say(f"embedded S3 server: {root} at {endpoint} ({mirror.load()} objects from {MIRROR}/)")
        steps.kept[root] = place()
        os.environ[TIED] = "1"  # however this process ends, the server ends with it
        try:
            code, runs = _distil(replace(settings, recipe="demo", store=root))
        finally:
            _end_runs(root)
            mirror.save()
    if code == OK:
        code = _conclude([Run(place(), run) for run in runs])
    _say(f"demo: {time.monotonic() - began:.0f} s")
    return code


def _distil(first: Settings) -> tuple[int, list[str]]:
    """The recipe once for each of `evaluate.students` seeds; exit code of what went wrong, and the runs."""
    recipe = first.load_recipe()
    seeds = [recipe.seed + i for i in range(recipe.evaluate.students)]
    runs: list[str] = []
    for number, seed in enumerate(seeds):
        _say(f"\nseed {seed} ({number + 1} of {len(seeds)})")
        code, run = _one(replace(first, set=(*first.set, f"seed={seed}") if number else first.set))
        if code != OK:
            return code, runs
        runs.append(run)
    return OK, runs


def _conclude(runs: list[Any]) -> int:
    """Reports and results; the first run is the one that is shown.  runs: where they stay."""
    from core.export import verify
    from core.report import write
    from jobs.verbs.results import render

    found = [_results(run) for run in runs]
    difference = verify(runs[0].store)
    for run in runs:
        write(run.store, run.root)
    print(f"\n{render(found[0])}\n")
    ok = [difference <= TOLERANCE, *(_compare(name, [results[name] for results in found]) for name in found[0])]
    _say(f"export loads with plain timm, strict; features differ by at most {difference:.1e}")
    _say(f"report: {Path.cwd() / MIRROR / 'runs' / runs[0].id / 'report.html'}")
    _say(f"next: {steps.steps(place(), runs[0].id, 'status', 'logs')}; again from scratch: make demo FRESH=1")
    return OK if all(ok) else BUG


def _end_runs(root: str) -> None:
    """Nobody may go on with a run when the server is about to end."""
    from core.storage import StoreError
    from jobs.errors import JobError
    from jobs.record import Run
    from jobs.verbs.runs import cancel

    for run in Run.list(root):
        if Run(root, run).view().active:
            try:
                cancel(Settings(run=run, store=root))
            except (JobError, StoreError) as error:  # it has just ended by itself
                _say(str(error))


def _one(settings: Settings) -> tuple[int, str]:
    """Submit, and evaluate and export what has not been yet.  Returns submit's exit code and the run."""
    from core.evaluate.run import evaluate
    from core.export import export
    from jobs.record import State
    from jobs.spec import run_id
    from jobs.verbs.submit import submit

    code = submit(settings)
    run = _newest(settings.store, run_id(settings.load_recipe()))
    if code == OK and run.last().state != State.SUCCEEDED:  # left with Ctrl-C
        _say("make demo goes on from here")
        return PREEMPTED, run.id
    if code == OK and not _results(run):
        export(run.store, run.root, ["timm"])
        evaluate(run.store, run.root, [], _say)
    return code, run.id


def _compare(protocol: str, found: list[dict[str, Any]]) -> bool:
    """Say whether every seed's student is as far above the untrained ones as the recipe asks."""
    top1 = [next(row["top1"] for row in result["rows"] if row["model"] == "student") for result in found]
    least, asked = min(result["margin"]["reached"] for result in found), found[0]["margin"]["asked"]
    ok: bool = least >= asked
    scores = ", ".join(f"{value:.1f}" for value in top1)
    verdict = "as asked" if ok else "NOT REACHED"
    above = f"at least {least:.1f} points above the best untrained one, {asked:g} asked: {verdict}"
    _say(f"{protocol}: student top-1 {scores} with {len(found)} seed(s); {above}")
    return ok


def _newest(root: str, wanted: str) -> Any:
    """The latest run of the recipe: its id, or that with -2, -3 ... appended by FRESH=1."""
    from jobs.record import Run

    same = [found for found in Run.list(root) if found == wanted or found.startswith(f"{wanted}-")]
    return Run(root, max(same, key=lambda found: (len(found), found)))


def _results(run: Any) -> dict[str, Any]:
    entries = [e for e in run.store.list("evaluations/") if e.key.endswith(".json")]
    found = [small_json.read(run.store, e.key, dict) for e in entries]
    return {result["protocol"]: result for result in found}


def _say(text: str) -> None:
    print(text, flush=True)
