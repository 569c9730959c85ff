from __future__ import annotations

import dataclasses
import sys
from functools import partial
from operator import mul
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.comm import Comm
from core.config import ConfigError
from core.engine import Engine, check_precision, pick_device
from core.fragments import KINDS
from core.methods.base import Batch
from core.plain import PlainEngine
from core.recipe import Train
from tests.ranks import run_ranks

# eps: Adam divides by |gradient| + eps; a tiny one would blow rounding in zero gradients up to whole steps.
SETTINGS = Train(batch=16, micro_batch=4, lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3, precision="fp32")
MICROS, STEPS = 4, 3
State = dict[str, dict[str, np.ndarray]]  # parameter -> kind -> array


class Net(nn.Module):
    """Odd sizes, so that parameters straddle the borders of shards; a token that only the root's forward reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 7))
        self.first, self.norm, self.second = nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("offset", torch.full((3,), 0.25))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def external_parameters(self) -> list[nn.Parameter]:
        return [self.token]

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(batch.views["x"] + self.token)))
        out: Tensor = self.frozen(self.second(hidden)) + self.offset
        return out


def groups(net: nn.Module, frozen_steps: int = 0) -> list[dict[str, Any]]:
    """Weights (decayed), an empty group, and the rest at half the rate, left alone for some steps."""
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    decayed = {n: p for n, p in named if p.ndim > 1}
    free = {n: p for n, p in named if p.ndim == 1}
    return [
        {"params": list(decayed.values()), "names": list(decayed), "weight_decay": SETTINGS.weight_decay},
        {"params": [], "names": [], "weight_decay": 0.1},
        {
            "params": list(free.values()),
            "names": list(free),
            "weight_decay": 0.0,
            "lr_scale": 0.5,
            "frozen_steps": frozen_steps,
        },
    ]


def micro_batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(4, 7, generator=g), torch.randn(4, 3, generator=g)


def decay_at(step: int) -> float:
    return [0.5, 0.0, 0.9][step]  # zero on the way must not end the decay


def train(engine: Engine | PlainEngine, comm: Comm) -> None:
    engine.train(True)
    share = MICROS // comm.world
    for step in range(STEPS):
        for micro in range(comm.rank * share, (comm.rank + 1) * share):
            x, y = micro_batch(step, micro)
            engine.backward(20 * ((engine.forward(Batch({"x": x})) - y) ** 2).mean())
        engine.step(partial(mul, 0.1 / (step + 1)), decay_at(step))


def settings_of(clip: float) -> Train:
    return dataclasses.replace(SETTINGS, clip=clip)


CLIPS = {"off": (0.0, True), "per parameter": (0.3, True), "global": (0.3, False), "a frozen group": (0.3, True)}
FROZEN = {"a frozen group": 2}  # steps in which the group without decay is left alone


def plain() -> dict[str, State]:
    """The reference, by kind of clipping: all micro-batches on one rank, in plain PyTorch."""
    found, comm = {}, Comm(torch.device("cpu"))
    for name, (clip, per_parameter) in CLIPS.items():
        net = Net()
        engine = PlainEngine(net, groups(net, FROZEN.get(name, 0)), settings_of(clip), comm, per_parameter)
        train(engine, comm)
        found[name] = {
            n: {"weight": p.detach().numpy(), **{k: engine.adam.state[p][k].numpy() for k in KINDS[1:]}}
            for n, p in net.named_parameters()
            if p.requires_grad
        }
    return found


def sharded() -> dict[tuple[int, str], Any]:
    """Every stage and clipping on this rank: fragments of weights and moments, and what does not move."""
    comm, found = Comm(torch.device("cpu")), {}
    for stage in range(4):
        for name, (clip, per_parameter) in CLIPS.items():
            net = Net()
            own = groups(net, FROZEN.get(name, 0))
            engine = Engine(net, own, settings_of(clip), zero_stage=stage, world=comm.world,
                            per_parameter_clip=per_parameter, device=comm.device)  # fmt: skip
            train(engine, comm)
            pieces = [(f.name, f.start, f.numel, {k: f.view(k).clone().numpy() for k in KINDS})
                      for f in engine.fragments()]  # fmt: skip
            still = {n: b.numpy() for n, b in engine.buffers().items()}
            rates = [(group["lr"], group["weight_decay"]) for group in engine.ds.optimizer.param_groups]
            found[stage, name] = pieces, still, engine.adam_step, engine.shapes, rates
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, State]:
    torch.set_num_threads(1)
    return plain()


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> list[dict[tuple[int, str], Any]]:
    return run_ranks(sharded, request.param)


CASES = [(stage, clip) for stage in range(4) for clip in CLIPS]


def joined(parts: list[Any], shapes: dict[str, Any]) -> tuple[State, dict[str, np.ndarray]]:
    """Parameters put together from fragments, and how often each element was there."""
    state: State = {n: {k: np.full(int(np.prod(s)), np.nan, np.float32) for k in KINDS} for n, s in shapes.items()}
    count = {n: np.zeros(int(np.prod(s)), int) for n, s in shapes.items()}
    for name, start, numel, arrays in parts:
        count[name][start : start + numel] += 1
        for kind in KINDS:
            state[name][kind][start : start + numel] = arrays[kind]
    return state, count


@pytest.mark.parametrize(("stage", "clip"), CASES)
def test_every_stage_takes_the_steps_of_plain_pytorch(
    ranks: list[Any], reference: dict[str, State], stage: int, clip: str
) -> None:
    shapes = ranks[0][stage, clip][3]
    state, _ = joined([piece for rank in ranks for piece in rank[stage, clip][0]], shapes)
    assert state.keys() == reference[clip].keys()
    for name, kinds in reference[clip].items():
        assert shapes[name] == kinds["weight"].shape
        for kind in KINDS:
            np.testing.assert_allclose(state[name][kind], kinds[kind].ravel(), 2e-5, 2e-6, err_msg=f"{name} {kind}")


@pytest.mark.parametrize(("stage", "clip"), CASES)
def test_fragments_cover_every_trainable_parameter_once(ranks: list[Any], stage: int, clip: str) -> None:
    for number in range(len(ranks)) if stage == 0 else [0]:  # at stage 0 each rank holds everything
        own = ranks[number : number + 1] if stage == 0 else ranks
        _, count = joined([piece for rank in own for piece in rank[stage, clip][0]], ranks[0][stage, clip][3])
        assert all((n == 1).all() for n in count.values())
        assert "frozen.weight" not in count


@pytest.mark.parametrize(("stage", "clip"), CASES)
def test_frozen_parameters_and_buffers_stay_and_scratch_is_not_kept(ranks: list[Any], stage: int, clip: str) -> None:
    net = Net()
    for rank in ranks:
        _, still, steps, _, _ = rank[stage, clip]
        assert steps == STEPS
        assert sorted(still) == ["frozen.bias", "frozen.weight", "offset"]
        assert np.array_equal(still["frozen.weight"], net.frozen.weight.detach().numpy())


@pytest.mark.parametrize("stage", range(4))
def test_each_group_has_its_own_rate_and_only_decayed_groups_follow_the_decay(ranks: list[Any], stage: int) -> None:
    for rank in ranks:
        assert rank[stage, "off"][4] == [(pytest.approx(0.1 / 3), 0.9), (pytest.approx(0.05 / 3), 0.0)]


def test_the_reference_clips_and_clips_in_two_ways(reference: dict[str, State]) -> None:
    weights = [reference[clip]["first.weight"]["exp_avg_sq"] for clip in CLIPS]
    assert not np.allclose(weights[0], weights[1], rtol=0.1)
    assert not np.allclose(weights[1], weights[2], rtol=0.1)


# ---- precision


def creep() -> dict[int, tuple[float, float]]:
    """Steps too small for bf16: the master weight and the compute copy of one parameter, by stage."""
    comm, found = Comm(torch.device("cpu")), {}
    settings = dataclasses.replace(SETTINGS, precision="bf16", micro_batch=16, weight_decay=0.0)
    for stage in (1, 2, 3):
        net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(net.weight)
        wrapped = OneView(net)
        group = {"params": [net.weight], "names": ["net.weight"], "weight_decay": 0.0}
        engine = Engine(wrapped, [group], settings, zero_stage=stage, world=1, per_parameter_clip=True,
                        device=comm.device)  # fmt: skip
        for _ in range(10):
            out = engine.forward(Batch({"x": torch.ones(16, 1)}))
            engine.backward(-out.float().mean())
            engine.step(lambda scale: scale * 1e-4)
        (fragment,) = engine.fragments()
        found[stage] = float(fragment.view("weight")[0]), float(engine.forward(Batch({"x": torch.ones(1, 1)}))[0])
    return found


class OneView(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.net(batch.views["x"])
        return out


def test_bf16_keeps_weights_in_float32_where_small_steps_add_up() -> None:
    for master, copy in run_ranks(creep, 1)[0].values():
        assert master == pytest.approx(1.001, abs=1e-5)
        assert copy == 1.0


def test_bf16_without_zero_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"zero\.stage: bf16 needs stage 1 or above"):
        check_precision(dataclasses.replace(SETTINGS, precision="bf16"), 0)
    with pytest.raises(ConfigError, match=r"zero\.stage"):
        Engine(Net(), [], dataclasses.replace(SETTINGS, precision="bf16"), zero_stage=0, world=1,
               per_parameter_clip=True, device=torch.device("cpu"))  # fmt: skip


# ---- misuse


def misused() -> list[str]:
    """What is said of a parameter off the loss path, by stage."""
    said, comm = [], Comm(torch.device("cpu"))
    for stage in range(4):
        net = Net()
        net.unused = nn.Parameter(torch.ones(5))
        engine = Engine(net, groups(net), settings_of(0.0), zero_stage=stage, world=1, per_parameter_clip=True,
                        device=comm.device)  # fmt: skip
        with pytest.raises(ValueError, match="no gradient reaches") as error:
            train(engine, comm)
        said.append(str(error.value))
    return said


def early() -> str:
    """What is said of a step before all micro-batches are there."""
    net, comm = Net(), Comm(torch.device("cpu"))
    engine = Engine(net, groups(net), settings_of(0.0), zero_stage=1, world=1, per_parameter_clip=True,
                    device=comm.device)  # fmt: skip
    engine.backward(engine.forward(Batch({"x": micro_batch(0, 0)[0]})).mean())
    with pytest.raises(AssertionError) as error:
        engine.step(lambda scale: scale * 0.1)
    return str(error.value)


def test_a_parameter_without_gradient_is_named_at_every_stage() -> None:
    for message in run_ranks(misused, 1)[0]:
        assert message.startswith("no gradient reaches unused: ")
        assert "requires_grad False" in message


def test_a_step_before_the_last_micro_batch_is_a_mistake() -> None:
    assert run_ranks(early, 1) == ["1 micro-batches instead of 4"]


def test_groups_that_leave_a_parameter_out_or_hold_it_twice_are_a_mistake() -> None:
    for wrong in (lambda net: groups(net)[:1], lambda net: groups(net) + groups(net)[:1]):
        net = Net()
        with pytest.raises(ValueError, match="each trainable parameter once"):
            Engine(net, wrong(net), SETTINGS, zero_stage=1, world=1, per_parameter_clip=True,
                   device=torch.device("cpu"))  # fmt: skip


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no GPU; use launch.device=cpu"):
        pick_device("cuda")


def compilers() -> list[str]:
    """Of torch, those that are loaded once every stage has taken steps."""
    comm = Comm(torch.device("cpu"))
    for stage in range(4):
        net = Net()
        train(Engine(net, groups(net), SETTINGS, zero_stage=stage, world=1, per_parameter_clip=True,
                     device=comm.device), comm)  # fmt: skip
    return [name for name in sys.modules if name == "torch._inductor.compile_fx"]


def test_no_compiler_is_loaded() -> None:
    """Which would take seconds of every start."""
    assert run_ranks(compilers, 1) == [[]]
