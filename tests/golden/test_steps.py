"""The recorded whole steps through the engine, at every ZeRO stage, in the precision of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden import steps
from tests.golden.runner import Case, deviation, load_case

UNIC = Path(__file__).parent / "unic"


def reproducible(case: Case) -> np.ndarray:
    """Which entries of `out.final_sum` float32 can reproduce.

    A bias on the keys shifts all scores of a query alike, which softmax ignores: its gradient is exactly zero and in
    float32 rounding noise, which Adam normalises to steps of full size. In a sum over the whole qkv bias these show;
    its square sum and all other parameters are compared.
    """
    names = [str(name) for name in case["out.final_names"] if name != steps.UNUSED]
    return np.array([not name.endswith("attn.qkv.bias") for name in names])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("unit", ["train_steps", "ddp2_train"])
def test_the_engine_reproduces_recorded_steps_at_every_zero_stage(unit: str, stage: int) -> None:
    case = load_case(UNIC / f"{unit}.npz")
    checks = getattr(steps, unit)(case, stage)
    left_out = {f"out.final.{steps.UNUSED}"}
    assert {name for name, *_ in checks} == {name for name in case if name.startswith("out.")} - left_out
    errors = {}
    for name, got, want, tolerance in checks:
        keep = reproducible(case) if name == "out.final_sum" else slice(None)
        got, want = np.asarray(got), np.asarray(want)
        errors[name] = deviation(got[keep] if got.ndim else got, want[keep] if want.ndim else want) / tolerance
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


def test_only_two_entries_of_ninety_five_are_left_out() -> None:
    case = load_case(UNIC / "train_steps.npz")
    assert len(case["out.final_names"]) == 95
    assert (~reproducible(case)).sum() == 2
