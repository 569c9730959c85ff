"""teachers: the weights that Retort knows by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from jobs.errors import OK
from jobs.settings import Settings
from jobs.table import table

if TYPE_CHECKING:
    from core.models.known import Known

HEAD = ("name", "timm model", "weights", "upstream", "licence", "features taken", "layout", "conversion")
LEGEND = """\
conversion: golden = a recorded forward pass of the upstream code is reproduced after it; keys only = names and shapes
follow the documents; unverified = neither. No real weights were at hand when this table was made; the SHA-256 of a file
is recorded in the store when it is first used, and another file at the same address is refused later.
In a recipe: teachers: {NAME: {name: NAME OF THE TABLE}}. Your own: name: any timm model, weights: hub:ID, s3://, file:///,
store: or run:ID, in timm's keys or any layout above.
next: make plan RECIPE=NAME"""


def teachers(settings: Settings) -> int:
    from core.models.known import STUDENTS, TEACHERS

    if settings.json:
        rows = [
            {"name": name, "kind": kind, "status": known.status, **asdict(known)}
            for kind, entries in (("teacher", TEACHERS), ("student", STUDENTS))
            for name, known in entries.items()
        ]
        print(json.dumps(rows, indent=1))
        return OK
    for heading, entries in (("Teachers", TEACHERS), ("Released students", STUDENTS)):
        print(f"{heading}\n{table(HEAD, [_cells(name, known) for name, known in entries.items()])}\n")
    print(LEGEND)
    return OK


def _cells(name: str, known: Known) -> list[str]:
    where = (known.weights, known.source, known.licence)
    return [name, known.timm, *where, f"{known.cls}: {known.targets}", known.layout, known.status]
