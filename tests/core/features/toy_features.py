"""Teacher outputs of the toy run, in parts of a few rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.config import from_yaml, to_yaml
from core.features import sets
from core.features.about import About
from core.features.codec import decode
from core.features.extract import extract
from core.features.rows import Rows
from core.features.run import store, works
from core.features.sets import FeatureSet
from core.features.work import Work
from core.methods.base import Batch, Features
from core.recipe import Recipe
from core.registry import complete
from tests import toy

CPU = torch.device("cpu")
SHORT = {"beat_s": 0.1, "lease_s": 1.0}


def recipe(views: int = 1, codec: str = "fp32", features: str = "off", **data: object) -> Recipe:
    found = toy.recipe(data={"views": views, "codec": codec, **data})
    found.features = features
    found.teachers["two"].args["embed_dim"] = found.teachers["one"].args["embed_dim"]
    return complete(from_yaml(to_yaml(found)))


def planned(root: str, views: int = 1, codec: str = "fp32", **data: object) -> Work:
    """Of the training images."""
    (work,) = works(recipe(views, codec, **data), root, ["train"])
    return work


def fill(work: Work, root: str, said: list[str] | None = None) -> None:
    store(work, root, CPU, (said if said is not None else []).append)


class Pixels:
    """A teacher in a few operations: what it gives tells the image and the crop.  Counts the rows it has seen."""

    def __init__(self, width: int = 24, tokens: int = 4) -> None:
        self.width, self.tokens, self.seen = width, tokens, list[int]()

    def __call__(self, batch: Batch) -> Features:
        self.seen += batch.index.tolist()
        flat = next(iter(batch.views.values())).flatten(1)
        patch = torch.stack([flat[:, i : i + self.width] for i in range(self.tokens)], 1)
        return Features(patch.mean(1), patch)


def begun(root: str, about: About, ends: Sequence[int]) -> FeatureSet:
    """A set that is there, without parts."""
    found = sets.planned(root, about, ends)
    found.begin()
    return found


def work_off(work: Work, root: str, teacher: Pixels | None = None) -> Pixels:
    """As one worker; returns the teacher, which knows what it has seen."""
    teacher = teacher or Pixels()
    for found in work.sets.values():
        found.begin()
    extract(work, dict.fromkeys(work.sets, teacher), root, CPU, print, **SHORT)
    return teacher


def values(work: Work, teacher: str, view: int = 0) -> dict[str, Tensor]:
    """All rows of a teacher, decoded."""
    rows = Rows(work.sets[teacher], work.views, None)
    stored, missing = rows.read(view, torch.arange(work.any_set.ends[-1]).numpy())
    assert not len(missing)
    return {kind: decode(kind, stored) for kind in work.sets[teacher].about["outputs"]}


def commits(work: Work) -> Iterator[str]:
    """Parts that are there, by teacher, view and number."""
    for name, found in work.sets.items():
        for view in range(work.views):
            yield from (f"{name}/{view}/{part}" for part in sorted(found.done(view)))
