from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from core.comm import Comm
from core.metrics import Meter, MetricsLog, Pace, read_metrics
from core.storage import Store, open_store
from tests.host_syncs import HostSyncs
from tests.ranks import run_ranks

torch.set_num_threads(1)


def meter() -> Meter:
    return Meter(Comm(torch.device("cpu")))


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


# ---- Meter


def test_a_reading_is_the_mean_over_all_micro_batches_since_the_last_one() -> None:
    m = meter()
    for value in (1.0, 2.0, 6.0):
        m.add({"loss": scalar(value)})
    assert m.read()["loss"] == 3.0
    m.add({"loss": scalar(10.0)})
    assert m.read()["loss"] == 10.0


def test_each_value_is_averaged_over_its_own_count() -> None:
    m = meter()
    m.add({"loss": scalar(1.0), "grad": scalar(5.0)})
    m.add({"loss": scalar(3.0)})
    assert m.read() == {"loss": 2.0, "grad": 5.0, "bad_losses": 0.0}


def test_tensors_with_dimensions_are_not_logged() -> None:
    m = meter()
    m.add({"loss": scalar(1.0), "per_image": torch.ones(4), "one": torch.ones(1)})
    assert set(m.read()) == {"loss", "bad_losses"}


def test_many_small_values_are_summed_exactly_enough() -> None:
    m = meter()
    for _ in range(3000):
        m.add({"x": scalar(0.1).to(torch.bfloat16)})
    assert m.read()["x"] == pytest.approx(float(scalar(0.1).to(torch.bfloat16)), rel=1e-9)


def test_adding_and_watching_never_wait_for_the_device_and_hold_no_graph() -> None:
    m, parameter = meter(), torch.nn.Parameter(scalar(2.0))
    with HostSyncs() as syncs:
        for _ in range(3):
            loss = parameter * 2
            m.add({"loss": loss, "per_image": torch.ones(4)})
            m.watch(loss)
    assert syncs.found == []
    assert not any(total.requires_grad for total in m._sums.values())
    with HostSyncs() as syncs:
        assert m.read()["loss"] == 4.0
    assert len(syncs.found) <= 1  # all values together


@pytest.mark.parametrize(("losses", "row"), [
    ([1.0, 2.0], 0), ([math.nan, 1.0, math.inf], 1), ([1.0, math.nan, -math.inf, math.nan, 1.0, math.nan], 3),
])  # fmt: skip
def test_bad_losses_is_the_longest_row_of_losses_that_are_not_finite(losses, row) -> None:
    m = meter()
    for loss in losses:
        m.add({"loss": scalar(loss)})
        m.watch(scalar(loss))
    assert m.read()["bad_losses"] == row


def test_a_row_of_bad_losses_goes_on_over_a_reading() -> None:
    m = meter()
    for _ in range(2):
        m.add({"loss": scalar(math.nan)})
        m.watch(scalar(math.nan))
        last = m.read()["bad_losses"]
    assert last == 2


def read_after_adding(values: list[float]) -> dict[str, float]:
    m = meter()
    m.add({"loss": scalar(values[Comm(torch.device("cpu")).rank])})
    return m.read()


def test_a_reading_is_the_mean_over_ranks_on_every_rank() -> None:
    assert [row["loss"] for row in run_ranks(read_after_adding, 2, [1.0, 4.0])] == [2.5, 2.5]


# ---- MetricsLog and read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store").sub("runs/r-1")


def segment(run: Store, attempt: int, start: int, rows: list[dict[str, Any]]) -> None:
    log = MetricsLog(run, attempt, start)
    for row in rows:
        log.write(row)
    log.close()


def steps(first: int, last: int, attempt: int, stage: str = "main") -> list[dict[str, Any]]:
    return [{"stage": stage, "step": s, "loss": float(attempt)} for s in range(first, last + 1)]


def seen(run: Store) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


def test_rows_of_one_attempt_come_back_as_they_were_written(run: Store) -> None:
    rows = [{"stage": "main", "step": 0, "heldout_loss": 0.1 + 0.2}, *steps(1, 3, attempt=1)]
    segment(run, 1, 0, rows)
    assert read_metrics(run) == rows
    assert [e.key for e in run.list("metrics/")] == ["metrics/0001-00000000.jsonl"]


def test_a_run_without_metrics_has_no_rows(run: Store) -> None:
    assert read_metrics(run) == []


def test_nothing_reaches_the_store_before_it_is_time_and_everything_on_flush(run: Store) -> None:
    log = MetricsLog(run, 1, 0, flush_s=3600)
    log.write({"step": 1})
    assert read_metrics(run) == []
    log.flush()
    log.write({"step": 2})
    assert read_metrics(run) == [{"step": 1}]
    log.close()
    assert read_metrics(run) == [{"step": 1}, {"step": 2}]


