"""Gradients of many micro-batches add up without losing the small ones, also when the student computes in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core.engine import Engine
from core.methods.base import Batch
from core.recipe import Train
from tests.ranks import run_ranks

MICROS, SMALL = 64, 1 / 512  # in bf16, 1 + 1/512 is 1


class Mean(nn.Module):
    """Its weight's gradient is the mean of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, batch: Batch) -> Tensor:
        return (self.weight * batch.views["image"].mean()).sum()


def _first_moment(stage: int, precision: str) -> list[float]:
    module = Mean()
    group = {"params": [module.weight], "names": ["weight"], "weight_decay": 0.0}
    engine = Engine(module, [group], Train(batch=MICROS, micro_batch=1, precision=precision), zero_stage=stage, world=1,
                    per_parameter_clip=True, device=torch.device("cpu"))  # fmt: skip
    for micro in range(MICROS):
        engine.backward(engine.forward(Batch({"image": torch.full((1,), 1.0 if micro == 0 else SMALL)})) * MICROS)
    engine.step(lambda scale: scale * 0.0)
    return [float(f.view("exp_avg").mean()) for f in engine.fragments()]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_small_gradients_survive_next_to_a_large_one(stage: int, precision: str) -> None:
    ((moment,),) = run_ranks(_first_moment, 1, stage, precision)
    assert moment == pytest.approx(0.1 * (1 + (MICROS - 1) * SMALL), rel=1e-3)  # Adam's first moment: (1 - beta1) g
