from __future__ import annotations

import pytest

from core.features.advise import Advice, Rates

# A student of 3 ms and teachers of 2 ms an image; 1 MB a stored view; 100 epochs over 36,000 images, 2 views of each.
LIVE = Rates(student_s=0.003, teachers_s=0.002)


def advice(read: float = 0.0, images: int = 3_600_000, views: int = 2) -> Advice:
    return Advice(Rates(LIVE.student_s, LIVE.teachers_s, read), 1_000_000, images, 36_000, views)


def test_hours_and_bytes_follow_from_rates() -> None:
    found = advice()
    assert found.stored_bytes == 72e9
    assert found.live_hours == pytest.approx(5.0)
    assert found.making_hours == pytest.approx(0.04)
    assert found.stored_hours(1e9) == pytest.approx(3.04)  # the student's time: reading takes 1 ms
    assert found.stored_hours(1.25e8) == pytest.approx(8.04)  # reading takes 8 ms


def test_below_the_even_rate_live_teachers_are_faster_and_above_the_free_rate_reading_costs_nothing() -> None:
    found = advice()
    assert found.even_rate == pytest.approx(2e8)
    assert found.saved_hours(found.even_rate) == pytest.approx(-found.making_hours)
    assert found.saved_hours(found.free_rate) == found.saved_hours(1e12) == pytest.approx(1.96)


def test_the_verdict_says_what_decides() -> None:
    assert advice().verdict().startswith("store if each device reads 0.20 GB/s at least: saves up to 1.96 device hours")
    assert advice(read=1e9).verdict().startswith("store: saves 1.96 device hours at the 1.00 GB/s measured here")
    slow = "recompute: at the 0.10 GB/s measured here for each device reading is slower than teachers"
    assert advice(read=1e8).verdict() == slow
    dear = "recompute: making the features takes longer than training from them saves"
    assert advice(read=2.01e8).verdict() == dear
    assert advice(images=72_000).verdict() == "recompute: training sees each stored view once at most"
