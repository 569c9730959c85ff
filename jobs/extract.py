"""One worker of `make features`, wherever it was started: `python -m jobs.extract --store URI --order NAME`."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from core import small_json
from core.small_json import Unreadable
from jobs import spec
from jobs.errors import OK, PREEMPTED, code_of, describe

if TYPE_CHECKING:
    from core.features.about import Split
    from core.recipe import Recipe
    from core.storage import Store

ORDERS = "features/orders"


def order(root: str, recipe: Recipe, splits: list[Split]) -> str:
    """Write down what workers are to do; returns its name.  Raises StoreError."""
    from core.config import to_yaml
    from core.storage import open_store

    content = {"recipe": to_yaml(recipe), "splits": splits}
    name = _name(content)
    stored = content | {"commit": spec.code().commit}
    open_store(root).put(f"{ORDERS}/{name}.json", json.dumps(stored).encode())
    return name


def is_order(store: Store, key: str) -> bool:
    """Whether `order` wrote this object: it bears the name of its content.  Raises StoreError."""
    name = key.removeprefix(f"{ORDERS}/").removesuffix(".json")
    try:
        _read(store, name)
    except Unreadable:
        return False
    return key == f"{ORDERS}/{name}.json"


def arguments(root: str, name: str) -> list[str]:
    """Of Python, for a worker."""
    return ["-m", "jobs.extract", "--store", root, "--order", name]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.extract")
    parser.add_argument("--store", required=True)
    parser.add_argument("--order", required=True)
    options = parser.parse_args(words)
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, _leave)
    try:
        work(options.store, options.order)
    except Exception as error:
        print(describe(error), file=sys.stderr)
        return code_of(error)
    return OK


def work(root: str, name: str) -> None:
    """Raises what reading data, teachers and the store raises."""
    from core.config import from_yaml
    from core.features import run
    from core.storage import open_store

    content = _read(open_store(root), name)
    if difference := spec.difference(content.get("commit", "")):
        _say(difference)
    recipe = from_yaml(content["recipe"])
    device = run.device(recipe)
    for each in run.works(recipe, root, content["splits"]):
        run.store(each, root, device, _say)


def _read(store: Store, name: str) -> dict[str, Any]:
    """An order as it was given: its name is its digest.  Raises Unreadable, StoreError."""
    content = small_json.read(store, f"{ORDERS}/{name}.json", dict)
    if _name({key: content.get(key) for key in ("recipe", "splits")}) != name:
        raise Unreadable(f"{store.uri}/{ORDERS}/{name}.json",
                         "it has been changed since it was given: make features RECIPE=... gives it again")  # fmt: skip
    return content


def _name(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _leave(signum: int, frame: object) -> None:
    """Give back what is not finished, for others to do at once, and say whether to start this worker again."""
    raise SystemExit(PREEMPTED if signum == signal.SIGUSR2 else 128 + signum)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
