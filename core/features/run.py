"""One worker of `make features`: everything of a recipe that is not stored yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.features import measure, vectors
from core.features.about import IMAGES, Split
from core.features.codec import row_bytes
from core.features.extract import Say, extract
from core.features.verify import verify
from core.features.work import Work, plan
from core.inputs import Inputs, open_inputs, shard_cache
from core.recipe import Recipe


def stages(recipe: Recipe, root: str) -> list[Inputs]:
    """Stages of a recipe whose methods take outputs of teachers.  Raises ConfigError, DataError, StoreError."""
    cache = shard_cache(recipe.loader)
    opened = (open_inputs(recipe, name, root, cache, beside=False) for name in recipe.stage_names())
    return [inputs for inputs in opened if inputs.teachers or inputs.vectors]


def works(recipe: Recipe, root: str, splits: Sequence[Split]) -> list[Work]:
    """What there is to store.  Raises as `stages`, and FeatureError, WeightsError."""
    planned = (_planned(inputs, split, root) for inputs in stages(recipe, root) for split in splits)
    return [work for work in planned if work is not None]


def _planned(inputs: Inputs, split: Split, root: str) -> Work | None:
    if split in vectors.splits(inputs):
        return vectors.plan(inputs, split, root)
    return plan(inputs, split, root) if split in IMAGES else None


def store(work: Work, root: str, device: torch.device, say: Say) -> None:
    """Compute and write what is missing; returns when all is there.  Raises FeatureError, DataError, StoreError."""
    for found in work.sets.values():
        found.begin()
    if len(work.done()) < len(work.items()):
        extract(work, work.outputs(root, device), root, device, say)
    for found in work.sets.values():
        for view in range(work.views):
            found.seal(view)


def check(work: Work, root: str, device: torch.device, say: Say) -> list[str]:
    """See `core.features.verify`."""
    return verify(work, work.outputs(root, device), device, say)


def device(recipe: Recipe) -> torch.device:
    cuda = recipe.launch.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def teachers_seconds(work: Work, root: str) -> float:
    """See `core.features.measure`."""
    own = device(work.inputs.recipe)
    return measure.teachers_seconds(work, work.outputs(root, own), own)


def total_bytes(work: Work) -> int:
    """Of all teachers' outputs, headers and boxes aside."""
    each = sum(row_bytes(found.about["codec"], found.about["outputs"]) for found in work.sets.values())
    return each * work.any_set.ends[-1] * work.views
