"""What there is to store of one split of a stage, and the images of it in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from core.batches import clean_batch, on_device
from core.data.cutting import BOX
from core.data.loader import clean_batches, row_batches
from core.features import sets
from core.features.about import Split, describe, rows
from core.features.live import Live
from core.features.sets import FeatureSet
from core.methods.base import Batch, Outputs
from core.models.teachers import load_teachers

if TYPE_CHECKING:
    from core.inputs import Inputs

DENSE_ROWS, GLOBAL_ROWS = 256, 16384  # of a part: some hundred megabytes of tokens, some tens of class features


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a part. batch: on the device, filled up to the micro-batch size."""

    view: int
    part: int
    rows: range  # of the data
    batch: Batch
    bad: list[int]  # rows among these whose image cannot be read
    boxes: Tensor | None  # (B, 5) of the crops, see core.data.cutting


@dataclass
class Work:
    """Outputs of teachers for the views that they see in training.  sets: by teacher, all divided alike."""

    inputs: Inputs
    split: Split
    sets: dict[str, FeatureSet]
    views: int
    replays: ClassVar[bool] = True  # training must go round the stored views, `data.views`

    @property
    def title(self) -> str:
        """What there is to do, in a few words."""
        return f"{self.split} at {self.inputs.settings.img_size} px"

    @property
    def dtype(self) -> torch.dtype:
        """In which teachers compute."""
        return torch.bfloat16 if self.inputs.settings.precision == "bf16" else torch.float32

    @property
    def any_set(self) -> FeatureSet:
        return next(iter(self.sets.values()))

    def items(self) -> list[str]:
        """`view-part` of everything there is to do."""
        return [f"{view}-{part}" for view in range(self.views) for part in range(len(self.any_set.ends))]

    def done(self) -> set[str]:
        """Items that are finished for every teacher."""
        return set.intersection(
            *({f"{v}-{p}" for v in range(self.views) for p in s.done(v)} for s in self.sets.values())
        )

    def is_done(self, item: str) -> bool:
        view, part = place(item)
        return all(found.is_done(view, part) for found in self.sets.values())

    def size(self, item: str) -> int:
        """Rows of an item."""
        return len(self.any_set.rows(place(item)[1]))

    def chunks(self, items: Iterable[str], device: torch.device) -> Iterator[Chunk]:
        """Batches over the rows of items, which are taken from the iterator as the loader gets to them."""
        return (self._drawn if self.split == "train" else self._clean)(self.tasks(items), device)

    def outputs(self, root: str, device: torch.device) -> dict[str, Outputs]:
        """The teachers, loaded.  Raises WeightsError, StoreError, ConfigError."""
        inputs = self.inputs
        loaded = load_teachers(inputs.recipe, inputs.info, inputs.teachers, root, device, self.dtype)
        return {name: Live(teacher, inputs.method.teacher_view) for name, teacher in loaded.items()}

    def tasks(self, items: Iterable[str]) -> Iterator[tuple[int, int, range]]:
        """View, part and consecutive rows of it, a micro-batch at most."""
        size = self.inputs.settings.micro_batch
        for view, part in map(place, items):
            span = self.any_set.rows(part)
            for at in range(span.start, span.stop, size):
                yield view, part, range(at, min(at + size, span.stop))

    def _drawn(self, tasks: Iterable[tuple[int, int, range]], device: torch.device) -> Iterator[Chunk]:
        method, recipe, size = self.inputs.method, self.inputs.recipe, self.inputs.settings.micro_batch
        # Whole batches always: matrix products of another shape may round in another way.
        wanted = ((task, np.resize(np.arange(task[2].start, task[2].stop), size), task[0]) for task in tasks)
        for (view, part, span), micro in row_batches(
            self.inputs.source, method.views(), wanted, seed=recipe.seed, workers=recipe.loader.workers,
            prefetch=recipe.loader.prefetch, pin=device.type == "cuda", crops=method.crops(),
            fast=recipe.data.pixels == "fast",
        ):  # fmt: skip
            bad = [row for row, found in zip(span, micro.index.tolist(), strict=False) if found != row]
            boxes = micro.extra[f"{BOX}{method.teacher_view}"]
            yield Chunk(view, part, span, on_device(micro, method, recipe, device), bad, boxes)

    def _clean(self, tasks: Iterable[tuple[int, int, range]], device: torch.device) -> Iterator[Chunk]:
        method, recipe, held = self.inputs.method, self.inputs.recipe, self.inputs.held
        side, size = self.inputs.settings.img_size, self.inputs.settings.micro_batch
        assert held is not None
        wanted = ((task, task[2]) for task in tasks)
        loader = clean_batches(held, side, wanted, recipe.loader.workers, recipe.loader.prefetch)
        for (view, part, span), (images, labels, index) in loader:
            whole, known = torch.zeros(size, 3, side, side, dtype=torch.uint8), torch.full((size,), -1)
            whole[index - span.start], known[index - span.start] = images, labels
            filled = torch.arange(span.start, span.start + size)
            batch = clean_batch(whole, known, filled, method, recipe.seed, device)
            yield Chunk(view, part, span, batch, sorted(set(span) - set(index.tolist())), None)


def place(item: str) -> tuple[int, int]:
    view, part = item.split("-")
    return int(view), int(part)


def plan(inputs: Inputs, split: Split, root: str) -> Work | None:
    """Raises FeatureError, WeightsError, StoreError; None where there is nothing to store."""
    source = inputs.source if split == "train" else inputs.held
    if source is None or not inputs.teachers:
        return None
    recipe, views = inputs.recipe, views_of(inputs, split)
    repeats = recipe.data.repeats if split == "train" else 1
    ends = sets.division(source.shard_sizes, repeats, DENSE_ROWS if "patch" in inputs.method.reads() else GLOBAL_ROWS)
    assert ends[-1] == rows(source, recipe, split)
    made = {name: sets.planned(root, about, ends) for name, about in describe(inputs, split, root).items()}
    return Work(inputs, split, made, views)


def views_of(inputs: Inputs, split: Split) -> int:
    """Stored views of an image: of a training image as many as the recipe replays, of a held-out one its clean one."""
    return max(inputs.recipe.data.views, 1) if split == "train" else 1
