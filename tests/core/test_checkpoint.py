from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from core import checkpoint, commits
from core.checkpoint import Reader, newest
from core.comm import Comm
from core.config import fingerprint
from core.courier import Courier, Fate
from core.engine import Engine
from core.folder import FileStore
from core.fragments import KINDS
from core.manifest import CheckpointError, Position
from core.methods.base import Batch
from core.recipe import Recipe, Train
from core.retention import Policy
from core.snapshot import pieces
from core.spool import Spool
from core.storage import Store, StoreError, open_store
from core.train import Outcome, train
from tests import toy
from tests.core.logs import claim, log, manifest
from tests.ranks import run_ranks

Rows = dict[int, float]  # step -> loss
CPU = torch.device("cpu")


def plan(recipes: list[tuple[str, Recipe, int, int]], root: str) -> list[tuple[Outcome, Rows]]:
    """Train runs (name, recipe, attempt, steps until a wish to stop) one after the other on this rank."""
    return [one(name, recipe, attempt, stop_at, root) for name, recipe, attempt, stop_at in recipes]


def one(name: str, recipe: Recipe, attempt: int, stop_at: int, root: str) -> tuple[Outcome, Rows]:
    rows: Rows = {}
    asked = iter(range(1, 1000))

    def on_progress(row: dict[str, Any]) -> None:
        if "loss" in row:
            rows[row["step"]] = row["loss"]

    run = open_store(f"{root}/runs/{name}")
    return train(recipe, run, root, attempt, on_progress, lambda: next(asked) >= stop_at), rows


def at(stage: int) -> Recipe:
    return toy.recipe(zero={"stage": stage})


NEVER = 1000


