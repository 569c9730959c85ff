"""Every published recipe to its end at toy size: the same code path, two ranks, DeepSpeed, real images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from core.config import load, names, to_dict
from core.merge import flatten
from core.recipe import Recipe
from tests.ranks import run_ranks

RECIPES = [name for name in names() if name != "demo"]
# At toy size these differ from a recipe that is trained here in what ALIKE names; make soak trains them too.
STANDS_FOR = {
    "proteus-s": ("proteus-b", "proteus-l", "proteus-s-cls20", "proteus-s-cls50", "proteus-s-img20", "proteus-s-img50"),
    "fd-clip-b": ("fd-clip-b-100ep", "fd-clip-l"),
    "fd-dino-b": ("fd-deit-b",),
    "udi-s": ("udi-s-100ep", "udi-b", "udi-l"),
}
ALIKE = (
    r"name|about\..*|teachers\.teacher\.(name|licence)|student\.(name|drop_path|args\.patch_size)|data\.(classes|share)|"
    r"train\.(epochs|img_size|lr|min_lr)|method\.options\.(scale|norm_last_layer)|stages\.distil\.epochs|"
    r"stages\.finetune\.(epochs|lr|min_lr|warmup_epochs|student\.drop_path|method\.options\.(layer_decay|warmup_lr))"
)
LEFT_OUT = {name for others in STANDS_FOR.values() for name in others}
ELSEWHERE = {"unic-l"}  # trained by test_journeys, from a bucket


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file://{tmp_path_factory.mktemp('recipes')}"


def _train(recipe: Recipe, root: str, folder: str = "", stop_after: int = 0) -> list[dict[str, Any]]:
    from core.storage import open_store
    from core.train import Outcome, train

    rows: list[dict[str, Any]] = []
    run = open_store(f"{root}/runs/{folder or recipe.name}")
    outcome = train(recipe, run, root, 1, rows.append, lambda: 0 < stop_after <= len(rows))
    assert outcome is (Outcome.PREEMPTED if stop_after else Outcome.FINISHED)
    return rows


@pytest.fixture(scope="session")
def rows_of(root: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Logged rows of a recipe's run at toy size, with overrides."""

    @cache
    def rows_of(name: str, *overrides: str) -> list[dict[str, Any]]:
        from core.registry import complete
        from jobs.inputs import preparer

        fixed = [f"loader.cache_dir={tmp_path_factory.getbasetemp()}/cache", "log.tensorboard=false"]
        recipe = complete(load(name, "smoke", [*fixed, *overrides]))
        module = preparer(recipe)
        assert module is not None
        module.prepare(recipe, root, print)
        rows: list[dict[str, Any]] = run_ranks(_train, 2, recipe, root, timeout_s=300)[0]
        return rows

    return rows_of


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in LEFT_OUT | ELSEWHERE else name for name in RECIPES]
)
def test_the_loss_on_held_out_images_falls_in_every_stage(name: str, rows_of: Callable[..., Any]) -> None:
    rows = rows_of(name)
    for stage in load(name).stage_names():
        heldout = [row["heldout_loss"] for row in rows if row["stage"] == stage and row.get("heldout_loss") is not None]
        losses = [row["loss"] for row in rows if row["stage"] == stage and "loss" in row]
        print(f"{name} {stage}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
              f"held-out {heldout[0]:.4f} -> {heldout[-1]:.4f}")  # fmt: skip
        assert all(map(math.isfinite, losses))
        assert heldout[-1] < heldout[0]


def test_a_recipe_that_is_left_out_differs_in_sizes_counts_and_rates_from_the_one_that_stands_for_it() -> None:
    assert set(RECIPES) > LEFT_OUT
    for name, others in STANDS_FOR.items():
        assert name not in LEFT_OUT
        one = flatten(to_dict(load(name, "smoke")))
        for other in others:
            another = flatten(to_dict(load(other, "smoke")))
            differing = {key for key in one.keys() | another.keys() if one.get(key) != another.get(key)}
            assert not [key for key in differing if not re.fullmatch(ALIKE, key)], f"{other} and {name}"


@pytest.mark.parametrize(
    "name",
    ["unic-b", "udi-s", *(pytest.param(n, marks=pytest.mark.soak) for n in ("proteus-s", "fd-clip-b", "dime-fm-b32"))],
)
def test_bf16_follows_fp32(name: str, rows_of: Callable[..., Any]) -> None:
    """What must stay fp32 (losses, statistics, centring) does, or the curves would part within these steps."""
    assert load(name, "smoke").stage(load(name).stage_names()[0]).precision == "bf16"
    half, full = ([row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None]  # nothing is dropped
                  for rows in (rows_of(name), rows_of(name, "train.precision=fp32", f"name={name}-fp32")))  # fmt: skip
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("name", ["dime-fm-b32", "udi-s"])
def test_a_run_stopped_on_two_ranks_goes_on_as_if_nothing_had_been_on_one(name: str, root: str, rows_of: Any) -> None:
    """The stream of sentences, averages, centres and the last layer's own count of steps come back."""
    short = ("train.precision=fp32", "train.steps=8", "train.batch=16", f"name={name}-short")
    if name == "udi-s":
        short += ("data.share=0.05",)  # so that the last layer's frozen epoch ends on the way
    whole = {row["step"]: row["loss"] for row in rows_of(name, *short) if "loss" in row}
    from core.registry import complete

    recipe = complete(load(name, "smoke", ["log.tensorboard=false", *short]))
    run_ranks(_train, 2, recipe, root, f"{name}-stopped", 3)
    resumed = {row["step"]: row["loss"] for row in run_ranks(_train, 1, recipe, root, f"{name}-stopped")[0]
               if "loss" in row}  # fmt: skip
    assert min(resumed) > 3
    assert max(resumed) == 8
    assert list(resumed.values()) == pytest.approx([whole[step] for step in resumed], rel=1e-4)


def test_the_smoke_profile_changes_sizes_counts_and_weights_only() -> None:
    """Options, stages, views and parameter groups are those of the recipe, so that what is tested is what runs."""
    for name in RECIPES:
        full, toy = load(name), load(name, "smoke")
        assert full.method.name == toy.method.name
        assert beside_sizes(full.method.options) == beside_sizes(toy.method.options), name
        assert full.stage_names() == toy.stage_names()
        assert full.student.name == toy.student.name
        assert {k: t.name for k, t in full.teachers.items()} == {k: t.name for k, t in toy.teachers.items()}
        for stage in full.stage_names():
            a, b = full.at(stage).method, toy.at(stage).method
            assert (a.name, beside_sizes(a.options)) == (b.name, beside_sizes(b.options)), f"{name}, {stage}"


def beside_sizes(options: dict[str, Any]) -> dict[str, Any]:
    """Options but the sizes of heads and the number and size of crops, which decide what a step costs."""
    sizes = ("hidden", "bottleneck", "out", "local_crops", "local_size")
    return {name: value for name, value in options.items() if name not in sizes}
