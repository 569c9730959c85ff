from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from core.comm import Comm
from core.data.loader import MicroBatch
from core.data.source import DataError
from core.guard import BAD_SAMPLES, FEW, BadLossError, LossGuard, Quarantine
from core.storage import Store, open_store

ALONE = Comm(torch.device("cpu"))
NAN = float("nan")


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/run")


def micros(step: int, bad: tuple[str, ...] = ()) -> list[MicroBatch]:
    return [MicroBatch(step, m, 0, torch.tensor([10 * step + m]), {}, list(bad)) for m in range(2)]


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
    with pytest.raises(BadLossError, match=r"^step 2: the loss was not finite 3 times in a row"):
        follow(LossGuard(run, ALONE, 3), [1.0, NAN, float("inf"), NAN, NAN], check_every)
    assert json.loads(run.get("nonfinite/rank-0000.json")) == {"step": 2, "samples": [20, 21]}


def test_without_a_bad_loss_the_last_step_is_written_down(run: Store) -> None:
    guard = LossGuard(run, ALONE, 3)
    follow(guard, [1.0, 1.0], 1)
    with pytest.raises(BadLossError, match="step 2: weights are gone"):
        guard.stop("weights are gone")
    assert json.loads(run.get("nonfinite/rank-0000.json"))["samples"] == [20, 21]


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
