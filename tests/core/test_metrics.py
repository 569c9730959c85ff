from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core import commits
from core.comm import Comm
from core.metrics import LIVE, Meter, MetricsLog, Pace, last_step, read_metrics, segment_key
from core.storage import Store, open_store
from tests.core.logs import claim, log, manifest
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
    assert m.read() == {"loss": 2.0, "grad": 5.0}


def test_tensors_with_dimensions_are_not_logged() -> None:
    m = meter()
    m.add({"loss": scalar(1.0), "per_image": torch.ones(4), "one": torch.ones(1)})
    assert set(m.read()) == {"loss"}


def test_many_small_values_are_summed_exactly_enough() -> None:
    m = meter()
    for _ in range(3000):
        m.add({"x": scalar(0.1).to(torch.bfloat16)})
    assert m.read()["x"] == pytest.approx(float(scalar(0.1).to(torch.bfloat16)), rel=1e-9)


def test_adding_never_waits_for_the_device_and_holds_no_graph() -> None:
    m, parameter = meter(), torch.nn.Parameter(scalar(2.0))
    with HostSyncs() as syncs:
        for _ in range(3):
            loss = parameter * 2
            m.add({"loss": loss, "per_image": torch.ones(4)})
    assert syncs.found == []
    assert not any(total.requires_grad for total in m._sums.values())
    with HostSyncs() as syncs:
        assert m.read()["loss"] == 4.0
    assert len(syncs.found) <= 1  # all values together


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


def at_once(name: str, put: Callable[[], object]) -> None:
    put()


def segment(run: Store, claim: int, start: int, rows: list[dict[str, Any]]) -> None:
    """What an attempt wrote and flushed behind its last checkpoint."""
    log = MetricsLog(run, claim, start, at_once)
    for row in rows:
        log.write(row)
    log.flush()
    log.close()


def start(run: Store, attempt: int, resumed: int | None = None, step: int = 0) -> int:
    """An attempt starts; the number of its claim."""
    log(run, claim(attempt, resumed, step))
    return commits.numbers(run)[-1]


def train(run: Store, own: int, first: int, last: int, before: list[str], more: list[dict[str, Any]] | None = None
) -> tuple[int, list[str]]:  # fmt: skip
    """Rows of steps `first` to `last` and a checkpoint there; its number and its segments."""
    writer = MetricsLog(run, own, first - 1, at_once)
    for row in more or steps(first, last, own):
        writer.write(row)
    key, content = writer.cut(last)
    run.put(key, content)
    log(run, manifest(last, own, metrics=[*before, key]))
    return commits.numbers(run)[-1], [*before, key]


def steps(first: int, last: int, claim: int, stage: str = "main") -> list[dict[str, Any]]:
    return [{"stage": stage, "step": s, "loss": float(claim)} for s in range(first, last + 1)]


def seen(run: Store) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


def losses(first: int, last: int, claim: int) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in steps(first, last, claim)]


def test_rows_of_one_attempt_come_back_as_they_were_written(run: Store) -> None:
    rows = [{"stage": "main", "step": 0, "heldout_loss": 0.1 + 0.2}, *steps(1, 3, claim=1)]
    start(run, 1)
    segment(run, 1, 0, rows)
    assert read_metrics(run) == rows
    assert [e.key for e in run.list("metrics/")] == ["metrics/000001-00000000.jsonl.live"]


def test_a_run_without_metrics_has_no_rows(run: Store) -> None:
    assert read_metrics(run) == []
    assert last_step(run) == 0
    start(run, 1)
    assert read_metrics(run) == []


def test_nothing_reaches_the_store_before_it_is_time_and_everything_on_flush(run: Store) -> None:
    start(run, 1)
    log = MetricsLog(run, 1, 0, at_once, flush_s=3600)
    log.write({"step": 1})
    assert read_metrics(run) == []
    log.flush()
    log.write({"step": 2})
    assert read_metrics(run) == [{"step": 1}]
    log.flush()
    assert read_metrics(run) == [{"step": 1}, {"step": 2}]


def test_rows_are_flushed_by_themselves_when_it_is_time(run: Store) -> None:
    start(run, 1)
    log = MetricsLog(run, 1, 0, at_once, flush_s=-1)
    log.write({"step": 1})
    assert read_metrics(run) == [{"step": 1}]


def test_writing_and_flushing_leave_the_store_to_somebody_else(run: Store) -> None:
    start(run, 1)
    kept: dict[str, Callable[[], object]] = {}
    log = MetricsLog(run, 1, 0, kept.__setitem__, flush_s=-1)
    for step in range(1, 4):
        log.write({"step": step})
    assert list(run.list("metrics/")) == []
    assert list(kept) == ["metrics/000001-00000000.jsonl.live"], "one name: a later content replaces an earlier one"
    kept.popitem()[1]()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_a_segment_ends_with_all_its_rows_where_a_checkpoint_is_taken(run: Store) -> None:
    log = MetricsLog(run, 3, 4, at_once)
    log.write({"step": 5})
    log.flush()
    log.write({"step": 6})
    assert log.cut(6) == ("metrics/000003-00000004.jsonl", b'{"step": 5}\n{"step": 6}\n')
    log.flush()
    log.write({"step": 7})
    log.flush()
    assert [e.key for e in run.list("metrics/")] == [segment_key(3, 4) + LIVE, segment_key(3, 6) + LIVE]
    assert run.get(segment_key(3, 6) + LIVE) == b'{"step": 7}\n'
    assert run.get(segment_key(3, 4) + LIVE) == b'{"step": 5}\n', "its whole content goes with the checkpoint"
    log.cut(8)
    assert [e.key for e in run.list("metrics/")] == [segment_key(3, 6) + LIVE], "the one before has arrived by now"


