"""Attempts of toy-sized runs on real ranks, with what interrupts them, and what they computed."""

from __future__ import annotations

import os
import signal
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import checkpoint
from core.config import load
from core.metrics import read_metrics
from core.recipe import Recipe
from core.storage import Store, open_store
from tests import toy
from tests.cli import wait_for

CLOCKS = ("images_per_s", "data_wait", "eta_s")  # what two equal runs may differ in
METHODS = ("toy", "proteus-s", "fd-clip-b", "dime-fm-b32", "udi-s")  # toy: UNIC with small heads
Step = int
Seen = dict[tuple[Step, int], tuple[list[int], int]]  # (step of the run, micro-batch) -> samples, checksum of images


@dataclass
class Attempt:
    """What one rank does; picklable. `kill_rank` kills itself when asked for its wish the `kill_at`-th time."""

    recipe: Recipe
    root: str
    name: str
    number: int = 1
    stop_at: int = 10**9
    stop_rank: int = 0
    kill_at: int = 10**9
    kill_rank: int = 0
    watch: bool = False  # keep what was trained on
    store: Callable[[Store], Store] = field(default=lambda store: store)  # a module-level function

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        if kept["store"].__name__ == "<lambda>":
            del kept["store"]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"store": lambda store: store, **state})


def run(attempt: Attempt) -> tuple[str, list[dict[str, Any]], Seen]:
    """Outcome's name, logged rows, what was trained on."""
    from core.stage import Stage
    from core.train import train

    rank, calls, rows, seen = int(os.environ["RANK"]), iter(range(1, 10**9)), list[dict[str, Any]](), Seen()

    def should_stop() -> bool:
        call = next(calls)
        if rank == attempt.kill_rank and call >= attempt.kill_at:
            if call > attempt.recipe.checkpoint.every_steps:  # a busy machine may take some steps for committing one
                wait_for("a checkpoint", lambda: checkpoint.newest(store))
            os.kill(os.getpid(), signal.SIGKILL)
        return rank == attempt.stop_rank and call >= attempt.stop_at

    batch = Stage.batch
    if attempt.watch:
        Stage.batch = _watched(batch, seen)  # type: ignore[method-assign]
    store = attempt.store(open_store(f"{attempt.root}/runs/{attempt.name}"))
    try:
        outcome = train(attempt.recipe, store, attempt.root, attempt.number, rows.append, should_stop)
    finally:
        Stage.batch = batch  # type: ignore[method-assign]
    return outcome.name, rows, seen


def several(attempts: list[Attempt]) -> list[tuple[str, list[dict[str, Any]], Seen]]:
    """One after the other in one process group."""
    return [run(attempt) for attempt in attempts]


def _watched(batch: Any, seen: Seen) -> Any:
    def watched(stage: Any, micro: Any) -> Any:
        found = batch(stage, micro)
        images = b"".join(found.views[name].numpy().tobytes() for name in sorted(found.views))
        seen[stage.first_step + micro.step + 1, micro.micro] = micro.index.tolist(), zlib.crc32(images)
        return found

    return watched


def recipe_of(name: str, zero: int = 1, steps: int = 6, *overrides: str) -> Recipe:
    """A published recipe at toy size, or the toy one: accumulation, loaders, a checkpoint every second step."""
    from core.registry import complete

    precision = "fp32" if zero == 0 else "bf16"
    sizes = f"train.steps={steps} train.batch=8 train.micro_batch=2 checkpoint.every_steps=2 checkpoint.keep=9"
    fixed = f"log.tensorboard=false loader.workers=1 data.heldout= train.precision={precision} zero.stage={zero}"
    changes = [*sizes.split(), *fixed.split(), *overrides]
    if name != "toy":
        return complete(load(name, "smoke", changes))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.yaml"
        path.write_text(toy.RECIPE)
        return complete(load(str(path), "", changes))


def prepared(root: str, *names: str) -> str:
    """The store with the inputs of these recipes."""
    from jobs.inputs import preparer

    for name in names:
        if name == "toy":
            toy.store(Path(root.removeprefix("file://")))
            continue
        recipe = recipe_of(name)
        module = preparer(recipe)
        assert module is not None
        module.prepare(recipe, root, lambda text: None)
    return root


def metrics(root: str, name: str) -> list[dict[str, Any]]:
    """Rows of a run as readers see them, without clocks and rates."""
    rows = read_metrics(open_store(f"{root}/runs/{name}"))
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def losses(root: str, name: str) -> dict[tuple[str, Step], float]:
    return {(row["stage"], row["step"]): row["loss"] for row in metrics(root, name) if "loss" in row}


def tensors(root: str, name: str) -> dict[str, Any]:
    """Weights, moments, buffers and method state of the newest checkpoint."""
    store = open_store(f"{root}/runs/{name}")
    manifest = checkpoint.newest(store)
    assert manifest is not None
    reader = checkpoint.Reader(store, manifest)
    kinds = ("weight", "exp_avg", "exp_avg_sq", "buffer", "method")
    return {f"{kind}/{key}": value for kind in kinds for key, value in reader.whole(kind).items()}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
