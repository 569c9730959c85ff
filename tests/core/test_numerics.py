from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from core import numerics
from core.config import ConfigError, fingerprint, from_yaml, load, names, to_yaml
from core.recipe import Recipe, Student
from core.storage import open_store
from core.train import train
from tests import toy


def at(recipe: Recipe, revision: int) -> Recipe:
    return dataclasses.replace(recipe, numerics=revision)


def warming_up(epochs: float, steps: int = -1) -> Recipe:
    return at(toy.recipe(train={"warmup_epochs": epochs, "warmup_steps": steps}), numerics.CURRENT)


def test_a_change_that_bears_on_a_recipe_is_part_of_its_fingerprint() -> None:
    recipe = warming_up(1.5)
    assert fingerprint(recipe) != fingerprint(at(recipe, 0))
    assert [line[:10] for line in numerics.made_since(at(recipe, 0))] == ["2026-12-01"]
    assert numerics.made_since(recipe) == []


@pytest.mark.parametrize("recipe", [warming_up(2.0), warming_up(1.5, steps=7)])
def test_a_change_without_effect_on_a_recipe_leaves_it_alone(recipe: Recipe) -> None:
    assert fingerprint(recipe) == fingerprint(at(recipe, 0))
    numerics.require_none_since(at(recipe, 0))


@pytest.mark.parametrize(
    ("student", "bears"),
    [
        (Student("swin_tiny_patch4_window7_224"), True),
        (Student("swinv2_base_window8_256"), True),
        (Student("swin_tiny_patch4_window7_224", drop_path=0.2), False),
        (Student("swin_tiny_patch4_window7_224", {"drop_path_rate": 0.0}), False),
        (Student("focalnet_tiny_srf"), True),
        (Student("vit_base_patch16_224"), False),
    ],
)
def test_the_drop_path_of_a_network_without_one(student: Student, bears: bool) -> None:
    recipe = dataclasses.replace(toy.recipe(), student=student)
    assert bool(numerics.made_since(at(recipe, 0))) == bears


def test_a_recipe_remembers_when_it_was_resolved() -> None:
    recipe = load("unic-b")
    assert recipe.numerics == from_yaml(to_yaml(recipe)).numerics == numerics.CURRENT
    old = "\n".join(line for line in to_yaml(recipe).splitlines() if not line.startswith("numerics:"))
    assert from_yaml(old).numerics == 0
    with pytest.raises(ConfigError, match="newer Retort"):
        from_yaml(to_yaml(at(recipe, numerics.CURRENT + 1)))


def test_no_recipe_that_comes_with_retort_warms_up_otherwise() -> None:
    for name in names():
        assert not any("warm-up" in line for line in numerics.made_since(at(load(name), 0))), name


def test_ranks_refuse_a_run_that_was_begun_before_a_change(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)rounded down.*FORCE=1"):
        train(at(warming_up(1.5), 0), open_store(root).sub("runs/x"), root, 1, lambda row: None, lambda: False)
