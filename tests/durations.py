"""How long tests take, against what was recorded: `tests/durations.json` holds the seconds of those that take longest.

Every run of the suite says how long it took in all and which tests have become twice as slow as recorded, beside what
all others have (a busy or slower machine); nothing fails for it. `make test RECORD=1` and `make test-system RECORD=1`
write what they measured.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).with_name("durations.json")
KEPT_S = 1.0  # shorter tests are not recorded
GROWN_S = 2.0  # by which a test must have grown to be named: short ones vary


class Durations:
    """Sums set-up, call and tear-down of each test, whichever process ran it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if not self.seconds:
            return
        recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        terminalreporter.section("durations")
        total = sum(self.seconds.values())
        terminalreporter.line(f"{len(self.seconds)} tests took {total:.0f} s, those side by side added up")
        for line in grown(self.seconds, recorded):
            terminalreporter.line(line)
        if os.environ.get("RECORD") == "1":
            RECORD.write_text(json.dumps(updated(recorded, self.seconds), indent=0, sort_keys=True) + "\n")
            terminalreporter.line(f"written to {RECORD.name}")


def grown(seconds: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """A line for each test that takes twice as long as recorded, the worst first.

    A factor that half of all tests share is the machine's, and is taken out.
    """
    ratios = {name: seconds[name] / recorded[name] for name in recorded.keys() & seconds.keys()}
    usual = max(statistics.median(ratios.values()), 1.0) if ratios else 1.0
    worst = sorted(ratios, key=lambda name: -ratios[name])
    slower = [n for n in worst if ratios[n] > 2 * usual and seconds[n] / usual - recorded[n] > GROWN_S]
    unknown = [n for n in seconds.keys() - recorded.keys() if recorded and seconds[n] / usual > 10 * KEPT_S]
    return [
        *(f"twice as slow as recorded: {n}: {seconds[n]:.1f} s, was {recorded[n]:.1f} s" for n in slower),
        *(f"slow and not recorded: {n}: {seconds[n]:.1f} s" for n in sorted(unknown)),
    ]


def updated(recorded: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """The record with what was measured now; tests that did not run keep what they had."""
    now = {name: round(taken, 1) for name, taken in seconds.items() if taken >= KEPT_S}
    return {name: taken for name, taken in recorded.items() if name not in seconds} | now


def longest_first(names: list[str], recorded: dict[str, float]) -> list[str]:
    """Files in the order in which they had better begin, so that no long one is left over at the end.

    names: of the file of each test.  recorded: seconds by file.
    """
    return sorted(dict.fromkeys(names), key=lambda name: -recorded.get(name, 0.0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    seconds = Counter[str]()
    for item in items:
        seconds[file_of(item)] += recorded.get(item.nodeid, 0.0)
    order = {name: place for place, name in enumerate(longest_first([file_of(item) for item in items], seconds))}
    items.sort(key=lambda item: order[file_of(item)])


def file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("RECORD", "") not in ("", "1"):
        raise pytest.UsageError("RECORD: 1 writes tests/durations.json; there is no other value")
    if not hasattr(config, "workerinput"):  # in the process that hears of all tests
        config.pluginmanager.register(Durations())
