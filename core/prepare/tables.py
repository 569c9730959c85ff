"""The handwritten digits as tables: pictures, vectors of them by a fixed random map, and sentences with vectors.

Stands in for a CLIP and a corpus: a sentence names a digit, and its vector is the mean one of some pictures of it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.data.tsv import write_index
from core.prepare import digits
from core.recipe import Recipe
from core.storage import Store, open_store

DIM, SENTENCES, PICTURES_EACH = 32, 640, 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PREFIX = "data/digits-tables"
TABLES = {f"store:{PREFIX}/{split}": split for split in ("train", "heldout")}
Floats = NDArray[np.float64]
Say = Callable[[str], None]


def provides(recipe: Recipe) -> list[str]:
    """Addresses this module can make; labelled digits for the evaluation come from `digits`."""
    return [*TABLES, *digits.provides(recipe)]


def prepare(recipe: Recipe, root: str, say: Say) -> None:
    """Make what the recipe names and the store lacks."""
    store = open_store(root)
    for uri, split in TABLES.items():
        if uri in (recipe.data.source, recipe.data.heldout, recipe.data.features, recipe.data.texts):
            _write_split(store.sub(f"{PREFIX}/{split}"), split, say)
    digits.prepare(recipe, root, say)


def vectors(scans: Floats) -> Floats:
    """(N, 8, 8) grey scans -> (N, DIM): a fixed random layer, centred over the images of this set."""
    hidden = np.tanh(scans.reshape(len(scans), -1) / 16 @ np.random.RandomState(1).normal(0, 0.3, (64, DIM)))
    return np.asarray(hidden - hidden.mean(0))


def _write_split(store: Store, split: str, say: Say) -> None:
    if store.size("image.list") is not None:
        return
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))[slice(*digits.SPLITS[split])]
    scans, labels = found.images[order], found.target[order]
    features = vectors(scans)
    say(f"writing tables of {len(order)} handwritten digits and {SENTENCES} sentences to {store.uri}")
    rows = [(f"digit-{i:04d}", _base64(_png(scan))) for i, scan in zip(order, scans, strict=True)]
    _write(store, "image", rows, [_base64(v.astype("<f4").tobytes()) for v in features])
    _write(store, "text", *_sentences(features, labels))


def _sentences(features: Floats, labels: NDArray[np.int64]) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows of the sentences and payloads of their vectors."""
    random, rows, payloads = np.random.RandomState(2), [], []
    for number in range(SENTENCES):
        digit = number % len(NAMES)
        shown = random.choice(np.flatnonzero(labels == digit), PICTURES_EACH)
        rows.append((f"s{number:04d}", json.dumps({"captions": [f"a scan of the digit {NAMES[digit]}"]})))
        payloads.append(_base64(features[shown].mean(0).astype("<f4").tobytes()))
    return rows, payloads


def _write(store: Store, kind: str, rows: Sequence[tuple[str, str]], vectors: Sequence[str]) -> None:
    """Two tables of each kind, cut at two thirds, with their indexes and lists."""
    cut = 2 * len(rows) // 3
    names = [f"{kind}_{part:02d}" for part in range(2)]
    for name, part in zip(names, (slice(0, cut), slice(cut, None)), strict=True):
        keyed = ((key, vector) for (key, _), vector in zip(rows[part], vectors[part], strict=True))
        for key, content in ((f"tsv/{name}.tsv", iter(rows[part])), (f"feat/{name}.feat.tsv", keyed)):
            store.put(key, _table(content))
            write_index(store, key)
    store.put(f"{kind}_feat.list", "".join(f"feat/{name}.feat.tsv\n" for name in names).encode())
    store.put(f"{kind}.list", "".join(f"tsv/{name}.tsv\n" for name in names).encode())


def _table(rows: Iterator[tuple[str, str]]) -> bytes:
    return "".join(f"{key}\t{payload}\n" for key, payload in rows).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _png(scan: Floats) -> bytes:
    image = Image.fromarray((scan * (255 / 16)).astype(np.uint8), "L").resize((digits.SIDE, digits.SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
