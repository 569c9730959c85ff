"""The recorded whole Proteus steps through the engine, at every ZeRO stage, in the precision of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.proteus_steps import train_steps
from tests.golden.runner import deviation, load_case

PROTEUS = Path(__file__).parent / "proteus"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["train_steps_dinov2", "train_steps_synclr"])
def test_two_ranks_reproduce_recorded_steps_at_every_zero_stage(name: str, stage: int) -> None:
    case = load_case(PROTEUS / f"{name}.npz")
    checks = list(train_steps(case, stage, world=2))
    assert len(checks) == 1 + sum(key.startswith(("w/", "ema/")) for key in case)
    errors = {array: deviation(got, want) / tolerance for array, got, want, tolerance in checks}
    assert {array: error for array, error in errors.items() if not error <= 1} == {}
