"""Run folders as the loop, the worker and the evaluation leave them, without having trained anything."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from typing import Any

from core import commits
from core.config import to_yaml
from core.metrics import MetricsLog
from core.recipe import Recipe, Teacher
from core.storage import Store, open_store
from tests.core import logs
from tests.core.logs import manifest

START = 1_800_000_000.0  # seconds since the epoch
Json = dict[str, Any]


class RunFolder:
    """A run in a store of its own; each call adds one part."""

    def __init__(self, root: str, run_id: str = "toy-0123456789") -> None:
        self.root = root
        self.store: Store = open_store(self.root).sub(f"runs/{run_id}")

    def recipe(self, name: str = "toy", teachers: Iterable[str] = ("big", "wise"), **fields: Any) -> RunFolder:
        described = {t: Teacher("vit_base_patch16_224", licence=f"licence of {t}") for t in teachers}
        recipe = Recipe(name=name, teachers=described)
        recipe.method.name = "any"
        for field, value in fields.items():
            setattr(recipe, field, value)
        self.store.put("recipe.yaml", to_yaml(recipe).encode())
        known = {t: {"weights": f"store:weights/{t}.st", "sha256": f"{i:064x}"} for i, t in enumerate(teachers)}
        code = {"commit": "c0ffee", "dirty": False, "packages": {"torch": "2.11"}}
        self._put("record.json", {**code, "fingerprint": "f" * 64, "dotlist": ["train.lr=1"], "teachers": known})
        return self

    def moves(self, *moves: tuple[str, int, float, Json]) -> RunFolder:
        """(state, attempt, seconds after the start, info) each."""
        for n, (state, attempt, after_s, info) in enumerate(moves):
            move = {"number": n, "state": state, "time": START + after_s, "attempt": attempt, "info": info}
            self._put(f"transitions/{n:06d}.json", move)
        return self

    def succeeded(self) -> RunFolder:
        info = {"ranks": 2, "device": "cpu", "host": "here"}
        begun = [("created", 0, 0, {}), ("queued", 1, 1, {}), ("running", 1, 10, info)]
        return self.moves(*begun, ("succeeded", 1, 85, {}))

    def metrics(self, rows: Iterable[Json], attempt: int = 1, start_step: int = 0) -> RunFolder:
        """Rows of an attempt, flushed; it starts at a checkpoint of `start_step`, which the one before it has taken."""
        claim = self._claim(attempt, start_step)
        log = MetricsLog(self.store, claim, start_step, lambda name, put: put())
        for row in rows:
            log.write(row)
        log.flush()
        return self

    def evaluation(self, protocol: str, rows: list[Json], **more: Any) -> RunFolder:
        self._put(f"evaluations/{protocol}.json", {"protocol": protocol, "rows": rows, **more})
        return self

    def checkpoint(self, step: int, attempt: int = 1, committed: bool = True, size: int = 1000) -> RunFolder:
        about = manifest(step, self._claim(attempt, step), attempt=attempt, created=time.time(),
                         metrics=[e.key for e in self.store.list("metrics/")],
                         files={"rank-0000.safetensors": {"size": size, "crc32c": 0}})  # fmt: skip
        self.store.put(f"{about.key}/rank-0000.safetensors", bytes(size))
        if committed:
            logs.log(self.store, about)
        return self

    def _claim(self, attempt: int, step: int) -> int:
        """Number of the attempt's start in the log, where it is made if need be."""
        claims = {claim.attempt: claim.number for claim in commits.claims(self.store)}
        if attempt not in claims:
            if claims and step not in [m.position.step for m in commits.checkpoints(self.store)]:
                self.checkpoint(step, max(claims))
            last = next(commits.checkpoints(self.store), None)
            logs.log(self.store, logs.claim(attempt, last.number if last else None, step if last else 0))
            return commits.numbers(self.store)[-1]
        return claims[attempt]

    def exported(self, **arguments: Any) -> RunFolder:
        self.store.put("export/model.safetensors", bytes(2500))
        self._put("export/config.json", arguments)
        return self

    def _put(self, key: str, content: Json) -> None:
        self.store.put(key, json.dumps(content).encode())


def training_rows(
    steps: int, teachers: Iterable[str] = ("big", "wise"), stage: str = "main", first: int = 0
) -> list[Json]:
    """Rows of one stage, of a shape that training has."""
    rows = []
    for step in range(first + 1, first + steps + 1):
        loss = math.exp(-step / 40) + 0.1
        each = {f"part_{t}": loss * (1 + 0.2 * i) for i, t in enumerate(teachers)}
        where = {"stage": stage, "step": step, "steps": first + steps, "epoch": 0}
        pace = {"images_per_s": 100.0 + step % 3, "data_wait": 0.02, "eta_s": 90.0, "bad_samples": 0}
        rows.append({**where, "loss": loss, **each, "lr": 1e-3 * loss, **pace})
    return rows


def scores(**top1: float) -> list[Json]:
    return [{"model": model.replace("_", " "), "top1": value, "top5": 99.5} for model, value in top1.items()]
