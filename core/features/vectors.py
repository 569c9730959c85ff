"""Vectors of whole images and of sentences that training reads in place of a CLIP: what they are of, and the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data.decode import CorruptImage, to_tensor
from core.data.draws import uniform
from core.data.loader import in_workers
from core.data.pillow import whole_pil
from core.data.sentences import CorruptText, sentence
from core.data.source import DataError, Source
from core.data.tsv import Tables, open_tables
from core.data.views import normalize
from core.features import sets
from core.features.about import SCHEMA, SPLITS, About, Split
from core.features.clip import IMAGE, TOKENS, Clip, clip_of
from core.features.work import GLOBAL_ROWS, Chunk, Work
from core.methods.base import Batch, Outputs
from core.models.text import SLOTS, tokenize
from core.storage import open_store, resolve

if TYPE_CHECKING:
    from core.inputs import Inputs

TEXT_DRAWS = 0  # seed of which of a row's sentences is meant: runs of all seeds share vectors
Item = tuple[tuple[int, int, range], Tensor, list[int]]  # task, images or token ids of its rows, rows that have none


def splits(inputs: Inputs) -> list[Split]:
    """What the stage's method reads vectors of."""
    wanted: dict[Split, bool] = {
        "train": "images" in inputs.vectors,
        "heldout": "images" in inputs.vectors and inputs.held is not None,
        "texts": "texts" in inputs.vectors,
    }
    return [split for split in SPLITS if wanted[split]]


def open_texts(inputs: Inputs, root: str) -> Tables:
    """The sentences of a recipe.  Raises DataError, StoreError."""
    data = inputs.recipe.data
    uri = resolve(data.texts or data.source, root)
    tables = open_tables(open_store(uri), "text")
    if tables is None or not len(tables):
        raise DataError(
            f"{uri}: no sentences; set data.texts to a folder with tables of them, which text.list names, one path a "
            "line, or which have caption, text_ or -text in their names"
        )
    return tables


def describe(inputs: Inputs, split: Split, root: str) -> About:
    """Raises ConfigError, DataError, WeightsError, StoreError."""
    clip = clip_of(inputs.clips)
    common = {"schema": SCHEMA, "codec": inputs.recipe.data.codec, "outputs": {"cls": [clip.info.projection]}}
    if split == "texts":
        tables = open_texts(inputs, root)
        return common | {
            "data": tables.fingerprint(), "rows": len(tables), "texts": {"slots": SLOTS, "draws": TEXT_DRAWS},
            "precision": "fp32", "teacher": clip.about_texts(root),
        }  # fmt: skip
    source = _images(inputs, split)
    return common | {
        "data": source.fingerprint(), "rows": len(source), "images": {"whole": clip.info.img_size, "resize": "pillow"},
        "precision": inputs.settings.precision, "teacher": clip.about_images(root),
    }  # fmt: skip


def plan(inputs: Inputs, split: Split, root: str) -> Work:
    """Raises as `describe`, and FeatureError."""
    clip, about = clip_of(inputs.clips), describe(inputs, split, root)
    texts = open_texts(inputs, root) if split == "texts" else None
    sizes = texts.sizes if texts is not None else _images(inputs, split).shard_sizes
    made = {clip.name: sets.planned(root, about, sets.division(sizes, 1, GLOBAL_ROWS))}
    if texts is not None:
        return SentenceWork(inputs, split, made, 1, clip, texts)
    return ImageWork(inputs, split, made, 1, clip)


def _images(inputs: Inputs, split: Split) -> Source:
    source = inputs.source if split == "train" else inputs.held
    assert source is not None
    return source


@dataclass
class VectorWork(Work):
    """Vectors by row, which no epoch draws anew."""

    clip: Clip
    replays: ClassVar[bool] = False

    def _batches(
        self, rows: Dataset[Item], items: Iterable[str], device: torch.device
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks, to be given their batches, and what they are to be made of: (micro_batch, ...) on the device."""
        size, loader = self.inputs.settings.micro_batch, self.inputs.recipe.loader
        for (view, part, span), found, bad in in_workers(rows, self.tasks(items), loader.workers, loader.prefetch):
            whole = found.new_zeros(size, *found.shape[1:])  # whole always: other shapes may round in another way
            whole[: len(found)] = found
            yield Chunk(view, part, span, Batch({}), bad, None), whole.to(device)


@dataclass
class ImageWork(VectorWork):
    """Whole images, short side at the tower's size, as CLIP was trained and is evaluated."""

    @property
    def title(self) -> str:
        return f"{self.split}, whole images at {self.clip.info.img_size} px"

    def chunks(self, items: Iterable[str], device: torch.device) -> Iterator[Chunk]:
        rows = _Images(_images(self.inputs, self.split), self.clip.info.img_size)
        for chunk, pixels in self._batches(rows, items, device):
            chunk.batch.views[IMAGE] = normalize(pixels)
            yield chunk

    def outputs(self, root: str, device: torch.device) -> dict[str, Outputs]:
        return {self.clip.name: self.clip.image_tower(self.inputs.recipe, root, device, self.dtype)}


@dataclass
class SentenceWork(VectorWork):
    """One sentence of every row of text tables."""

    texts: Tables

    @property
    def title(self) -> str:
        return "texts, a sentence of each row"

    def chunks(self, items: Iterable[str], device: torch.device) -> Iterator[Chunk]:
        for chunk, ids in self._batches(_Sentences(self.texts), items, device):
            chunk.batch.extra[TOKENS] = ids
            yield chunk

    def outputs(self, root: str, device: torch.device) -> dict[str, Outputs]:
        return {self.clip.name: self.clip.text_tower(root, device)}


@dataclass(frozen=True)
class _Images(Dataset[Item]):
    source: Source
    size: int

    def __getitem__(self, task: tuple[int, int, range]) -> Item:
        """uint8 (B, 3, size, size), black where an image cannot be read."""
        span = task[2]
        pixels, bad = torch.zeros(len(span), 3, self.size, self.size, dtype=torch.uint8), []
        for place, row in enumerate(span):
            try:
                pixels[place] = whole_pil(to_tensor(self.source.read(row).data), self.size, self.size)
            except CorruptImage:
                bad.append(row)
        return task, pixels, bad


@dataclass(frozen=True)
class _Sentences(Dataset[Item]):
    texts: Tables

    def __getitem__(self, task: tuple[int, int, range]) -> Item:
        """int64 (B, slots); nothing between start and end where a row holds no sentence."""
        found, bad = [], []
        for row in task[2]:
            try:
                found.append(row_sentence(self.texts, row))
            except CorruptText:
                found.append("")
                bad.append(row)
        return task, tokenize(found), bad


def row_sentence(texts: Tables, row: int) -> str:
    """The sentence of a row whose vector is stored: where there are several, drawn by the row's number.

    Raises CorruptText, DataError, StoreError.
    """
    draw: Any = uniform(TEXT_DRAWS, 0, np.array([row]), 0, 1)
    return sentence(texts.pair(row)[1], float(draw[0, 0]))
