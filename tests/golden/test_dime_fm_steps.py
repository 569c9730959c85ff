"""The recorded whole steps of DIME-FM through the engine, at every ZeRO stage, however the batch is shared out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden import dime_fm_steps as steps
from tests.golden.runner import Check, deviation, load_case

CASE = Path(__file__).parent / "dime_fm" / "train_steps_vit_a.npz"
# A bias on the keys has no gradient but rounding noise, which Adam makes steps of full size of: see test_steps.
NOISE = "attn.in_proj_bias"


def errors(checks: list[Check]) -> dict[str, float]:
    """Errors over the tolerance; of losses relative, as the folder's README has them."""
    found = {}
    for name, got, want, tolerance in checks:
        got, want = np.asarray(got), np.asarray(want)
        scale = np.abs(want).clip(min=1e-12) if name.startswith("per_step") else 1.0
        found[name] = deviation(got / scale, want / scale) / tolerance
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_reproduces_recorded_steps_on_two_ranks(stage: int) -> None:
    for rank in steps.at_stage(load_case(CASE), stage, ranks=2, micros=4):
        assert {n: e for n, e in errors(rank).items() if not e <= 1 and not n.endswith(NOISE)} == {}


def test_a_batch_in_one_piece_takes_the_same_steps() -> None:
    (rank,) = steps.at_stage(load_case(CASE), 1, ranks=1, micros=1)
    found = errors(rank)
    assert {n: e for n, e in found.items() if not e <= 1 and not n.endswith(NOISE)} == {}
    assert len(found) == 5 + 2 * 20
    assert sum(name.endswith(NOISE) for name in found) == 2
