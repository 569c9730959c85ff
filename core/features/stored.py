"""Training from stored teacher outputs: read beside the images, decoded on the device, computed where lacking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.cutting import BOX
from core.data.loader import Companion
from core.data.source import DataError
from core.features import sets, vectors
from core.features.about import IMAGES, About, Split, describe, fingerprint
from core.features.codec import FeatureError, decode
from core.features.live import Live
from core.features.rows import VIEW_BOX, Rows
from core.features.source import StoreFeatures
from core.features.work import views_of
from core.methods.base import Batch, Features, Outputs
from core.models.teachers import FrozenTeacher
from core.storage import MissingObject

if TYPE_CHECKING:
    from core.cache import ShardCache
    from core.inputs import Inputs

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Beside:
    """A companion: one teacher's stored outputs for the images of a micro-batch.

    views: stored ones of an image, which epochs go round.  box: name of the view that the teacher saw, if it was drawn.
    """

    teacher: str
    rows: Rows
    views: int
    box: str = ""

    def __call__(self, epoch: int, micro: int, position: int, index: Ints) -> dict[str, Tensor]:
        stored, missing = self.rows.read(epoch % self.views, index)
        boxes = {}
        if VIEW_BOX in stored:
            boxes[f"{BOX}{self.box}"] = stored.pop(VIEW_BOX).index_fill(0, torch.from_numpy(missing), -1)
        named = {f"{self.teacher}/{name}": value for name, value in stored.items()}
        return named | boxes | {f"{self.teacher}/missing": torch.from_numpy(missing)}


@dataclass(frozen=True)
class Stored:
    """A teacher whose outputs come with the batches of a split or of both; `live` computes those that do not."""

    name: str
    live: Live | None

    def __call__(self, batch: Batch) -> Features:
        prefix, missing = f"{self.name}/", batch.extra.get(f"{self.name}/missing")
        if missing is None:
            assert self.live is not None
            return self.live(batch)
        stored = {key.removeprefix(prefix): value for key, value in batch.extra.items() if key.startswith(prefix)}
        empty = next(iter(stored.values())).new_zeros(len(batch.index), 0, dtype=torch.float32)
        cls = decode("cls", stored) if "cls" in stored else empty
        patch = decode("patch", stored) if "patch" in stored else empty.unsqueeze(-1)
        if not len(missing):  # a shape, which the host knows
            return Features(cls, patch)
        if self.live is None:
            raise FeatureError(f"teacher {self.name}: stored features lack rows; make features RECIPE=... adds them")
        view = batch.views[self.live.view].index_select(0, missing)
        found = self.live(replace(batch, views={self.live.view: view}))
        if "cls" in stored:
            cls = cls.index_copy(0, missing, found.cls.float())
        if "patch" in stored:
            patch = patch.index_copy(0, missing, found.patch.float())
        return Features(cls, patch)


@dataclass
class Available:
    """Stored outputs that a stage can use: by split, then by teacher."""

    rows: dict[Split, dict[str, Rows]] = field(default_factory=lambda: {split: {} for split in IMAGES})
    vectors: dict[Split, StoreFeatures] = field(default_factory=dict)  # which the method's companions read
    notes: list[str] = field(default_factory=list)  # what is not there, and so computed or read from tables

    def sets(self) -> set[str]:
        """Names of all sets that are read."""
        images = {rows.set for found in self.rows.values() for rows in found.values()}
        return images | {found.rows.set for found in self.vectors.values()}

    def companions(self, inputs: Inputs, split: Split) -> list[Companion]:
        view, views = inputs.method.teacher_view, views_of(inputs, split)
        return [Beside(name, rows, views, view) for name, rows in self.rows[split].items()]

    def teachers(self, inputs: Inputs, load: Callable[[set[str]], dict[str, FrozenTeacher]]) -> dict[str, Outputs]:
        """Of every teacher of the stage.  load: teachers by name; only those that are needed are asked for."""
        splits = [split for split in IMAGES if split == "train" or inputs.held is not None]
        whole = {n for n in inputs.teachers if all(n in self.rows[s] and not self.rows[s][n].lacking() for s in splits)}
        live = {n: Live(t, inputs.method.teacher_view) for n, t in load(inputs.teachers.keys() - whole).items()}
        return {name: Stored(name, live.get(name)) for name in sorted(inputs.teachers)}


def available(inputs: Inputs, root: str, cache: ShardCache | None) -> Available:
    """What the recipe's `features` allows and the store holds.

    Raises FeatureError when features are required and are not there whole, or not these; StoreError.
    """
    found, mode = Available(), inputs.recipe.features
    if mode == "off":
        return found
    for split in vectors.splits(inputs):
        _add_vectors(found, inputs, split, root, cache)
    if not inputs.teachers:
        return found
    if not inputs.recipe.data.views:
        raise FeatureError(
            f"features: {mode}, but data.views is 0: every epoch has crops of its own, which no store can hold; set "
            "data.views to the number of stored views of an image, or features=off"
        )
    for split in IMAGES:
        if split == "heldout" and inputs.held is None:
            continue
        views = views_of(inputs, split)
        for name, about in describe(inputs, split, root).items():
            one = sets.find(root, about)
            rows = None if one is None else Rows(one, views, cache)
            lacking = _lacking(name, split, views, about, rows, root)
            if lacking and mode == "require":
                raise FeatureError(lacking)
            if lacking:
                found.notes.append(lacking)
            if rows is not None:
                found.rows[split][name] = rows
    return found


def _add_vectors(found: Available, inputs: Inputs, split: Split, root: str, cache: ShardCache | None) -> None:
    """Vectors of a split when they are there whole; else tables must have them."""
    (name,), required = inputs.clips, inputs.recipe.features == "require"
    try:
        about = vectors.describe(inputs, split, root)
    except (DataError, MissingObject) as error:  # no sentences, or no CLIP: there may be tables nevertheless
        if required:
            raise
        found.notes.append(str(error))
        return
    one = sets.find(root, about)
    rows = None if one is None else Rows(one, 1, cache)
    lacking = _lacking(name, split, 0, about, rows, root)
    if lacking and required:
        raise FeatureError(lacking)
    if lacking:
        found.notes.append(lacking)
    elif rows is not None:
        found.vectors[split] = StoreFeatures(name, rows, gapless=split == "texts")


FIELDS: dict[Split, str] = {"train": "data.source", "heldout": "data.heldout", "texts": "data.texts"}


def _lacking(name: str, split: Split, views: int, about: About, rows: Rows | None, root: str) -> str:
    """What is missing in the store, in words; nothing if nothing is."""
    what = f"features of teacher {name} for {FIELDS[split]}"
    which = f"VIEWS={views}" if split == "train" and views else f"SPLIT={split}"
    make = f"make features RECIPE=... {which} CODEC={about['codec']}"
    if rows is not None:
        lacking = rows.lacking()
        return f"{what}: {lacking} rows are not stored yet: {make}" if lacking else ""
    near, wanted = sets.nearest(root, about), f"{what} are not stored: wanted are {fingerprint(about)[:16]}"
    if near is None:
        return f"{wanted}: {make}"
    return f"{wanted}, there are {near[0][:16]}, which differ in {'; '.join(near[1][:5])}: {make}"
