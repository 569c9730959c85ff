"""A loss of the whole global batch gives the same step however the batch is shared out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core import coupled
from core.comm import Comm
from core.engine import Engine
from core.methods.base import Batch
from core.recipe import Train

BATCH = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.drop = nn.Linear(6, 5), nn.Linear(5, 4), nn.Dropout(0.5)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        hidden = self.drop(torch.tanh(self.first(batch.views["x"])))
        return {"image": self.second(hidden), "hidden": hidden}


def contrastive(outputs: dict[str, Tensor], targets: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    assert batch.index.tolist() == list(range(BATCH))
    logits = 3 * outputs["image"] @ targets.T
    loss = nn.functional.cross_entropy(logits, torch.arange(BATCH)) + outputs["hidden"].std(0).mean()
    return loss, {"logits": logits.detach().mean()}


def seed_rows(step: int, first: int) -> None:
    torch.manual_seed(1000 * step + first)


def run(micro_batch: int, zero: int) -> tuple[list[float], dict[str, Any], int]:
    """Two steps; the losses, this rank's fragments of the weights, and how often the network ran."""
    comm, net = Comm(torch.device("cpu")), Net()
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    if micro_batch == BATCH:
        net.drop.p = 0.0
    named = list(net.named_parameters())
    groups = [{"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": 0.1}]
    settings = Train(batch=BATCH, micro_batch=micro_batch, lr=0.1, eps=1e-3, precision="fp32")
    engine = Engine(net, groups, settings, zero_stage=zero, world=comm.world, per_parameter_clip=False,
                    device=comm.device)  # fmt: skip
    engine.train(True)
    generator = torch.Generator().manual_seed(5)
    images, targets = torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 4, generator=generator)

    def batch(first: int) -> Batch:
        rows = torch.arange(first, first + micro_batch)
        return Batch({"x": images[rows]}, rows)

    stage: Any = SimpleNamespace(
        engine=engine, comm=comm, batch=batch, targets=lambda b: targets[b.index], seed_network=seed_rows,
        method=SimpleNamespace(losses=contrastive),
    )  # fmt: skip
    share = BATCH // micro_batch // comm.world
    own = [micro_batch * m for m in range(comm.rank * share, (comm.rank + 1) * share)]
    losses = []
    for step in range(2):
        loss, _ = coupled.backward(stage, step, own)  # type: ignore[arg-type]
        engine.step(lambda scale: 0.1 * scale)
        losses.append(float(loss))
    pieces = {f"{f.name}@{f.start}": f.view("weight").clone().numpy() for f in engine.fragments()}
    return losses, pieces, len(calls)


def whole(ranks: list[tuple[list[float], dict[str, Any], int]]) -> dict[str, np.ndarray]:
    found = {key: piece for _, pieces, _ in ranks for key, piece in pieces.items()}
    names = sorted({key.rpartition("@")[0] for key in found})
    return {
        name: np.concatenate([found[key] for key in sorted((k for k in found if k.rpartition("@")[0] == name),
                                                           key=lambda k: int(k.rpartition("@")[2]))])
        for name in names
    }  # fmt: skip


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_ranks_step_as_one_rank_does_with_the_same_micro_batches(zero: int) -> None:
    from tests.ranks import run_ranks

    one, two = run_ranks(run, 1, 2, 1), run_ranks(run, 2, 2, zero)
    assert one[0][0] == pytest.approx(two[0][0], abs=1e-6)
    assert two[0][0] == two[1][0]
    for name, value in whole(one).items():
        np.testing.assert_allclose(whole(two)[name], value, atol=1e-5)


def test_gradients_of_the_two_passes_are_those_of_one_pass_over_the_whole_batch() -> None:
    from tests.ranks import run_ranks

    comm_free = run_ranks(run_without_dropout, 1, 2)[0]
    direct = run_ranks(run_without_dropout, 1, BATCH)[0]
    assert comm_free[0] == pytest.approx(direct[0], abs=1e-6)
    for name, value in direct[1].items():
        np.testing.assert_allclose(comm_free[1][name], value, atol=1e-5)
    assert direct[2] == 2  # one micro-batch a rank runs once a step
    assert comm_free[2] == 2 * 4 * 2


def run_without_dropout(micro_batch: int) -> tuple[list[float], dict[str, Any], int]:
    nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]
    return run(micro_batch, 1)