MOVES = ["3 on 2 -> 1 on 1", "1 on 2 -> 3 on 1", "2 on 1 -> 0 on 2", "0 on 1 -> 3 on 2", "3 on 2 again -> 2 on 2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of six steps, by ZeRO stage and ranks: uninterrupted, stopped after the fourth, and taken up elsewhere."""
    root = toy.store(tmp_path_factory.mktemp("store"))
    start = [("whole", at(2), 1, NEVER), ("3 on 2", at(3), 1, 3), ("1 on 2", at(1), 1, 3)]
    whole, *cut = run_ranks(plan, 2, start, root)[0]
    shutil.copytree(f"{root[7:]}/runs/3 on 2", f"{root[7:]}/runs/3 on 2 again")
    alone = [("3 on 2", at(1), 2, NEVER), ("1 on 2", at(3), 2, NEVER), ("2 on 1", at(2), 1, 4), ("0 on 1", at(0), 1, 4)]
    *moved, third, fourth = run_ranks(plan, 1, alone, root)[0]
    back = [("2 on 1", at(0), 2, NEVER), ("0 on 1", at(3), 2, NEVER), ("3 on 2 again", at(2), 2, NEVER)]
    moved += run_ranks(plan, 2, back, root)[0]
    pairs = zip([*cut, third, fourth, cut[0]], moved, strict=True)
    return {"root": root, "whole": whole, "moves": dict(zip(MOVES, pairs, strict=True))}


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_at_another_zero_stage_and_number_of_ranks(world: dict[str, Any], move: str) -> None:
    (cut, before), (end, after) = world["moves"][move]
    assert (cut, end) == (Outcome.PREEMPTED, Outcome.FINISHED)
    assert (max(before), min(after), max(after)) == (4, 5, 6)
    assert before | after == pytest.approx(world["whole"][1], rel=1e-5)


# ---- what is written


@pytest.fixture
def run(world: dict[str, Any], tmp_path: Path) -> Store:
    """A copy of the run on two ranks at stage 2, with checkpoints of steps 2, 4 and 6."""
    shutil.copytree(f"{world['root'][7:]}/runs/whole", tmp_path / "run")
    return open_store(f"file://{tmp_path}/run")


def files(run: Store) -> list[str]:
    return [entry.key for entry in run.list("checkpoints/")]


def test_a_checkpoint_is_made_of_json_and_safetensors_alone(run: Store) -> None:
    for key in files(run):
        assert key.endswith((".json", ".safetensors"))
        parsed: Any = json.loads(run.get(key)) if key.endswith(".json") else load(run.get(key))
        assert parsed


def test_every_checkpoint_of_the_run_is_found_newest_first(run: Store) -> None:
    found = [m.key for m in commits.checkpoints(run)]
    assert found == [f"checkpoints/0000000{step}-000001" for step in (6, 4, 2)]
    assert {key.rpartition("/")[0] for key in files(run)} == set(found)
    assert [(c.number, c.attempt, c.resumed) for c in commits.claims(run)] == [(1, 1, None)]


def test_the_newest_checkpoint_says_where_training_goes_on_and_how_it_was_made(run: Store) -> None:
    found = newest(run, {"another", fingerprint(at(0))})
    assert found is not None
    assert found.position == Position("main", 6, 6, True, 48)
    assert (found.attempt, found.claim, found.number, found.skipped) == (1, 1, 4, [])
    assert found.size == sum(e.size for e in run.list(f"{found.key}/") if e.key.endswith(".safetensors"))
    assert (found.world, found.zero_stage, found.adam_step) == (2, 2, 6)


def test_what_a_later_attempt_wrote_is_newer_whatever_its_step(run: Store) -> None:
    log(run, claim(2, resumed=2), manifest(3, claim=5))
    log(run, claim(10, resumed=6), manifest(5, claim=7), manifest(4, claim=7))
    found = [(m.claim, m.position.step) for m in commits.checkpoints(run)]
    assert found == [(7, 4), (7, 5), (5, 3), (1, 2)], "and what it has passed over does not count"


def test_a_range_that_lies_in_several_slices_is_read_as_one(run: Store) -> None:
    found = newest(run)
    assert found is not None
    reader = Reader(run, found)
    weights = reader.whole("weight")
    cut = {s.name: s.start for s in found.slices if s.kind == "weight" and s.start > 0}
    assert cut, "no parameter lies across ranks"
    for name, border in cut.items():
        flat = weights[name].flatten()
        for start, numel in ((border - 1, 2), (0, len(flat)), (border, 1), (border - 1, 1)):
            assert Reader(run, found).read("weight", name, start, numel).equal(flat[start : start + numel])


def test_a_range_that_no_slice_covers_is_told(run: Store) -> None:
    found = newest(run)
    assert found is not None
    name = next(s.name for s in found.slices if s.kind == "weight" and s.start > 0)
    found.slices = [s for s in found.slices if s.name != name or s.start > 0]
    with pytest.raises(CheckpointError, match=f"weight {name} lacks elements 0 to"):
        Reader(run, found).whole("weight")


# ---- what is damaged


def damaged(run: Store, key: str, change: Callable[[bytearray], object]) -> None:
    data = bytearray(run.get(key))
    change(data)
    run.put(key, bytes(data))


def flip_last(data: bytearray) -> None:
    data[-1] ^= 1


def test_one_flipped_bit_is_found_and_file_and_tensor_are_named(run: Store) -> None:
    key = "checkpoints/00000006-000001/rank-0001.safetensors"
    damaged(run, key, flip_last)
    found, said = newest(run), []
    assert found is not None
    assert found.position.step == 6, "sizes alone do not show it"
    last = max((s for s in found.slices if s.file == "rank-0001.safetensors"), key=lambda s: s.offset)
    sound = newest(run, verify=Comm(CPU), warn=said.append)
    assert sound is not None
    assert sound.position.step == 4
    assert said == [f"warning: checkpoint passed over: {key}: checksum of {last.kind} {last.name} is wrong"]
    with pytest.raises(CheckpointError, match=r"rank-0001.safetensors: checksum of .* is wrong"):
        Reader(run, found).verify(["rank-0001.safetensors"])
    Reader(run, found).verify(["rank-0000.safetensors"])


def test_every_bit_of_the_manifest_counts(run: Store) -> None:
    key = commits.key(4)
    data = run.get(key)
    place = data.index(b'"step": 6') + len(b'"step": ')
    damaged(run, key, lambda d: d.__setitem__(place, ord("5")))
    said: list[str] = []
    found = newest(run, warn=said.append)
    assert found is not None
    assert found.position.step == 4
    assert said == [f"warning: passed over: {key}: its checksum is wrong"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run, key: run.delete(f"{key}/rank-0001.safetensors"), "rank-0001.safetensors is not there"),
        (lambda run, key: damaged(run, f"{key}/rank-0000.safetensors", lambda d: d.pop()), "bytes instead of"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(run: Store, break_it: Callable[..., None], said: str) -> None:
    break_it(run, "checkpoints/00000006-000001")
    assert_passed_over(run, said, "checkpoints/00000006-000001")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "unreadable"), (b"[]", "unreadable"), (b'{"schema": 99}', "checkpoint schema 99, this Retort")],
)
def test_a_torn_entry_is_passed_over_with_a_warning(run: Store, content: bytes, said: str) -> None:
    run.put(commits.key(4), content)
    assert_passed_over(run, said, "commits/000004.json")


