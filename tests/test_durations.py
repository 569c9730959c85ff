"""The record of how long tests take: what is named, and what is not."""

from __future__ import annotations

from tests.durations import grown, longest_first, updated

RECORDED = {"slow": 10.0, "other": 10.0, "third": 5.0, "short": 1.0}


def test_a_test_that_takes_twice_as_long_is_named_with_both_figures() -> None:
    now = {**RECORDED, "slow": 25.0}
    assert grown(now, RECORDED) == ["twice as slow as recorded: slow: 25.0 s, was 10.0 s"]


def test_a_slower_machine_is_no_slower_test() -> None:
    now = {name: 3 * taken for name, taken in RECORDED.items()}
    assert grown(now, RECORDED) == []
    assert grown({**now, "slow": 75.0}, RECORDED) == ["twice as slow as recorded: slow: 75.0 s, was 10.0 s"]


def test_short_tests_may_vary() -> None:
    assert grown({**RECORDED, "short": 2.9}, RECORDED) == []


def test_a_long_test_that_nobody_has_recorded_is_named() -> None:
    assert grown({**RECORDED, "new": 30.0}, RECORDED) == ["slow and not recorded: new: 30.0 s"]
    assert grown({"new": 30.0}, {}) == []


def test_recording_keeps_what_did_not_run_and_forgets_what_has_become_fast() -> None:
    assert updated(RECORDED, {"slow": 0.4, "new": 12.34}) == {"other": 10.0, "third": 5.0, "short": 1.0, "new": 12.3}


def test_the_longest_files_begin_first_and_what_is_not_recorded_keeps_its_place_behind_them() -> None:
    assert longest_first(["a", "b", "a", "c", "d"], {"c": 5.0, "b": 9.0}) == ["b", "c", "a", "d"]
