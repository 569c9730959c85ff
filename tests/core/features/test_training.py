"""Runs from stored teacher outputs against runs whose teachers see the same views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import from_yaml, to_yaml
from core.features import usage
from core.features.run import store, works
from core.recipe import Method, Recipe
from core.registry import complete
from core.storage import open_store
from core.train import train
from tests import toy
from tests.ranks import run_ranks

VIEWS, STEPS = 2, 14  # two epochs and a bit


def recipe(features: str, codec: str = "fp32", method: str = "unic", **train_settings: Any) -> Recipe:
    found = toy.recipe(train={"steps": STEPS, **train_settings}, data={"views": VIEWS, "codec": codec})
    found.features = features
    if method != "unic":
        found.method = Method(name=method)
    return complete(from_yaml(to_yaml(found)))


def fill(wanted: Recipe, root: str) -> None:
    for work in works(wanted, root, ("train", "heldout")):
        store(work, root, torch.device("cpu"), print)


def stored(root: str, wanted: Recipe) -> None:
    """In a rank, whose number of threads decides how sums are rounded."""
    run_ranks(fill, 1, wanted, root)


def losses(wanted: Recipe, root: str, name: str) -> dict[int, float]:
    rows: list[dict[str, Any]] = []
    train(wanted, open_store(f"{root}/runs/{name}"), root, 1, rows.append, lambda: False)
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run(wanted: Recipe, root: str, name: str) -> dict[int, float]:
    return run_ranks(losses, 1, wanted, root, name)[0]


@pytest.mark.parametrize(
    ("method", "precision"), [("unic", "fp32"), ("unic", "bf16"), ("proteus", "fp32"), ("fd", "fp32")]
)
def test_a_run_from_losslessly_stored_features_is_the_run_with_live_teachers(
    tmp_path: Path, method: str, precision: str
) -> None:
    root = toy.store(tmp_path)
    live = run(recipe("off", method=method, precision=precision), root, "live")
    stored(root, recipe("off", method=method, precision=precision))
    found = run(recipe("require", method=method, precision=precision), root, "stored")
    assert len(found) == STEPS
    assert found == live


def test_a_run_with_half_of_its_features_computes_the_rest_and_is_the_same(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    live = run(recipe("off"), root, "live")
    (work,) = works(recipe("off"), root, ["train"])  # in parts of a few rows, which others then keep to
    for found in work.sets.values():
        found.begin()
    stored(root, recipe("off"))
    for first, found in enumerate(work.sets.values()):  # of each teacher others
        for part in range(first, len(found.ends), 2):
            found.drop(0, part)
    half = run(recipe("auto"), root, "half")
    assert half == pytest.approx(live, rel=1e-5)


def test_a_run_notes_which_stored_features_it_reads(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    stored(root, recipe("off"))
    sets = {entry.key.split("/")[0] for entry in open_store(f"{root}/features").list()}
    for features, expected in (("require", {"main": sorted(sets)}), ("off", {})):
        run(recipe(features, steps=2), root, features)
        noted = usage.noted(open_store(f"{root}/runs/{features}"))
        assert {stage: note.sets for stage, note in noted.items()} == expected
