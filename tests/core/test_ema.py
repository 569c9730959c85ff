from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.comm import Comm
from core.ema import PREFIX, Average, average_
from core.engine import Engine
from core.methods.base import Batch
from core.plain import PlainEngine
from core.recipe import Train
from tests.ranks import run_ranks

MOMENTA = (0.9, 0.99, 0.5)


class Small(nn.Module):
    """Odd sizes, so that fragments begin and end within parameters; one parameter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)
        self.fixed = nn.Parameter(torch.full((2,), 4.0), requires_grad=False)

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.second(self.first(batch.views["x"]).tanh())
        return out


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def settings(world: int, precision: str = "fp32") -> Train:
    return Train(batch=4, micro_batch=4 // world, lr=0.1, precision=precision)


def images(step: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(step))


def _follow(stage: int | None, precision: str) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Averages and weights after every step, equal for any number of ranks up to rounding."""
    comm = Comm(torch.device("cpu"))
    module, own = small(), settings(comm.world, precision)
    groups = [{"params": [p for p in module.parameters() if p.requires_grad], "names": [], "weight_decay": 0.0}]
    engine: Any = PlainEngine(module, groups, own, comm, False)
    if stage is not None:
        engine = Engine(module, groups, own, zero_stage=stage, world=comm.world, per_parameter_clip=False,
                        device=comm.device)  # fmt: skip
    average = Average(small(), engine, torch.bfloat16 if precision == "bf16" else torch.float32)
    weights = [numbers(average)]
    averages = [numbers(average)]
    for step, momentum in enumerate(MOMENTA):
        x = images(step).chunk(comm.world)[comm.rank]
        engine.backward(engine.forward(Batch({"x": x})).float().square().mean())
        engine.step(lambda scale: 0.1 * scale)
        average.update(momentum)
        averages.append(numbers(average))
        weights.append(numbers(Average(small(), engine, torch.float32)))  # it starts as the weights are
    for name, parameter in average.network.named_parameters():
        if name != "fixed":
            assert parameter.equal(average.state()[PREFIX + name].to(parameter.dtype))
    assert not average.network.training
    assert average.network.get_parameter("fixed").tolist() == [4.0, 4.0]
    return averages, weights


def numbers(average: Average) -> dict[str, np.ndarray]:
    return {name.removeprefix(PREFIX): value.numpy().copy() for name, value in average.state().items()}


def by_hand(weights: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    out = [weights[0]]
    for momentum, now in zip(MOMENTA, weights[1:], strict=True):
        out.append({name: momentum * out[-1][name] + (1 - momentum) * value for name, value in now.items()})
    return out


def check(averages: list[dict[str, np.ndarray]], weights: list[dict[str, np.ndarray]]) -> None:
    assert set(averages[0]) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert any(not np.array_equal(weights[0][name], weights[-1][name]) for name in weights[0])
    for got, want in zip(averages, by_hand(weights), strict=True):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2e-7)


def test_the_average_follows_the_weights() -> None:
    check(*_follow(None, "fp32"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_rank_holds_the_whole_average_at_any_zero_stage(stage: int) -> None:
    (first, weights), (second, _) = run_ranks(_follow, 2, stage, "fp32")
    check(first, weights)
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_under_bf16_the_average_follows_the_float32_master_weights() -> None:
    averages, weights = run_ranks(_follow, 1, 1, "bf16")[0]
    check(averages, weights)
    last = averages[-1]["first.weight"]
    assert last.dtype == np.float32
    assert not np.array_equal(last, torch.from_numpy(last).bfloat16().float().numpy())


def test_a_state_is_taken_over_and_reaches_the_network() -> None:
    comm, module = Comm(torch.device("cpu")), small()
    groups = [{"params": [p for p in module.parameters() if p.requires_grad], "names": [], "weight_decay": 0.0}]
    engine = PlainEngine(module, groups, settings(1), comm, False)
    average = Average(small(), engine, torch.float32)
    given = {name: torch.full_like(value, 3.0) for name, value in average.state().items()}
    average.load_state(given | {"center": torch.zeros(1)})
    assert all(value.eq(3.0).all() for value in average.state().values())
    assert average.network.get_parameter("second.bias").tolist() == [3.0] * 3
    average.update(1.0)  # a momentum of 1 leaves it alone
    assert all(value.eq(3.0).all() for value in average.state().values())


def test_integers_that_agree_stay_and_counters_lose_their_fraction() -> None:
    indices = {"index": torch.arange(200), "count": torch.tensor(5)}
    average_(indices, {"index": torch.arange(200), "count": torch.tensor(9)}, 0.9)
    assert indices["index"].tolist() == list(range(200))
    assert indices["count"].item() == 5
    average_(indices, {"index": torch.arange(200), "count": torch.tensor(30)}, 0.9)
    assert indices["count"].item() == 7


def test_buffers_are_averaged_and_carried_by_the_network() -> None:
    def normed() -> nn.Module:
        return nn.ModuleList([small(), nn.BatchNorm1d(3)])

    module = normed()
    groups = [{"params": [p for p in module.parameters() if p.requires_grad], "names": [], "weight_decay": 0.0}]
    engine = PlainEngine(module, groups, settings(1), Comm(torch.device("cpu")), False)
    average = Average(normed(), engine, torch.float32)
    module[1].running_mean += 1.0
    average.update(0.75)
    assert average.network[1].running_mean.tolist() == [0.25] * 3
    taken = average.state()
    module[1].running_mean += 1.0
    average.update(0.75)
    assert average.state()[f"{PREFIX}1.running_mean"].tolist() == [0.6875] * 3
    assert taken.keys() == average.state().keys()