def assert_passed_over(run: Store, said: str, key: str) -> None:
    warnings: list[str] = []
    found = newest(run, [fingerprint(at(0))], warn=warnings.append)
    assert found is not None
    assert found.position.step == 4
    assert len(warnings) == 1
    assert said in warnings[0]
    assert key in warnings[0]


def test_another_recipe_s_checkpoints_are_passed_over(run: Store) -> None:
    warnings: list[str] = []
    assert newest(run, [fingerprint(toy.recipe(train={"lr": 0.5}))], warn=warnings.append) is None
    assert ["belongs to another recipe" in w for w in warnings] == [True] * 3


def newest_key(run: Store) -> str:
    return next(commits.checkpoints(run)).key


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(world: dict[str, Any], tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    shutil.copytree(world["root"][7:], tmp_path, dirs_exist_ok=True)
    run = open_store(f"{root}/runs/1 on 2")
    # One file, written by one rank: of the two ranks that go on, one alone sees the damage.
    damaged(run, f"{newest_key(run)}/rank-0000.safetensors", flip_last)
    run = open_store(f"{root}/runs/whole")
    damaged(run, "checkpoints/00000006-000001/rank-0001.safetensors", flip_last)
    results = run_ranks(plan, 2, [("whole", at(2), 2, NEVER), ("1 on 2", at(1), 3, NEVER)], root)[0]
    for outcome, rows in results:
        assert outcome is Outcome.FINISHED
        assert rows == pytest.approx({s: world["whole"][1][s] for s in (5, 6)}, rel=1e-5)
    assert newest_key(run) == "checkpoints/00000006-000005"
    assert [(c.number, c.attempt, c.resumed, c.step, c.lost) for c in commits.claims(run)] == [
        (1, 1, None, 0, 0), (5, 2, 3, 4, 2)]  # fmt: skip


# ---- how it is committed


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.net(batch.views["x"])
        return out


def engine() -> Engine:
    torch.manual_seed(0)
    comm, module = Comm(CPU), Pair()
    groups = [{"params": list(module.parameters()), "names": ["w", "b"], "weight_decay": 0.1}]
    settings = Train(batch=4 * comm.world, micro_batch=4, precision="fp32")
    made = Engine(module, groups, settings, zero_stage=1, world=comm.world, per_parameter_clip=True, device=CPU)
    made.backward(made.forward(Batch({"x": torch.ones(4, 5)})).square().mean())
    made.step(lambda scale: 0.1 * scale)
    return made


def save(made: Engine, run: Store, step: int, state: dict[str, Tensor] | None = None, own: int = 1) -> Fate:
    """Save under claim `own`; what has become of it when all that can be done is done."""
    comm, state = Comm(CPU), state or {}
    after = max((m.number for m in commits.checkpoints(open_store(run.uri)) if m.claim == own), default=own)
    courier = Courier(run, Spool(f"{run.uri[7:]}-spool", run), comm.rank, after, Policy(keep=9))
    about = manifest(step, own, world=comm.world, adam_step=made.adam_step)
    about.shapes |= {name: list(shape) for name, shape in made.shapes.items()}
    about.shapes |= {f"method/{name}": list(value.shape) for name, value in state.items()}
    sent = courier.save(about, pieces(made, state, comm), None)
    courier.wait(0.5 if isinstance(run, CutOff) else 60)
    courier.close()
    return Fate.SUPERSEDED if courier.superseded else sent.fate


class CutOff(FileStore):
    """Loses the connection before the manifest."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise StoreError(f"{key}: no connection")


def commit_in_all_ways(folder: str) -> dict[str, Any]:
    made, run = engine(), open_store(f"file://{folder}/run")
    log(run, claim(1))
    fates = [save(made, run, 1)]
    before = {key: run.get(key) for key in files(run)}
    fates.append(save(made, CutOff(Path(folder) / "run"), 2))
    torn = [key for key in files(run) if key not in before]
    log(run, claim(2, resumed=2))
    made.fragments()[0].view("weight").add_(1)
    fates += [save(made, run, 1, own=3), save(made, run, 3, own=1)]
    return {"before": before, "torn": torn, "after": {key: run.get(key) for key in before}, "fates": fates}


def test_only_the_manifest_makes_a_checkpoint_and_only_the_newest_attempt_can_make_it(tmp_path: Path) -> None:
    got = run_ranks(commit_in_all_ways, 1, str(tmp_path))[0]
    run = open_store(f"file://{tmp_path}/run")
    assert got["fates"] == [Fate.COMMITTED, Fate.PENDING, Fate.COMMITTED, Fate.SUPERSEDED]
    assert sorted(key.rpartition("/")[2] for key in got["torn"]) == ["rank-0000.json", "rank-0000.safetensors"]
    assert [m.key for m in commits.checkpoints(run)] == ["checkpoints/00000001-000003", "checkpoints/00000001-000001"]
    assert got["after"] == got["before"], "the second writer must not touch what is committed"


def nan_on_one_rank(folder: str) -> tuple[list[Fate], list[str]]:
    made, run, comm = engine(), open_store(f"file://{folder}/run"), Comm(CPU)
    if comm.rank == 0:
        log(run, claim(1))
    fates = []
    for step, state in enumerate([{}, {"mean": torch.tensor([1.0, torch.inf])}, {}], 1):
        if step == 3 and comm.rank == 1:
            made.fragments()[-1].view("exp_avg")[0] = torch.nan
        comm.barrier()
        fates.append(save(made, run, step, state))
        comm.barrier()
    return fates, files(run)


def test_there_is_no_checkpoint_when_one_rank_holds_a_nan(tmp_path: Path) -> None:
    for fates, written in run_ranks(nan_on_one_rank, 2, str(tmp_path)):
        assert fates in ([Fate.COMMITTED, Fate.REFUSED, Fate.REFUSED], [Fate.COMMITTED] * 3), "the first rank decides"
        assert {key.split("/")[1] for key in written} == {"00000001-000001"}
    assert commits.numbers(open_store(f"file://{tmp_path}/run")) == [1, 2]


STATE = {
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "count": torch.tensor([2**40, -1]),
    "flag": torch.tensor([True, False]),
    "half": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
    "bytes": torch.arange(7, dtype=torch.uint8),
}


def keep_state(folder: str) -> None:
    run = open_store(f"file://{folder}/run")
    log(run, claim(1))
    assert save(engine(), run, 1, STATE) is Fate.COMMITTED


def test_a_method_s_state_comes_back_in_every_type_and_shape(tmp_path: Path) -> None:
    run_ranks(keep_state, 1, str(tmp_path))
    run = open_store(f"file://{tmp_path}/run")
    found = newest(run, verify=Comm(CPU))
    assert found is not None
    state = Reader(run, found).whole("method")
    assert state.keys() == STATE.keys()
    for name, want in STATE.items():
        assert (state[name].dtype, state[name].shape) == (want.dtype, want.shape)
        assert state[name].equal(want)
    assert {s.kind for s in found.slices} == {"method", *KINDS}


def test_another_module_s_checkpoint_is_refused_with_the_names(run: Store) -> None:
    found = newest(run)
    assert found is not None
    said = run_ranks(restore_other, 1, run.uri)[0]
    assert "other names or shapes of parameters: " in said
    assert "net.weight" in said
    assert "encoder.cls_token" in said


def restore_other(uri: str) -> str:
    run = open_store(uri)
    found = newest(run)
    assert found is not None
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(run, found, engine())
    return str(error.value)
