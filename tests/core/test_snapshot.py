from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from core.comm import Comm
from core.engine import Engine
from core.fragments import KINDS
from core.methods.base import Batch
from core.recipe import Train
from core.snapshot import DTYPES, Part, Piece, Snapshot, pieces
from core.storage import crc32c
from tests.ranks import run_ranks

CPU = torch.device("cpu")
VALUES = [
    Piece("long", "method", 0, torch.tensor([2**40, -1])),
    Piece("double", "method", 0, torch.tensor([0.1], dtype=torch.float64)),
    Piece("none", "method", 0, torch.zeros(0, dtype=torch.float64)),
    Piece("w", "weight", 5, torch.tensor([1.0, -2.5, 1e-30])),
    Piece("w", "weight", 8, torch.tensor([3.0])),
    Piece("int", "method", 0, torch.tensor([7], dtype=torch.int32)),
    Piece("brain", "buffer", 0, torch.tensor([1.5, 2.0, 3.0], dtype=torch.bfloat16)),
    Piece("half", "method", 0, torch.tensor([0.5], dtype=torch.float16)),
    Piece("flag", "method", 0, torch.tensor([True, False, True])),
    Piece("byte", "method", 0, torch.arange(5, dtype=torch.uint8)),
]


def taken(found: list[Piece]) -> Snapshot:
    snapshot = Snapshot()
    snapshot.take(found)
    return snapshot


def test_the_file_is_a_safetensors_file_of_all_types_and_sizes() -> None:
    state = load(bytes(taken(VALUES).content()))
    assert {value.dtype for value in state.values()} == set(DTYPES.values())
    assert state.keys() == {piece.entry()[0] for piece in VALUES}
    assert "weight/w@5" in state
    for piece in VALUES:
        got = state[piece.entry()[0]]
        assert got.dtype == piece.value.dtype
        assert got.equal(piece.value)


def test_every_slice_says_where_its_bytes_are_and_what_they_sum_to() -> None:
    snapshot = taken(VALUES)
    raw, part = bytes(snapshot.content()), snapshot.describe()
    assert (part.size, part.crc32c, part.finite) == (len(raw), crc32c(raw), True)
    for piece, about in zip(VALUES, part.slices, strict=True):
        assert (about.name, about.kind, about.start, about.numel) == (*piece[:3], len(piece.value))
        assert DTYPES[about.dtype] == piece.value.dtype
        data = raw[about.offset : about.end]
        assert torch.frombuffer(bytearray(data), dtype=piece.value.dtype).equal(piece.value) if data else True
        assert about.crc32c == crc32c(data)
        assert about.offset % piece.value.element_size() == 0


def test_a_part_s_description_survives_json() -> None:
    part = taken(VALUES).describe()
    assert Part.from_json(part.to_json()) == part


def test_a_copy_does_not_follow_what_training_does_next() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    snapshot = taken([Piece("w", "weight", 0, weight)])
    with torch.no_grad():
        weight.mul_(10)
    assert load(bytes(snapshot.content()))["weight/w@0"].tolist() == [1.0, 2.0]


def test_memory_is_used_again_for_the_same_layout_and_not_for_another() -> None:
    snapshot = taken([Piece("w", "weight", 0, torch.tensor([1.0, 2.0]))])
    where, before = snapshot._memory.data_ptr(), snapshot.describe()
    snapshot.take([Piece("w", "weight", 0, torch.tensor([3.0, 4.0]))])
    assert snapshot._memory.data_ptr() == where
    assert load(bytes(snapshot.content()))["weight/w@0"].tolist() == [3.0, 4.0]
    assert snapshot.describe().crc32c != before.crc32c
    for other in (Piece("w", "weight", 2, torch.ones(2)), Piece("v", "weight", 0, torch.ones(2)),
                  Piece("w", "weight", 0, torch.ones(3)), Piece("w", "weight", 0, torch.ones(3).double())):  # fmt: skip
        snapshot.take([other])
        state = load(bytes(snapshot.content()))
        assert list(state) == [other.entry()[0]]
        assert state[other.entry()[0]].equal(other.value)
        assert snapshot.describe().slices[0].start == other.start


def test_nothing_at_all_is_a_file_too() -> None:
    snapshot = taken([])
    assert load(bytes(snapshot.content())) == {}
    assert snapshot.describe() == Part(len(snapshot.content()), crc32c(bytes(snapshot.content())), True, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    found = [Piece("a", "weight", 0, torch.ones(4)), Piece("b", "method", 0, torch.ones(3, dtype=dtype))]
    assert taken(found).describe().finite
    found[1].value[2] = value
    assert not taken(found).describe().finite


# ---- who saves what


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.register_buffer("seen", torch.tensor([1, 2, 3]))

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.net(batch.views["x"])
        return out


STATE = {"big": torch.arange(9.0).reshape(3, 3), "small": torch.tensor(True), "mid": torch.arange(4)}


def own_pieces(stages: list[int]) -> list[list[Any]]:
    """By ZeRO stage, (kind, name, start, values) of this rank's pieces, in their order in the file."""
    found = []
    for stage in stages:
        torch.manual_seed(0)
        comm, module = Comm(CPU), Pair()
        groups = [{"params": list(module.parameters()), "names": ["w", "b"], "weight_decay": 0.1}]
        settings = Train(batch=4 * comm.world, micro_batch=4, precision="fp32")
        made = Engine(module, groups, settings, zero_stage=stage, world=comm.world, per_parameter_clip=True, device=CPU)
        made.backward(made.forward(Batch({"x": torch.ones(4, 5)})).square().mean())
        made.step(lambda scale: 0.1 * scale)
        own = pieces(made, STATE, comm)
        sizes = [p.value.element_size() for p in own]
        assert sizes == sorted(sizes, reverse=True), "so that all lie aligned"
        found.append([(p.kind, p.name, p.start, p.value.tolist()) for p in own])
    return found


def test_all_ranks_together_save_everything_once_at_every_zero_stage() -> None:
    stages = [0, 1, 2, 3]
    first, second = run_ranks(own_pieces, 2, stages)
    wholes = []
    for stage in stages:
        whole: dict[tuple[str, str], dict[int, Any]] = {}
        for kind, name, start, values in first[stage] + second[stage]:
            for i, value in enumerate(values, start):
                assert whole.setdefault((kind, name), {}).setdefault(i, value) is value, "saved twice"
        wholes.append({key: [values[i] for i in sorted(values)] for key, values in whole.items()})
        parameters = [name for kind, name in whole if kind == "weight"]
        numel = {name: len(values) for (kind, name), values in whole.items() if kind in KINDS}
        assert sorted(numel.values()) == [3, 15]
        assert {(kind, name) for kind in KINDS for name in parameters} <= whole.keys()
        assert wholes[-1]["method", "big"] == list(range(9))
        assert [values for (kind, _), values in wholes[-1].items() if kind == "buffer"] == [[1, 2, 3]]
        dealt = [sum(kind == "method" for kind, *_ in rank[stage]) for rank in (first, second)]
        assert dealt == [2, 1]
    assert all(whole == wholes[0] for whole in wholes)
