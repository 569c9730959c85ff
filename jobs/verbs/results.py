"""eval, export and report: results joined to the run that they are of."""

from __future__ import annotations

import json
from typing import Any

from core import machine
from jobs.errors import OK, UserError
from jobs.record import Run
from jobs.settings import Settings
from jobs.table import table
from jobs.verbs.resume import with_overrides
from jobs.verbs.submit import say

PLANNED_FORMATS = ("hf", "onnx")


def evaluate(settings: Settings) -> int:
    from core.config import to_yaml
    from core.evaluate import run as evaluation

    run = Run.find(settings.root(), settings.need("run"))
    protocols = names(settings.eval)
    evaluation.check_protocols(protocols)
    recipe = run.recipe()
    if settings.set:
        recipe = with_overrides(recipe, settings)
        run.write_recipe(to_yaml(recipe))
    with machine.told(recipe):
        results: dict[str, Any] = evaluation.evaluate(run.store, run.root, protocols, _quiet if settings.json else say)
    print(json.dumps(results, indent=1) if settings.json else render(results))
    return OK


def export(settings: Settings) -> int:
    formats = names(settings.format or "timm")
    for name in formats:
        if name in PLANNED_FORMATS:
            raise UserError(f"FORMAT: {name} is not built yet; there is timm, safetensors")
    run = Run.find(settings.root(), settings.need("run"))
    from core import export as exporter

    for uri in exporter.export(run.store, run.root, formats):
        print(uri)
    return OK


def report(settings: Settings) -> int:
    run = Run.find(settings.root(), settings.need("run"))
    from core.report import write

    print(write(run.store, run.root))
    return OK


def names(text: str) -> list[str]:
    """`a,b` -> [a, b]"""
    return [name.strip() for name in text.split(",") if name.strip()]


def render(results: dict[str, Any]) -> str:
    """Table of all protocols' rows, or the numbers as they are when a protocol has none."""
    rows = [(protocol, row) for protocol, result in results.items() for row in result.get("rows", ())]
    if not rows:
        return json.dumps(results, indent=1)
    metrics = list(dict.fromkeys(k for _, row in rows for k in row if k != "model"))
    cells = [[protocol, str(row["model"]), *(_number(row.get(k, "")) for k in metrics)] for protocol, row in rows]
    return table(["protocol", "model", *metrics], cells)


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _quiet(text: str) -> None:
    pass
