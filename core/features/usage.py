"""Which stored features a run reads: noted by its first rank, asked before old ones are cleared away."""

from __future__ import annotations

import json
from collections.abc import Iterable

from core.storage import Store

FOLDER = "features"  # of a run


def note(run: Store, stage: str, sets: Iterable[str]) -> None:
    """sets: folders of the feature store that the stage reads, perhaps none.  Raises StoreError."""
    run.put(f"{FOLDER}/{stage}.json", json.dumps(sorted(sets)).encode())


def noted(run: Store) -> dict[str, list[str]]:
    """By stage, of those that have begun.  Raises StoreError."""
    keys = [entry.key for entry in run.list(f"{FOLDER}/")]
    return {key.removeprefix(f"{FOLDER}/").removesuffix(".json"): json.loads(run.get(key)) for key in keys}
