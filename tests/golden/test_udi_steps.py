"""UDI's recorded steps through the engine, at every ZeRO stage, in the precision of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden import udi_steps
from tests.golden.runner import deviation, load_case

UDI = Path(__file__).parent / "udi"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["train_step_epoch0", "train_step_epoch2"])
def test_the_engine_reproduces_recorded_steps_at_every_zero_stage(name: str, stage: int) -> None:
    case = dict(load_case(UDI / f"{name}.npz"))
    checks = udi_steps.train_step(case, stage)
    recorded = {key for key in case if key.split("/")[0] in ("student1", "teacher1", "center1")}
    assert recorded <= {key for key, *_ in checks}
    wrong = {key: deviation(got, want) for key, got, want, tol in checks if not deviation(got, want) <= tol}
    assert wrong == {}


def test_the_last_layer_rests_in_epoch_0_alone() -> None:
    for name, rests in (("train_step_epoch0", True), ("train_step_epoch2", False)):
        case = load_case(UDI / f"{name}.npz")
        key = "head.0.last_layer.weight_v"
        assert np.array_equal(case[f"student0/{key}"], case[f"student1/{key}"]) == rests
