"""A run that stops and goes on computes what an uninterrupted one computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core import checkpoint
from core.config import fingerprint
from core.metrics import read_metrics
from core.recipe import Recipe
from core.storage import open_store
from core.train import Outcome, train
from tests import toy
from tests.ranks import run_ranks

Rows = list[dict[str, Any]]


def _train(recipe: Recipe, root: str, name: str, attempt: int, stop_after: int = 10**9) -> tuple[Outcome, Rows]:
    """One attempt on this rank, with a wish to stop after some logged rows."""
    seen: Rows = []
    asked = [0]

    def should_stop() -> bool:
        asked[0] += 1
        return asked[0] >= stop_after

    outcome = train(recipe, open_store(f"{root}/runs/{name}"), root, attempt, seen.append, should_stop)
    return outcome, seen


def _weights(root: str, name: str, recipe: Recipe) -> dict[str, Any]:
    run = open_store(f"{root}/runs/{name}")
    manifest = checkpoint.newest(run, [fingerprint(recipe)])
    assert manifest is not None
    reader = checkpoint.Reader(run, manifest)
    return {**reader.model(), **reader.whole("exp_avg"), **reader.whole("exp_avg_sq"), **reader.whole("method")}


def _twice(recipe: Recipe, root: str) -> list[Any]:
    """Uninterrupted, then stopped and resumed, in one process group."""
    whole = _train(recipe, root, "whole", 1)
    first = _train(recipe, root, "cut", 1, stop_after=2)
    second = _train(recipe, root, "cut", 2)
    return [whole, first, second]


STEP_KEYED = ("loss", "lr", "tnorm_ema_momentum", "epoch", "stage", "t_coeff_one", "loss/dist_cls_cos_two")


def _by_step(rows: Rows) -> dict[int, list[Any]]:
    return {row["step"]: [row.get(k) for k in STEP_KEYED] for row in rows if "loss" in row}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one_at_every_zero_stage(stage: int, tmp_path: Path) -> None:
    root, recipe = toy.store(tmp_path), toy.recipe(zero={"stage": stage})
    (whole, first, second), _ = run_ranks(_twice, 2, recipe, root)
    assert whole[0] is Outcome.FINISHED
    assert first[0] is Outcome.PREEMPTED
    assert second[0] is Outcome.FINISHED
    assert 1 < min(_by_step(second[1])) < 6
    uninterrupted = _by_step(whole[1])
    assert _by_step(first[1] + second[1]) == uninterrupted
    stored = read_metrics(open_store(f"{root}/runs/cut"))
    assert [row["step"] for row in stored if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert _by_step(stored) == uninterrupted
    expected, got = _weights(root, "whole", recipe), _weights(root, "cut", recipe)
    assert expected.keys() == got.keys()
    assert all(expected[k].equal(got[k]) for k in expected)


def test_bf16_resumes_bit_equal_from_its_fp32_master_weights(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    recipe = toy.recipe(train={"precision": "bf16"}, zero={"stage": 2})
    (whole, first, second), _ = run_ranks(_twice, 2, recipe, root)
    assert _by_step(first[1] + second[1]) == _by_step(whole[1])
    expected, got = _weights(root, "whole", recipe), _weights(root, "cut", recipe)
    assert all(expected[k].equal(got[k]) for k in expected)


def test_the_loss_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    root, recipe = toy.store(tmp_path), toy.recipe()
    losses = []
    for world in (1, 2, 4):
        rows = run_ranks(_train, world, recipe, root, f"world{world}", 1)[0][1]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
