"""Feature-Distillation's recorded steps, both stages, through the engine at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import steps_fd
from tests.golden.runner import deviation, load_case

FD = Path(__file__).parent / "fd"
CASES = [("train_steps_fd_vit", 2), ("train_steps_fd_accum", 2), ("train_steps_fd_swin_c", 2),
         ("train_steps_finetune", 1)]  # name, ranks  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_the_engine_reproduces_recorded_steps_at_every_zero_stage(name: str, ranks: int, stage: int) -> None:
    """Distillation on two ranks, a micro-batch each; fine-tuning in three micro-batches of one image."""
    case = load_case(FD / f"{name}.npz")
    unit = steps_fd.train_steps_finetune if "finetune" in name else steps_fd.train_steps_fd
    errors = {
        check: deviation(got, want) / (tolerance or 1e-9) for check, got, want, tolerance in unit(case, stage, ranks)
    }
    assert errors
    assert {check: error for check, error in errors.items() if not error <= 1} == {}
