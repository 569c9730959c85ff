from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.data.features import FeatureSource, open_features
from core.data.source import DataError
from core.data.tsv import open_tables
from core.features import select as selection
from core.features.clip import clip_of
from core.features.select import Rules, grounded, select
from core.storage import open_store
from tests.core.features.test_vectors import fill, read, recipe, write_table
from tests.core.features.test_vectors import root as root

CPU = torch.device("cpu")


class Given(FeatureSource):
    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def describe(self) -> dict[str, tuple[int, ...]]:
        return {"clip": self.vectors.shape[1:]}

    def read(self, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {"clip": self.vectors[index]}


def nearest(images: Any, texts: Any, candidates: Any, top: int, least: float) -> list[int]:
    """All cosines at once."""
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts[candidates])]
    scores = units[0] @ units[1].T
    kept = {int(j) for row in scores for j in np.argsort(-row)[:top] if row[j] >= least}
    return [int(candidates[j]) for j in sorted(kept)]


@pytest.mark.parametrize(("top", "least"), [(1, -1.0), (3, 0.0), (3, 0.5), (100, -1.0)])
def test_sentences_are_kept_that_are_among_the_nearest_of_an_image(
    monkeypatch: pytest.MonkeyPatch, top: int, least: float
) -> None:
    monkeypatch.setattr(selection, "SENTENCES_AT_ONCE", 7)
    monkeypatch.setattr(selection, "SCORES_AT_ONCE", 21)
    draw = np.random.default_rng(top)
    images, texts = (draw.normal(size=(n, 6)).astype(np.float32) for n in (23, 50))
    candidates = np.flatnonzero(draw.random(50) < 0.8)
    said: list[str] = []
    found = grounded(Given(images), Given(texts), candidates, top, least, CPU, said.append, images_at_once=10)
    assert found.tolist() == nearest(images, texts, candidates, top, least)
    assert len(said) == 3


def test_images_that_could_not_be_read_choose_nothing(root: str, tmp_path: Path) -> None:
    works = fill(recipe(), root)
    (images,) = works["train"].sets.values()
    for name in ("view-0/part-000000.json", "view-0/index.json"):
        told = json.loads(images.store.get(name))
        told.get("0", told)["bad"] = [0, 2]
        images.store.put(name, json.dumps(told).encode())
    said: list[str] = []
    select(recipe("require"), f"file://{tmp_path}/chosen", Rules(top=1, least=-1.0), root, CPU, said.append)
    assert said[1].startswith("46 of 46 images have chosen")


def test_chosen_sentences_and_prompts_become_a_folder_for_training(root: str, tmp_path: Path) -> None:
    rows = [f"k{i}\t{'null' if i == 3 else f'a photo of thing {i % 7}'}\n" for i in range(13)]
    write_table(root, "texts/text_0.tsv", rows)
    open_store(root).put("names.txt", b"cat\n\ndog\n")
    fill(recipe(), root)
    to, said = f"file://{tmp_path}/chosen", list[str]()
    count = select(recipe("require"), to, Rules(top=2, least=-1.0, names="store:names.txt"), root, CPU, said.append)
    tables, vectors = open_tables(open_store(to), "text"), open_features(to, "text_feat")
    assert tables is not None
    # Vector i is of row i up to the gap at row 3; of equal sentences the first counts.
    firsts = np.array([0, 1, 2, 3, 4, 5, 9])
    kept = nearest(read(root, "train"), read(root, "texts"), firsts, 2, -1.0)
    assert [tables.pair(i)[0] for i in range(len(kept))] == [f"k{i + (i >= 3)}" for i in kept]
    assert count == len(tables) == len(vectors) == len(kept) + 162
    np.testing.assert_array_equal(vectors.read(np.arange(len(kept)))["teacher"], read(root, "texts")[kept])
    tower: Any = clip_of(recipe().teachers).text_tower(root, CPU)
    want = tower.tower.encode(["a photo of a cat."]).numpy()
    found = vectors.read(np.arange(len(kept), len(tables)))["teacher"]
    assert np.abs(found - want).max(axis=1).min() < 1e-5
    assert said[0].startswith("7 of 12 sentences")
    with pytest.raises(DataError, match="not empty"):
        select(recipe("require"), to, Rules(), root, CPU, print)
    with pytest.raises(DataError, match="no sentence .* is chosen; lower `least`"):
        select(recipe("require"), f"{to}-2", Rules(least=1.01), root, CPU, print)
