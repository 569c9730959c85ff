"""A few runs of the simulator: what is interrupted ends as the uninterrupted run does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.system.soak import Simulation, place, table
from tests.system.soak_plan import FAULTS, INTERRUPTIONS, Kind, draw

pytestmark = pytest.mark.system
SEEDS = (26, 42, 55)  # a bucket with faults beside folders, moves, sleep, damage, another node


def test_plans_come_from_the_seed() -> None:
    plans = [draw(seed) for seed in range(200)]
    assert plans == [draw(seed) for seed in range(200)]
    assert len({str(plan) for plan in plans}) == 200
    ends = Counter(each.end.kind for plan in plans for each in plan.tries if each.end is not None)
    faults = Counter(fault.kind for plan in plans for each in plan.tries for fault in each.faults)
    assert set(ends) == set(INTERRUPTIONS)
    assert set(faults) == set(FAULTS)
    assert {plan.s3 for plan in plans} == {plan.moves for plan in plans} == {False, True}
    assert all(not each.faults for plan in plans if not plan.s3 for each in plan.tries)


def test_interrupted_runs_are_the_uninterrupted_one(tmp_path: Path) -> None:
    with place(tmp_path) as there:
        reports = [Simulation(draw(seed, steps=8, most=2), there).play() for seed in SEEDS]
    print(table(reports))
    assert [report.wrong for report in reports] == [[]] * len(SEEDS)
    happened = sum((report.happened for report in reports), Counter[Kind]())
    assert sum(report.interruptions for report in reports) >= len(SEEDS)
    assert len(set(INTERRUPTIONS) & set(+happened)) >= 3
    assert sum(report.resumes for report in reports) >= 2
