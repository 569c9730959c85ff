"""The contract's proof: a method Retort has never heard of trains, resumes and exports through unchanged code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.config import ConfigError, from_yaml, to_yaml
from core.export import export, verify
from core.flops import stage_cost
from core.recipe import Recipe
from core.registry import complete
from core.storage import open_store
from core.train import Outcome, train
from tests import toy
from tests.ranks import run_ranks

EXTRA = str(Path(__file__).parent / "extra")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("RETORT_METHODS", EXTRA)
    text = toy.RECIPE.replace(
        "{name: unic, options: {hidden: 16, last_hidden: 24}}", "{name: constant, options: {pull: 0.2}}"
    )
    return complete(from_yaml(text.replace("embed_dim: 32, depth: 1", "depth: 1")))


def _cut(recipe: Recipe, root: str) -> list[Any]:
    """Whole, then stopped and resumed."""
    found = []
    for name, attempt, after in (("whole", 1, 99), ("cut", 1, 3), ("cut", 2, 99)):
        rows: list[dict[str, Any]] = []
        asked = iter(range(1, 1000))
        stop = lambda asked=asked, after=after: next(asked) >= after  # noqa: E731
        found.append((train(recipe, open_store(f"{root}/runs/{name}"), root, attempt, rows.append, stop), rows))
    return found


def test_it_trains_resumes_bit_equal_and_exports(recipe: Recipe, tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    (whole, first, second), _ = run_ranks(_cut, 2, recipe, root)
    assert first[0] is Outcome.PREEMPTED
    keyed = [{r["step"]: (r["loss"], r["distance"], r["centre"]) for r in rows if "loss" in r}
             for rows in (whole[1], first[1] + second[1])]  # fmt: skip
    assert keyed[0] == keyed[1]
    assert len(keyed[0]) == 6
    run = open_store(f"{root}/runs/cut")
    run.put("recipe.yaml", to_yaml(recipe).encode())
    export(run, root, ["timm"])
    assert verify(run) == 0.0


def test_it_has_a_plan_and_strict_options(recipe: Recipe) -> None:
    assert stage_cost(recipe, "main").heads == 2 * 24 * 24
    recipe.method.options["pul"] = 1
    with pytest.raises(ConfigError, match=r"field method\.options\.pul; did you mean method\.options\.pull"):
        complete(recipe)
