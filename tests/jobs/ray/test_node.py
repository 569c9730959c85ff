"""Ranks on a node of a Ray cluster: those of earlier attempts, and how their ends are told."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError

from jobs import process
from jobs.ray import attempt, leave, node
from jobs.ray.node import RankFailed
from jobs.record import Run

Ranks = dict[str, subprocess.Popen[str]]
STORE = "file:///nowhere"
WORKER = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Stand-ins for ranks, found under a module's name of their own."""
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.setattr(node, "WORKER", "stand_in")
    monkeypatch.setattr(leave, "OURS", ("stand_in_too", "stand_in"))
    found = {}
    for name, run, number in (("old", "demo-1", "9"), ("new", "demo-1", "10"), ("newer", "demo-1", "11"),
                              ("other", "demo-2", "1")):  # fmt: skip
        words = [sys.executable, "-m", "stand_in", "--run", run, "--store", STORE, "--attempt", number]
        found[name] = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert found[name].stdout.readline() == "ready\n"  # type: ignore[union-attr]
    yield found
    for each in found.values():
        each.kill()
        each.wait()


def test_ranks_of_an_earlier_attempt_leave_the_node_first(ranks: Ranks) -> None:
    node.end_leftovers(Run("file:///elsewhere", "demo-1"), 10, grace_s=5.0)  # the same recipe in another store
    assert len(process.running("stand_in")) == 4
    node.end_leftovers(Run(STORE, "demo-1"), 10, grace_s=5.0)
    assert {each.pid for each in process.running("stand_in")} == {ranks[name].pid for name in ("new", "newer", "other")}


def test_a_pod_that_has_to_go_asks_all_its_ranks(ranks: Ranks) -> None:
    assert leave.main(["--grace", "5"]) == 0
    assert not process.running("stand_in")


def test_the_rank_that_was_killed_explains_the_others() -> None:
    class Wrapped(Exception):  # noqa: N818 - as Ray does
        def __init__(self, error: Exception) -> None:
            super().__init__(str(error))
            self._base_exc = error

    echo, killed = RankFailed(0, 3, "rank 0: connection lost"), RankFailed(1, -9, "rank 1: killed by SIGKILL")
    failure, why = attempt.worst({0: Wrapped(echo), 1: Wrapped(killed)})
    assert (failure.rank, failure.code, why) == (1, -9, "rank 1: killed by SIGKILL")


def test_a_lost_ray_worker_counts_as_a_killed_rank() -> None:
    dead = ActorDiedError()
    failure, why = attempt.worst({0: RankFailed(0, 3, "rank 0: connection lost"), 1: dead})
    assert (failure.rank, failure.code) == (1, -signal.SIGKILL)
    assert why.startswith("rank 1: its Ray worker or node was lost: ")


def test_a_node_that_cannot_start_a_rank_says_why() -> None:
    failure, why = attempt.worst({1: OSError("No space left on device")})
    assert (failure.rank, failure.code) == (1, 3)
    assert why == "rank 1 could not be started: No space left on device"


def test_wrong_input_is_told_as_such() -> None:
    failure, _ = attempt.worst({0: RankFailed(0, 2, "rank 0: exit code 2")})
    assert failure.code == 2
