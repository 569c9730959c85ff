from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core.storage import open_store
from core.watchdog import HUNG, Watchdog
from tests.core.logs import a_run

LIMIT_S = 0.8
RANK = """
import sys, time
from core.storage import open_store
from core.watchdog import Watchdog

def a_collective_that_hangs():
    time.sleep(60)

dog = Watchdog({limit_s}, "attempt-0001-rank-0003", open_store({uri!r}))
{then}
print("lives", flush=True)
"""


def rank(folder: Path, then: str, limit_s: float = LIMIT_S, uri: str = "") -> subprocess.CompletedProcess[str]:
    """A process with a watchdog that does `then`."""
    code = RANK.format(limit_s=limit_s, uri=uri or f"file://{folder}/run", then=then)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


HANGS = "dog.step()\na_collective_that_hangs()"


def test_a_rank_that_makes_no_more_steps_ends_and_tells_where_it_stands(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = rank(tmp_path, HANGS)
    assert ended.returncode == HUNG == 70
    assert time.monotonic() - began < 20
    told = a_run(tmp_path).get("hangs/attempt-0001-rank-0003.txt").decode()
    for text in (ended.stderr, told):
        assert "in a_collective_that_hangs" in text
    assert "hung: no step for 1 s (launch.hang_s)" in ended.stderr
    assert "lives" not in ended.stdout


def test_a_rank_whose_store_does_not_answer_ends_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    ended = rank(tmp_path, HANGS, uri=f"file://{tmp_path}/file")
    assert ended.returncode == HUNG
    assert "in a_collective_that_hangs" in ended.stderr


@pytest.mark.parametrize(
    "then",
    [
        "for _ in range(20):\n    dog.step()\n    time.sleep(0.1)",
        "dog.step()\ndog.rest()\ntime.sleep(1.5)",
        "dog.step()\ndog.close()\ntime.sleep(1.5)",
        "time.sleep(1.4)",
        "dog.rest()\ntime.sleep(1.5)\ndog.begin()\ntime.sleep(1.4)\ndog.step()",
    ],
    ids=["it steps", "the loop rests", "it is closed", "the first step is slow", "a later stage's first step is slow"],
)
def test_a_rank_that_is_no_longer_than_it_may_be_lives(tmp_path: Path, then: str) -> None:
    ended = rank(tmp_path, then)
    assert (ended.returncode, ended.stdout) == (0, "lives\n")
    assert ended.stderr == ""


@pytest.mark.parametrize("then", ["a_collective_that_hangs()", "dog.rest()\ndog.begin()\na_collective_that_hangs()",
                                  "dog.rest()\ndog.step()\na_collective_that_hangs()"])  # fmt: skip
def test_a_first_step_that_never_ends_is_found_too(tmp_path: Path, then: str) -> None:
    assert rank(tmp_path, then).returncode == HUNG


def test_native_code_that_holds_the_interpreter_is_ended_by_the_second_watch(tmp_path: Path) -> None:
    stuck = "import core.watchdog, ctypes\ncore.watchdog.LAST_WORDS_S = 0.2\ndog._native = 0.0\ndog.step()\n"
    began = time.monotonic()
    ended = rank(tmp_path, f"{stuck}ctypes.PyDLL(None).sleep(40)")
    assert ended.returncode != 0
    assert time.monotonic() - began < 20
    assert "Timeout" in ended.stderr
    assert 'File "<string>"' in ended.stderr


def test_without_a_limit_nobody_watches(tmp_path: Path) -> None:
    before = threading.active_count()
    dog = Watchdog(0.0, "rank", open_store(f"file://{tmp_path}/run"))
    dog.step()
    assert threading.active_count() == before
    dog.rest()
    dog.close()
