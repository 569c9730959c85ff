"""Which stored features a run reads: noted by its first rank, asked before old ones are cleared away."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from core import small_json
from core.config import fingerprint
from core.recipe import Recipe
from core.storage import Store

FOLDER = "features"  # of a run


class Note(NamedTuple):
    recipe: str  # fingerprint of what the stage began with
    sets: list[str]  # folders of the feature store


def note(run: Store, recipe: Recipe, stage: str, sets: Iterable[str]) -> None:
    """sets: folders of the feature store that the stage reads, perhaps none.  Raises StoreError."""
    run.put(f"{FOLDER}/{stage}.json", json.dumps(Note(fingerprint(recipe), sorted(sets))._asdict()).encode())


def noted(run: Store) -> dict[str, Note]:
    """By stage, of those that have begun.  Raises StoreError."""
    keys = [entry.key for entry in run.list(f"{FOLDER}/")]
    return {key.removeprefix(f"{FOLDER}/").removesuffix(".json"): _note(run, key) for key in keys}


def _note(run: Store, key: str) -> Note:
    """Of a note that is damaged, one of no recipe."""
    try:
        found = Note(**small_json.read(run, key, dict))
        sound = isinstance(found.sets, list) and all(isinstance(name, str) for name in found.sets)
    except (ValueError, TypeError):
        sound = False
    return found if sound else Note("", [])
