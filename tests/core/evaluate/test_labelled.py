"""What an evaluation would refuse is known before a run is queued."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from core.config import ConfigError
from core.evaluate.features import FeatureSet
from core.evaluate.labelled import check_labels, labelled_sources
from core.evaluate.linear import probe
from core.folder import FileStore
from core.recipe import Evaluate, Recipe
from tests.core.data.images import jpeg


def put(root: Path, *keys: str) -> None:
    for key in keys:
        FileStore(root).put(key, jpeg(0))


def recipe(**fields: object) -> Recipe:
    return Recipe(name="x", evaluate=Evaluate(train="store:train", test="store:test", **fields))  # type: ignore[arg-type]


def check(root: Path, chosen: Recipe) -> None:
    check_labels(chosen, labelled_sources(chosen, f"file://{root}", "x"))


def test_sets_with_the_same_class_folders_are_good(tmp_path: Path) -> None:
    put(tmp_path, *(f"{part}/{c}/{i}.jpg" for part in ("train", "test") for c in "ab" for i in range(2)))
    check(tmp_path, recipe())


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (["a/1.jpg"], "store:test lacks 1 of the 2, for example 'b'"),
        (["a/1.jpg", "b/1.jpg", "c/1.jpg"], "store:train lacks 1 of the 3 of store:test, for example 'c'"),
        (["1.jpg", "2.jpg"], "store:test has no labels: its 2 images lie in no class folder"),
        (["a/1.jpg", "b/1.jpg", "lost.jpg"], "some images have no label, 1 of 3 of store:test"),
    ],
)
def test_other_classes_and_images_without_one_are_refused(tmp_path: Path, test: list[str], message: str) -> None:
    put(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(2)), *(f"test/{key}" for key in test))
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, recipe())


def test_a_learning_rate_is_not_chosen_by_nothing(tmp_path: Path) -> None:
    put(tmp_path, *(f"{part}/{c}/1.jpg" for part in ("train", "test") for c in "ab"))
    with pytest.raises(ConfigError, match="linear sets a part of each class aside .* no class of evaluate.train"):
        check(tmp_path, recipe())
    check(tmp_path, recipe(protocols=["knn"]))
    single = FeatureSet(torch.eye(2), torch.arange(2))
    with pytest.raises(ConfigError, match="no class of evaluate.train has two"):
        probe(single, single, 2, 0)
    pair = FeatureSet(torch.eye(3), torch.tensor([0, 0, 1]))
    found = probe(pair, pair, 2, 0)
    assert all(map(math.isfinite, found.values()))
    json.dumps(found, allow_nan=False)
