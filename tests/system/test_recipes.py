"""Every published recipe to its end at toy size: the same code path, two ranks, DeepSpeed, real images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from core.config import Recipe, load, names
from tests.ranks import run_ranks

RECIPES = [name for name in names() if name != "demo"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file://{tmp_path_factory.mktemp('recipes')}"


def _train(recipe: Recipe, root: str) -> list[dict[str, Any]]:
    from core.storage import open_store
    from core.train import Outcome, train

    rows: list[dict[str, Any]] = []
    run = open_store(f"{root}/runs/{recipe.name}")
    assert train(recipe, run, root, 1, rows.append, lambda: False) is Outcome.FINISHED
    return rows


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_on_held_out_images_falls_in_every_stage(name: str, root: str, tmp_path: Path) -> None:
    from core.methods.base import complete
    from jobs.inputs import preparer

    recipe = complete(load(name, "smoke", [f"loader.cache_dir={tmp_path}", "log.tensorboard=false"]))
    module = preparer(recipe)
    assert module is not None
    module.prepare(recipe, root, print)
    rows = run_ranks(_train, 2, recipe, root, timeout_s=300)[0]
    for stage in recipe.stage_names():
        heldout = [row["heldout_loss"] for row in rows if row["stage"] == stage and row.get("heldout_loss") is not None]
        losses = [row["loss"] for row in rows if row["stage"] == stage and "loss" in row]
        print(f"{name} {stage}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
              f"held-out {heldout[0]:.4f} -> {heldout[-1]:.4f}")  # fmt: skip
        assert all(map(math.isfinite, losses))
        assert heldout[-1] < heldout[0]


def test_the_smoke_profile_changes_sizes_counts_and_weights_only() -> None:
    """Options, stages, views and parameter groups are those of the recipe, so that what is tested is what runs."""
    for name in RECIPES:
        full, toy = load(name), load(name, "smoke")
        assert full.method.name == toy.method.name
        assert full.method.options == toy.method.options, name
        assert full.stage_names() == toy.stage_names()
        assert full.student.name == toy.student.name
        assert {k: t.name for k, t in full.teachers.items()} == {k: t.name for k, t in toy.teachers.items()}
        for stage in full.stage_names():
            assert full.at(stage).method == toy.at(stage).method, f"{name}, {stage}"