def test_a_part_of_a_segment_that_is_put_late_replaces_nothing(run: Store) -> None:
    """An attempt that slept with the request on its lips, while a newer one brought in the whole."""
    start(run, 1)
    late: dict[str, Callable[[], object]] = {}
    log = MetricsLog(run, 1, 0, late.__setitem__)
    log.write({"step": 1})
    log.flush()
    log.write({"step": 2})
    run.put(*log.cut(2))
    for put in late.values():
        put()
    assert [row["step"] for row in read_metrics(run)] == [1, 2]


def test_an_attempt_that_logged_nothing_leaves_no_segment(run: Store) -> None:
    segment(run, 2, 10, [])
    assert list(run.list("metrics/")) == []


def test_a_later_attempt_replaces_what_came_after_its_start_and_keeps_what_came_before(run: Store) -> None:
    first, names = train(run, start(run, 1), 1, 5, [])
    segment(run, 1, 5, steps(6, 9, claim=1))
    assert seen(run) == losses(1, 9, 1)
    own = start(run, 2, first, 5)
    assert seen(run) == losses(1, 5, 1), "the rest is computed again"
    second, names = train(run, own, 6, 8, names)
    segment(run, own, 8, steps(9, 12, claim=own))
    assert seen(run) == losses(1, 5, 1) + losses(6, 12, own)
    last = start(run, 3, second, 8)
    segment(run, last, 8, steps(9, 10, claim=last))
    assert seen(run) == losses(1, 5, 1) + losses(6, 8, own) + losses(9, 10, last)
    assert last_step(run) == 10


def test_an_attempt_that_goes_back_beyond_a_checkpoint_drops_its_rows(run: Store) -> None:
    first, names = train(run, start(run, 1), 1, 3, [])
    train(run, 1, 4, 9, names)
    own = start(run, 2, first, 3)
    assert seen(run) == losses(1, 3, 1)
    segment(run, own, 3, steps(4, 5, claim=own))
    assert seen(run) == losses(1, 3, 1) + losses(4, 5, own)


def test_claims_are_ordered_by_number_and_not_as_text_or_by_start(run: Store) -> None:
    for attempt in range(1, 9):
        start(run, attempt)
    number, names = train(run, start(run, 9), 1, 7, [])
    segment(run, 9, 7, steps(8, 9, claim=9))
    own = start(run, 10, number, 7)
    segment(run, own, 7, steps(8, 8, claim=own))
    assert own == 11
    assert seen(run) == losses(1, 7, 9) + [(8, 11.0)]


def test_an_attempt_that_starts_from_nothing_doubles_no_row(run: Store) -> None:
    begun = [{"stage": "main", "step": 0, "loss": 1.0}, *steps(1, 3, claim=1)]
    train(run, start(run, 1), 1, 3, [], begun)
    assert seen(run) == [(0, 1.0), *losses(1, 3, 1)]
    own = start(run, 2)
    segment(run, own, 0, [{"stage": "main", "step": 0, "loss": 2.0}, *steps(1, 2, claim=own)])
    assert seen(run) == [(0, 2.0), *losses(1, 2, own)]


def test_rows_behind_the_newest_checkpoint_of_the_attempt_at_work_count(run: Store) -> None:
    _, names = train(run, start(run, 1), 1, 4, [])
    segment(run, 1, 4, steps(5, 6, claim=1))
    train(run, 1, 5, 8, names)
    segment(run, 1, 8, steps(9, 9, claim=1))
    assert seen(run) == losses(1, 9, 1)


def test_a_segment_whose_checkpoint_is_not_there_yet_counts(run: Store) -> None:
    train(run, start(run, 1), 1, 4, [])
    segment(run, 1, 4, steps(5, 8, claim=1))
    segment(run, 1, 8, steps(9, 10, claim=1))
    assert seen(run) == losses(1, 10, 1)


def test_an_attempt_that_starts_at_the_border_of_two_stages_loses_and_doubles_no_row(run: Store) -> None:
    ends, begins = {"stage": "a", "step": 4, "loss": 1.0}, {"stage": "b", "step": 4, "loss": 1.0}
    number, _ = train(run, start(run, 1), 1, 4, [], [*steps(1, 3, claim=1, stage="a"), ends])
    segment(run, 1, 4, [begins, *steps(5, 6, claim=1, stage="b")])
    own = start(run, 2, number, 4)
    segment(run, own, 4, [{**begins, "loss": float(own)}, *steps(5, 7, claim=own, stage="b")])
    found = [(row["stage"], row["step"], row["loss"]) for row in read_metrics(run)]
    before = [("a", s, 1.0) for s in (1, 2, 3, 4)]
    assert found == before + [("b", s, float(own)) for s in (4, 5, 6, 7)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stay_valid_json(run: Store, value) -> None:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    segment(run, 1, 0, [{"step": 1, "loss": value, "lr": 0.5}])
    [line] = run.get("metrics/000001-00000000.jsonl.live").decode().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss": str(value), "lr": 0.5}


def test_tensorboard_gets_every_number_of_a_row(run: Store, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(run, 1, 0, at_once, tensorboard=True)
    log.write({"stage": "main", "step": 7, "loss": 0.5, "epoch": 1})
    log.flush()
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
