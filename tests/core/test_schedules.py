from __future__ import annotations

import numpy as np
import pytest

from core.schedules import warmup_cosine


def _curve(steps: int, **settings: float) -> list[float]:
    return [warmup_cosine(step, steps=steps, **settings) for step in range(steps)]  # type: ignore[arg-type]


def test_warmup_is_a_linspace_whose_last_step_and_the_next_are_at_the_peak() -> None:
    curve = _curve(40, base=2.0, final=0.1, warmup=10)
    assert curve[:10] == pytest.approx(np.linspace(0, 2.0, 10).tolist(), abs=1e-15)
    assert curve[9] == curve[10] == 2.0
    assert curve[11] < 2.0


def test_cosine_is_half_way_at_half_time_and_stays_short_of_the_end() -> None:
    curve = _curve(100, base=1.0, final=0.0)
    assert curve[0] == 1.0
    assert curve[50] == pytest.approx(0.5)
    assert 0 < curve[99] < 1e-3
    assert all(a > b for a, b in zip(curve, curve[1:], strict=False))


def test_the_final_value_holds_after_the_last_step() -> None:
    assert warmup_cosine(100, base=1.0, final=0.25, steps=100) == 0.25
    assert warmup_cosine(10**9, base=1.0, final=0.25, steps=100, warmup=10) == 0.25


def test_it_may_rise() -> None:
    curve = _curve(10, base=0.0, final=1.0)
    assert curve[0] == 0.0
    assert all(a < b for a, b in zip(curve, curve[1:], strict=False))


def test_a_warmup_of_one_step_is_that_step_at_zero() -> None:
    assert _curve(3, base=1.0, final=0.0, warmup=1)[:2] == [0.0, 1.0]


def test_a_run_shorter_than_its_warmup_only_warms_up() -> None:
    assert _curve(4, base=1.0, final=0.0, warmup=9) == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8])
