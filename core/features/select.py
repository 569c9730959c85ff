"""DIME-FM's corpus: of many sentences those that images show, chosen by stored vectors, and prompts of class names.

`make features RECIPE=dime-fm-b32 SELECT="store:data/chosen top=10 least=0.2"` stores what is missing of the vectors of
data.source's images and of data.texts' sentences, then writes the chosen ones to the given folder as tables of
sentences and of their vectors: a folder for `data.texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from core.data.corpus import TableWriter, admissible, class_prompts
from core.data.features import FeatureSource
from core.data.source import DataError
from core.data.tsv import Tables
from core.features.about import Split
from core.features.clip import TOKENS, clip_of
from core.features.source import StoreFeatures
from core.features.vectors import open_texts, row_sentence
from core.inputs import open_inputs, shard_cache
from core.methods.base import Batch, Outputs
from core.models.text import tokenize
from core.recipe import Recipe
from core.storage import open_object, open_store, resolve

Ints = NDArray[np.int64]
SPLITS: tuple[Split, ...] = ("train", "texts")
IMAGES_AT_ONCE, SENTENCES_AT_ONCE, SCORES_AT_ONCE = 1 << 20, 1 << 14, 1 << 27
PROMPTS_AT_ONCE = 256


@dataclass
class Rules:
    """Defaults are our choice: nothing is published."""

    top: int = 5  # an image keeps so many of its nearest sentences
    least: float = 0.0  # and of these only such with this cosine
    english: float = 0.9  # least share of a sentence's letters that are ASCII; 0 takes every language
    names: str = ""  # a file of class names, one a line, whose prompts are added: file:///x, s3://x, store:x


def select(recipe: Recipe, to: str, rules: Rules, root: str, device: torch.device, say: Callable[[str], None]) -> int:
    """Write the chosen sentences of a recipe's first stage; returns their number.

    recipe: with features=require, so that all vectors are there.  to: resolved address of an empty folder.
    Raises FeatureError, DataError, StoreError, WeightsError.
    """
    inputs = open_inputs(recipe, recipe.stage_names()[0], root, shard_cache(recipe.loader))
    images, texts = (_stored(inputs.stored.vectors.get(split)) for split in SPLITS)
    corpus, prompts = Corpus(open_texts(inputs, root), texts), class_prompts(_names(rules.names, root))
    if next(iter(open_store(to).list()), None) is not None:
        raise DataError(f"{to}: not empty; name another folder for the chosen sentences, or remove this one")
    good = np.flatnonzero(admissible(corpus.sentences(), rules.english))
    say(f"{len(good):,} of {len(texts):,} sentences are short, English and there once")
    kept = grounded(images, texts, good, rules.top, rules.least, device, say)
    if not len(kept) and not prompts:
        raise DataError(f"no sentence of {corpus.tables} is chosen; lower `least`, raise `top`")
    writer = TableWriter(open_store(to))
    corpus.write(kept, writer)
    if prompts:
        _write_prompts(prompts, clip_of(inputs.clips).text_tower(root, device), device, writer)
    writer.close()
    say(f"{len(kept):,} sentences that images show and {len(prompts):,} prompts of class names are in {to}")
    return writer.rows


@dataclass(frozen=True)
class Corpus:
    """Sentences, and the vectors of those that there are."""

    tables: Tables
    vectors: StoreFeatures

    def sentences(self) -> Iterator[str]:
        """Of every vector."""
        rows = self.vectors.rows_of(np.arange(len(self.vectors)))
        return (row_sentence(self.tables, int(row)) for row in rows)

    def write(self, kept: Ints, writer: TableWriter) -> None:
        """kept: numbers of vectors."""
        for part in _cut(kept, SENTENCES_AT_ONCE):
            for row, vector in zip(self.vectors.rows_of(part).tolist(), _read(self.vectors, part), strict=True):
                writer.add(self.tables.pair(row)[0], row_sentence(self.tables, row), vector)


def _write_prompts(prompts: list[str], tower: Outputs, device: torch.device, writer: TableWriter) -> None:
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = prompts[first : first + PROMPTS_AT_ONCE]
        vectors = tower(Batch({}, extra={TOKENS: tokenize(some).to(device)})).cls.cpu().numpy()
        for number, (text, vector) in enumerate(zip(some, vectors, strict=True), first):
            writer.add(f"prompt-{number}", text, vector)


@torch.no_grad()
def grounded(
    images: FeatureSource, texts: FeatureSource, candidates: Ints, top: int, least: float, device: torch.device,
    say: Callable[[str], None], images_at_once: int = IMAGES_AT_ONCE,
) -> Ints:  # fmt: skip
    """Candidates (rows of texts, ascending) among the `top` nearest of at least one image, by cosine of `least`.

    Images are held on the device in blocks, and the sentences pass by each block once.
    """
    kept = np.zeros(len(candidates), bool)
    for first in range(0, len(images), images_at_once):
        block = np.arange(first, min(first + images_at_once, len(images)))
        image_ND = torch.cat([_units(images, part, device) for part in _cut(block, SENTENCES_AT_ONCE)])
        score_NK = image_ND.new_zeros(len(block), 0)
        index_NK = torch.zeros(len(block), 0, dtype=torch.int64, device=device)
        for start in range(0, len(candidates), SENTENCES_AT_ONCE):
            text_MD = _units(texts, candidates[start : start + SENTENCES_AT_ONCE], device)
            score_NK, index_NK = _nearest(image_ND, text_MD, start, score_NK, index_NK, top)
        kept[index_NK[score_NK >= least].cpu().numpy()] = True
        say(f"{int(block[-1]) + 1:,} of {len(images):,} images have chosen {int(kept.sum()):,} sentences")
    return candidates[kept]


def _nearest(
    image_ND: Tensor, text_MD: Tensor, start: int, score_NK: Tensor, index_NK: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Scores and numbers of the nearest sentences so far, and now among M more, numbered from `start`."""
    rows = max(1, SCORES_AT_ONCE // len(text_MD))
    found = [(image_bD @ text_MD.T).topk(min(top, len(text_MD))) for image_bD in torch.split(image_ND, rows)]
    scores = torch.cat([score_NK, torch.cat([part.values for part in found])], dim=1)
    index = torch.cat([index_NK, torch.cat([part.indices for part in found]) + start], dim=1)
    best = scores.topk(min(top, scores.shape[1]))
    return best.values, index.gather(1, best.indices)


def _units(source: FeatureSource, index: Ints, device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(_read(source, index)).to(device), dim=-1)


def _read(source: FeatureSource, index: Ints) -> NDArray[np.float32]:
    """(B, D)."""
    (vectors,) = source.read(index).values()
    return np.asarray(vectors, np.float32)


def _cut(index: Ints, size: int) -> list[Ints]:
    return [index[first : first + size] for first in range(0, len(index), size)]


def _stored(found: FeatureSource | None) -> StoreFeatures:
    """All vectors that there are: what could not be read is passed over.  Raises DataError."""
    if not isinstance(found, StoreFeatures):
        raise DataError("sentences are chosen by stored vectors of images: this method reads none; take dime-fm-b32")
    return StoreFeatures(found.teacher, found.rows, gapless=True)


def _names(address: str, root: str) -> list[str]:
    """Lines of a file."""
    if not address:
        return []
    store, key = open_object(resolve(address, root))
    try:
        lines = store.get(key).decode().splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{address}: not UTF-8 text; give one class name a line") from None
    return [line.strip() for line in lines if line.strip()]
