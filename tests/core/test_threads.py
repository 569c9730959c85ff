"""Work shared out to threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from core.threads import in_threads


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 * (item == 0))
        return item * item

    assert in_threads(slow_first, range(20), 4) == [i * i for i in range(20)]
    assert in_threads(slow_first, [], 4) == []


def test_no_more_threads_work_than_asked_for() -> None:
    seen = set()

    def note(item: int) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.001)

    in_threads(note, range(50), 3)
    assert 1 < len(seen) <= 3
    assert threading.get_ident() in seen


def test_an_error_is_raised_and_what_has_not_begun_is_left() -> None:
    begun = []

    def fail(item: int) -> None:
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        in_threads(fail, range(100), 2)
    assert len(begun) <= 2


def test_a_process_exits_while_a_helper_hangs() -> None:
    code = (
        "import threading, time; from core.threads import in_threads; "
        "threading.Thread(target=in_threads, args=(lambda item: time.sleep(1000), range(2), 2), daemon=True).start()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
