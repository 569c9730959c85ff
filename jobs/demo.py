"""`make demo`: the whole journey on this machine, against an embedded S3 server that starts and ends with it.

The server keeps objects in memory; what must outlive it is mirrored under .retort/demo and loaded again next time.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.errors import BUG, OK, PREEMPTED
from jobs.settings import Settings

MIRROR = Path(".retort") / "demo"
BUCKET = "retort-demo"
TOLERANCE = 1e-4  # largest difference of features between the exported and the trained student


def main(settings: Settings) -> int:
    """Run, evaluate, export, report; shows the results when it is all done already.  Returns an exit code."""
    from core.storage import file_uri, open_store

    began = time.monotonic()
    with _server() as root:
        store, mirror = open_store(root), open_store(file_uri(Path.cwd() / MIRROR))
        copied = _copy(mirror, store)
        _say(f"embedded S3 server: {root} at {os.environ['AWS_ENDPOINT_URL']} ({copied} objects from {MIRROR}/)")
        try:
            code = _journey(replace(settings, recipe="demo", store=root))
        finally:
            _copy(store, mirror)
    _say(f"demo: {time.monotonic() - began:.0f} s")
    return code


def _journey(first: Settings) -> int:
    """The recipe once for each of `evaluate.students` seeds; the first run is the one that is shown."""
    from core.export import verify
    from core.report import write
    from jobs.verbs.results import render

    recipe = first.load_recipe()
    seeds = [recipe.seed + i for i in range(recipe.evaluate.students)]
    runs = []
    for number, seed in enumerate(seeds):
        _say(f"\nseed {seed} ({number + 1} of {len(seeds)})")
        code, run = _one(replace(first, set=(*first.set, f"seed={seed}") if number else first.set))
        if code != OK:
            return code
        runs.append((run, _results(run)))
    run, results = runs[0]
    difference = verify(run.store)
    for each, _ in runs:
        write(each.store, each.root)
    print(f"\n{render(results)}\n")
    ok = [difference <= TOLERANCE, *(_compare(name, [found[name] for _, found in runs]) for name in results)]
    _say(f"export loads with plain timm, strict; features differ by at most {difference:.1e}")
    _say(f"report: {Path.cwd() / MIRROR / 'runs' / run.id / 'report.html'}")
    _say("again from scratch: make demo FRESH=1")
    return OK if all(ok) else BUG


def _one(settings: Settings) -> tuple[int, Any]:
    """Submit, and evaluate and export what has not been yet.  Returns submit's exit code and the run."""
    from core.evaluate.run import evaluate
    from core.export import export
    from jobs.record import State
    from jobs.spec import run_id
    from jobs.verbs.runs import cancel
    from jobs.verbs.submit import submit

    code = submit(settings)
    run = _newest(settings.store, run_id(settings.load_recipe()))
    if code == OK and run.last().state != State.SUCCEEDED:  # left with Ctrl-C, and the server is about to end
        cancel(replace(settings, run=run.id))
        _say("make demo goes on from here")
        return PREEMPTED, run
    if code == OK and not _results(run):
        export(run.store, run.root, ["timm"])
        evaluate(run.store, run.root, [], _say)
    return code, run


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
    found = [json.loads(run.store.get(e.key)) for e in entries]
    return {result["protocol"]: result for result in found}


def _copy(source: Any, target: Any) -> int:
    """Bring target in line with source; returns how many objects source has."""
    there = {e.key: e.size for e in target.list()}
    here = {e.key: e.size for e in source.list()}
    for key in here:
        target.put(key, source.get(key))
    target.delete(*[key for key in there if key not in here])
    return len(here)


@contextmanager
def _server() -> Iterator[str]:
    """An S3-compatible server on a free loopback port, its random credentials in the environment; yields a store."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20), "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        os.environ.pop(name, None)
    os.environ.update(own)
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}/store"
    finally:
        server.stop()


def _say(text: str) -> None:
    print(text, flush=True)
