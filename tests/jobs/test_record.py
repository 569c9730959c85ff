"""The run record: legal moves only, one winner, and an honest view of who still works on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.storage import MissingObject
from jobs import process
from jobs.errors import UserError
from jobs.record import HEARTBEAT_LIMIT_S, LEGAL, IllegalMove, Run, State

MakeRun = Callable[..., Run]


def to_running(run: Run, **info: object) -> Run:
    run.move(State.QUEUED, 1, **info)
    run.move(State.RUNNING, 1)
    return run


def test_a_run_goes_through_its_states_and_remembers_all_of_them(new_run: MakeRun) -> None:
    run = to_running(new_run(), launcher="local")
    run.move(State.PREEMPTED, 1)
    run.move(State.QUEUED, 2)
    run.move(State.RUNNING, 2)
    run.move(State.SUCCEEDED, 2, note="x")
    states = [(t.number, t.state, t.attempt) for t in run.transitions()]
    assert states == [
        (0, "created", 0), (1, "queued", 1), (2, "running", 1), (3, "preempted", 1),
        (4, "queued", 2), (5, "running", 2), (6, "succeeded", 2),
    ]  # fmt: skip
    assert run.last().info == {"note": "x"}


@pytest.mark.parametrize("state", [s for s in State if s not in (State.QUEUED, State.CREATED)])
def test_a_queued_run_refuses_what_cannot_follow(new_run: MakeRun, state: State) -> None:
    run = new_run()
    run.move(State.QUEUED, 1)
    if state in LEGAL[State.QUEUED]:
        assert run.move(state, 1).state == state
    else:
        with pytest.raises(IllegalMove, match="queued"):
            run.move(state, 1)


def test_nothing_follows_success(new_run: MakeRun) -> None:
    run = to_running(new_run())
    run.move(State.SUCCEEDED)
    for state in State:
        with pytest.raises(IllegalMove):
            run.move(state, 2 if state == State.QUEUED else None)


def test_an_earlier_attempt_cannot_write_any_more(new_run: MakeRun) -> None:
    run = to_running(new_run())
    run.move(State.PREEMPTED, 1)
    run.move(State.QUEUED, 2)
    with pytest.raises(IllegalMove, match="attempt 1"):
        run.move(State.FAILED, 1)
    assert run.last().state == State.QUEUED


def test_a_move_can_be_bound_to_the_state_it_was_meant_for(new_run: MakeRun) -> None:
    run = to_running(new_run())
    run.move(State.CANCELLED)
    with pytest.raises(IllegalMove, match="no longer preempted"):
        run.move(State.QUEUED, 2, only_from=State.PREEMPTED)


def test_of_many_writers_of_one_move_one_wins(new_run: MakeRun) -> None:
    run = new_run()

    def queue(_: int) -> bool:
        try:
            run.move(State.QUEUED, 1)
        except IllegalMove:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(queue, range(8))) == 1
    assert [t.state for t in run.transitions()] == ["created", "queued"]


def test_the_loser_of_a_race_reads_again_and_goes_on(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    run.move(State.QUEUED, 1)
    other, stale = Run(run.root, run.id), [run.last()]
    other.move(State.RUNNING, 1)
    monkeypatch.setattr(run, "last", lambda: stale.pop() if stale else Run.last(run))  # read before the other wrote
    assert run.move(State.CANCELLED).number == 3


def test_of_two_creators_one_wins_and_its_record_stays(root: str) -> None:
    first, second = Run(root, "demo-1"), Run(root, "demo-1")
    assert first.create("a: 1", {"by": "first"})
    assert not second.create("a: 2", {"by": "second"})
    assert second.record() == {"by": "first"}


def test_runs_are_listed_however_many_objects_they_hold(new_run: MakeRun, root: str) -> None:
    for name in ("demo-1", "demo-1-2", "demo-10", "unic-b-1"):
        run = new_run(name)
        for i in range(3):
            run.store.put(f"checkpoints/{i}/part", b"x")
    assert sorted(Run.list(root)) == ["demo-1", "demo-1-2", "demo-10", "unic-b-1"]
    assert Run.list(f"{root}/elsewhere") == []


def test_the_record_works_the_same_in_a_bucket(bucket: str) -> None:
    run = Run(bucket, "demo-1")
    run.create("", {})
    to_running(run)
    run.beat({"step": 3}, 1)
    assert Run.list(bucket) == ["demo-1"]
    assert (run.view().shown, run.view().heartbeat["step"]) == ("running", 3)


def test_an_unknown_run_is_a_user_error_with_the_nearest_name(new_run: MakeRun, root: str) -> None:
    new_run("demo-0123456789")
    with pytest.raises(UserError, match="did you mean demo-0123456789"):
        Run.find(root, "demo-012345678")
    with pytest.raises(MissingObject):
        Run(root, "demo-2").last()


@pytest.mark.parametrize("name", ["../x", "", "a/b", "A", "a b"])
def test_a_run_id_cannot_lead_elsewhere(root: str, name: str) -> None:
    with pytest.raises(UserError, match="not a run id"):
        Run(root, name)


def test_a_creation_that_was_cut_short_says_what_to_do(root: str) -> None:
    run = Run(root, "demo-1")
    run.create("", {})
    run.store.delete("recipe.yaml")
    with pytest.raises(UserError, match="submit its recipe again"):
        run.recipe()


def ended_process() -> dict[str, object]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    info = process.identity(child.pid)
    child.communicate(b"\n")
    return info


@pytest.mark.parametrize("running", [False, True])
def test_a_run_whose_supervisor_has_gone_is_lost(new_run: MakeRun, running: bool) -> None:
    run = new_run()
    run.move(State.QUEUED, 1, **ended_process())
    if running:
        run.move(State.RUNNING, 1)
        run.beat({}, 1)
    assert run.view().shown == "lost"
    assert not run.view().active


def test_only_a_run_without_a_pulse_is_lost(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = to_running(new_run(), host="elsewhere", pid=1)
    assert run.view().shown == "running"
    later = time.time() + HEARTBEAT_LIMIT_S + 5
    monkeypatch.setattr(time, "time", lambda: later)
    assert "no heartbeat" in run.view().lost
    run.beat({}, 1)
    assert run.view().shown == "running"


def test_the_pulse_of_an_earlier_attempt_does_not_count(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = to_running(new_run())
    later = time.time() + HEARTBEAT_LIMIT_S + 5
    monkeypatch.setattr(time, "time", lambda: later)
    run.beat({}, 0)
    assert run.view().shown == "lost"


def test_the_handle_is_what_the_launcher_wrote_for_the_newest_attempt(new_run: MakeRun) -> None:
    run = to_running(new_run(), pid=1)
    assert run.handle(run.last()) == {"pid": 1}
    run.move(State.FAILED)
    run.move(State.QUEUED, 2, pid=2, host="elsewhere")
    run.move(State.CANCELLED)
    assert run.handle(run.last()) == {"pid": 2, "host": "elsewhere"}


def test_a_process_is_told_from_a_later_one_of_the_same_number() -> None:
    info = process.identity(os.getpid())
    assert process.alive(info) is True
    assert process.alive({**info, "born": info["born"] + 1}) is False
    assert process.alive({**info, "host": "elsewhere"}) is None
    assert process.alive({}) is None
