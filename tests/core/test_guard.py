from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from core.comm import Comm
from core.data.samples import MicroBatch
from core.data.source import DataError
from core.guard import BAD_SAMPLES, FEW, BadLossError, LossGuard, Quarantine
from core.storage import Store, open_store
from tests.host_syncs import HostSyncs
from tests.ranks import run_ranks

ALONE = Comm(torch.device("cpu"))
NAN = float("nan")


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/run")


def micros(step: int, bad: tuple[str, ...] = ()) -> list[MicroBatch]:
    return [MicroBatch(step, m, 0, 0, torch.tensor([10 * step + m]), {}, list(bad)) for m in range(2)]


def follow(guard: LossGuard, losses: list[float], check_every: int) -> None:
    for step, loss in enumerate(losses, 1):
        guard.add(step, torch.tensor(loss), micros(step))
        if step % check_every == 0:
            guard.check()


@pytest.mark.parametrize("check_every", [1, 2, 5])
def test_bad_losses_with_good_ones_between_do_not_end_a_run(run: Store, check_every: int) -> None:
    follow(LossGuard(run, ALONE, 3), [NAN, float("inf"), 1, NAN, NAN, 0, -float("inf"), NAN, 1, 1], check_every)
    assert list(run.list()) == []


@pytest.mark.parametrize("check_every", [1, 2, 5])
def test_bad_losses_in_a_row_end_it_with_the_samples_they_began_with(run: Store, check_every: int) -> None:
    with pytest.raises(BadLossError, match=r"^step 3: the loss was not finite .* 3 times in a row") as error:
        follow(LossGuard(run, ALONE, 3, claim=7), [1.0, 1.0, NAN, float("inf"), NAN, NAN], check_every)
    assert error.value.window == (2, 5)
    written = json.loads(run.get("bad-loss/000007/rank-0000.json"))
    assert written == {str(step): [10 * step, 10 * step + 1] for step in (2, 3, 4, 5)}, "and of the step before"


@pytest.mark.parametrize("check_every", [1, 2, 3])
def test_a_loss_far_above_its_running_mean_is_a_bad_one(run: Store, check_every: int) -> None:
    losses = [2.0, 1.0, -1.0, 30.0, 1.0, 50.0, -50.0, 60.0, 1.0]
    follow(LossGuard(run, ALONE, 3), losses, check_every)
    follow(LossGuard(run, ALONE, 4, explode=20.0), losses, check_every)
    follow(LossGuard(run, ALONE, 3, explode=35.0), losses, check_every)
    with pytest.raises(BadLossError, match=r"^step 6: .* 3 times in a row") as error:
        follow(LossGuard(run, ALONE, 3, explode=20.0), losses, check_every)
    assert error.value.window == (5, 8)


def test_bad_losses_do_not_move_the_mean_that_they_are_compared_with(run: Store) -> None:
    losses = [NAN, 1.0, *[1000.0, 1.0] * 40, 25.0, 25.0]
    with pytest.raises(BadLossError, match="^step 83: "):
        follow(LossGuard(run, ALONE, 2, explode=20.0), losses, 1)


def test_the_mean_follows_the_losses_of_the_last_steps(run: Store) -> None:
    falling = [100.0 * 0.98**step for step in range(400)]
    follow(LossGuard(run, ALONE, 1, explode=3.0), falling, 10)
    with pytest.raises(BadLossError, match="^step 401: "):
        follow(LossGuard(run, ALONE, 1, explode=3.0), [*falling, 1.0], 1)


def test_adding_a_loss_never_waits_for_the_device_and_holds_no_graph(run: Store) -> None:
    guard, parameter = LossGuard(run, ALONE, 3, explode=20.0), torch.nn.Parameter(torch.tensor(2.0))
    with HostSyncs() as syncs:
        for step in range(1, 5):
            guard.add(step, parameter * 2, micros(step))
    assert syncs.found == []
    assert not guard._size.requires_grad
    with HostSyncs() as syncs:
        assert guard.check()
    assert len(syncs.found) <= 1


def test_a_check_says_whether_the_newest_loss_was_good(run: Store) -> None:
    guard = LossGuard(run, ALONE, 3)
    assert guard.check()
    for step, (loss, good) in enumerate([(1.0, True), (NAN, False), (NAN, False), (1.0, True)], 1):
        guard.add(step, torch.tensor(loss), micros(step))
        assert guard.check() is good
        assert guard.check() is good


def on_ranks(folder: str) -> list[object]:
    comm = Comm(torch.device("cpu"))
    guard, said = LossGuard(open_store(f"file://{folder}/run"), comm, 2, claim=3), list[object]()
    for step in range(1, 5):
        guard.add(step, torch.tensor(NAN if comm.rank == 1 and step != 2 else 1.0), micros(10 * comm.rank + step))
        try:
            said.append(guard.check())
        except BadLossError as error:
            said += [str(error), error.window]
    return said


def test_one_rank_s_bad_losses_end_all_ranks_alike_with_the_samples_of_each(tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, str(tmp_path))
    assert first == second
    assert first[:3] == [False, True, False]
    assert str(first[3]).startswith("step 3: ")
    assert first[4] == (2, 4)
    run = open_store(f"file://{tmp_path}/run")
    own = [json.loads(run.get(f"bad-loss/000003/rank-000{rank}.json")) for rank in range(2)]
    assert own == [{str(step): [100 * rank + 10 * step, 100 * rank + 10 * step + 1] for step in (2, 3, 4)}
                   for rank in range(2)]  # fmt: skip


def test_what_ended_a_run_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadLossError("step 2: gone", (1, 3))))
    assert (str(error), error.window) == ("step 2: gone", (1, 3))


def test_without_a_bad_loss_the_last_step_is_written_down(run: Store) -> None:
    guard = LossGuard(run, ALONE, 3)
    follow(guard, [1.0, 1.0], 1)
    with pytest.raises(BadLossError, match="step 2: weights are gone") as error:
        guard.stop("weights are gone")
    assert error.value.window == (2, 2)
    assert json.loads(run.get("bad-loss/000000/rank-0000.json")) == {"2": [20, 21]}


def test_a_broken_sample_counts_once_also_in_a_later_attempt(run: Store) -> None:
    first = Quarantine(run, ALONE, 100, 0.5)
    assert first.count() == 0
    assert run.size(BAD_SAMPLES) is None
    first.add(micros(1, ("a", "b")))
    first.add(micros(2, ("b",)))
    assert first.count() == first.count() == 2
    later = Quarantine(run, ALONE, 100, 0.5)
    assert later.count() == 2
    later.add(micros(3, ("b", "c")))
    assert later.count() == 3
    assert json.loads(run.get(BAD_SAMPLES)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("samples", "share", "allowed"), [(1000, 0.02, 20), (100, 0.01, FEW), (100, 0.2, 20), (100, 0.0, 0), (5, 1.0, 5)]
)
def test_a_run_ends_above_the_share_and_not_at_it(run: Store, samples: int, share: float, allowed: int) -> None:
    quarantine = Quarantine(run, ALONE, samples, share)
    quarantine.add(micros(1, tuple(f"{i:03d}" for i in range(allowed))))
    assert quarantine.count() == allowed
    if allowed < samples:
        quarantine.add(micros(2, ("one more",)))
        with pytest.raises(DataError, match=rf"^data.source: {allowed + 1} of {samples} samples cannot be decoded"):
            quarantine.count()
