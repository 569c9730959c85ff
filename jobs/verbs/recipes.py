"""recipes and plan: what there is, and what it costs."""

from __future__ import annotations

import json

from jobs.errors import OK
from jobs.settings import Settings
from jobs.table import table


def recipes(settings: Settings) -> int:
    from core.config import load, names

    found = [load(name) for name in names()]
    rows = [
        {
            "recipe": r.name, "method": r.method.name, "student": r.student.name, "teachers": list(r.teachers),
            "data": r.data.source, "stages": r.stage_names(), "published": r.about.published,
            "gpu_hours": r.about.gpu_hours, "paper": r.about.paper,
        }
        for r in found
    ]  # fmt: skip
    if settings.json:
        print(json.dumps(rows, indent=1))
        return OK
    keys = ("recipe", "method", "student", "teachers", "data", "published", "gpu_hours")
    cells = [[_cell(row[k]) for k in keys] for row in rows]
    print(table([k.replace("_", "-") for k in keys], cells))
    print("\nnext: make plan RECIPE=NAME; make submit RECIPE=NAME")
    return OK


def _cell(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value or "to be set")


def plan(settings: Settings) -> int:
    from jobs import plan as planner

    recipe = settings.load_recipe()
    facts = planner.plan(recipe, settings.root(recipe), settings.gpu or "h100", settings.gpus,
                         settings.site().price_per_gpu_hour)  # fmt: skip
    print(json.dumps(facts, indent=1) if settings.json else planner.render(facts))
    return planner.code(facts)