def test_rows_are_flushed_by_themselves_when_it_is_time(run: Store) -> None:
    log = MetricsLog(run, 1, 0, flush_s=-1)
    log.write({"step": 1})
    assert read_metrics(run) == [{"step": 1}]


def test_an_attempt_that_logged_nothing_leaves_no_segment(run: Store) -> None:
    MetricsLog(run, 2, 10).close()
    assert list(run.list("metrics/")) == []


def test_a_later_attempt_replaces_what_came_after_its_start_and_keeps_what_came_before(run: Store) -> None:
    segment(run, 1, 0, steps(1, 9, attempt=1))
    segment(run, 2, 5, steps(6, 12, attempt=2))
    segment(run, 3, 8, steps(9, 10, attempt=3))
    assert seen(run) == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in (6, 7, 8)] + [(9, 3.0), (10, 3.0)]


def test_attempts_are_ordered_by_number_and_not_as_text_or_by_start(run: Store) -> None:
    segment(run, 9, 7, steps(8, 9, attempt=9))
    segment(run, 10, 3, steps(4, 5, attempt=10))
    segment(run, 1, 0, steps(1, 6, attempt=1))
    assert seen(run) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 10.0), (5, 10.0)]


def test_an_attempt_that_starts_from_nothing_doubles_no_row(run: Store) -> None:
    segment(run, 1, 0, [{"stage": "main", "step": 0, "loss": 1.0}, *steps(1, 3, attempt=1)])
    segment(run, 2, 0, [{"stage": "main", "step": 0, "loss": 2.0}, *steps(1, 2, attempt=2)])
    assert seen(run) == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_an_attempt_that_starts_at_the_border_of_two_stages_loses_and_doubles_no_row(run: Store) -> None:
    ends, begins = {"stage": "a", "step": 4, "loss": 1.0}, {"stage": "b", "step": 4, "loss": 1.0}
    segment(run, 1, 0, [*steps(1, 3, attempt=1, stage="a"), ends, begins, *steps(5, 6, attempt=1, stage="b")])
    segment(run, 2, 4, [{**begins, "loss": 2.0}, *steps(5, 7, attempt=2, stage="b")])
    found = [(row["stage"], row["step"], row["loss"]) for row in read_metrics(run)]
    before = [("a", s, 1.0) for s in (1, 2, 3, 4)]
    assert found == before + [("b", s, 2.0) for s in (4, 5, 6, 7)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stay_valid_json(run: Store, value) -> None:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    segment(run, 1, 0, [{"step": 1, "loss": value, "lr": 0.5}])
    [line] = run.get("metrics/0001-00000000.jsonl").decode().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss": str(value), "lr": 0.5}


def test_tensorboard_gets_every_number_of_a_row(run: Store, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(run, 1, 0, tensorboard=True)
    log.write({"stage": "main", "step": 7, "loss": 0.5, "epoch": 1})
    log.close()
    (tmp_path / "board").mkdir()
    for entry in run.list("tensorboard/"):
        run.get_file(entry.key, tmp_path / "board" / entry.key.rpartition("/")[2])
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {(name, e.step, e.value) for name in board.Tags()["scalars"] for e in board.Scalars(name)} == {
        ("loss", 7, 0.5),
        ("epoch", 7, 1.0),
    }


# ---- Pace


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_pace_tells_throughput_share_of_waiting_and_time_left() -> None:
    clock = Clock()
    pace = Pace(batch=8, clock=clock)
    for _ in range(4):
        pace.wait()
        clock.now += 0.5
        pace.go()
        clock.now += 1.5
    assert pace.read(steps_left=10) == {"images_per_s": 4.0, "data_wait": 0.25, "eta_s": 20.0}


def test_every_reading_begins_a_new_measurement() -> None:
    clock = Clock()
    pace = Pace(batch=1, clock=clock)
    pace.wait()
    clock.now += 9
    pace.go()
    pace.read(1)
    pace.wait()
    pace.go()
    clock.now += 2
    assert pace.read(1) == {"images_per_s": 0.5, "data_wait": 0.0, "eta_s": 2.0}


def test_a_restart_forgets_what_was_no_training() -> None:
    clock = Clock()
    pace = Pace(batch=2, clock=clock)
    clock.now += 100
    pace.restart()
    pace.wait()
    pace.go()
    clock.now += 1
    assert pace.read(3) == {"images_per_s": 2.0, "data_wait": 0.0, "eta_s": 3.0}


def test_a_reading_without_a_step_is_zero_and_no_error() -> None:
    assert Pace(batch=2, clock=Clock()).read(3) == {"images_per_s": 0.0, "data_wait": 0.0, "eta_s": 0.0}
