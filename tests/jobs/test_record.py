"""The run record: legal moves only, one winner, and an honest view of who still works on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.small_json import SMALL
from core.storage import MissingObject
from jobs import cli, process
from jobs.errors import UserError
from jobs.pulse import HEARTBEAT_LIMIT_S
from jobs.record import LEGAL, IllegalMove, Run, State

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


# ---- what strangers and broken disks have written

DEEP = b"[" * 100_000
DAMAGED = [b"", b"{", DEEP, b"[]", b"null", b"3", b"\xff\xfe", b" " * (SMALL + 1), b"{}",
           b'{"number": 1, "state": "flying", "time": 1, "attempt": 1, "info": {}}',
           b'{"number": 1, "state": ["queued"], "time": 1, "attempt": 1, "info": {}}',
           b'{"number": 2, "state": "queued", "time": 1, "attempt": 1, "info": {}}',
           b'{"number": 1, "state": "queued", "time": NaN, "attempt": 1, "info": {}}',
           b'{"number": 1, "state": "queued", "time": 1e400, "attempt": 1, "info": {}}',
           b'{"number": 1, "state": "queued", "time": 1' + b"0" * 400 + b', "attempt": 1, "info": {}}',
           b'{"number": 1, "state": "queued", "time": "now", "attempt": 1, "info": {}}',
           b'{"number": 1, "state": "queued", "time": 1, "attempt": "1", "info": {}}',
           b'{"number": 1, "state": "queued", "time": 1, "attempt": 1, "info": []}',
           b'{"number": 1, "state": "queued", "time": 1, "attempt": 1, "info": {}, "more": 1}']  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_transition_is_a_row_and_not_the_end_of_status(
    new_run: MakeRun, root: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run("demo-2")
    new_run("demo-1")
    run.store.put("transitions/000001.json", content)
    assert cli.main(["status", "--store", root]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("demo-1 ")
    assert re.match(rf"demo-2 +unreadable +0  unreadable: {run.uri}/transitions/000001.json: ", lines[3])
    assert cli.main(["status", "--store", root, "--json"]) == 0
    assert [(row["run"], row["state"]) for row in json.loads(capsys.readouterr().out)] == [
        ("demo-1", "created"), ("demo-2", "unreadable"),
    ]  # fmt: skip
    for verb in ("status", "cancel", "logs"):
        assert cli.main([verb, "demo-2", "--store", root]) == 3
        assert f"error: unreadable: {run.uri}/transitions/000001.json" in capsys.readouterr().err


BEATS = [b"{", DEEP, b"[]", b" " * (SMALL + 1), b'{"time": "now", "attempt": 1}', b'{"time": 1}',
         b'{"time": NaN, "attempt": 1}']  # fmt: skip


@pytest.mark.parametrize("content", BEATS)
def test_a_damaged_heartbeat_is_said_and_the_run_stays_within_reach(
    new_run: MakeRun, root: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = to_running(new_run(recipe="name: demo\n"))
    run.store.put("heartbeat.json", content)
    for words in (["status"], ["status", run.id]):
        assert cli.main([*words, "--store", root]) == 0
        out = capsys.readouterr().out
        assert f"unreadable: {run.uri}/heartbeat.json: " in out
        assert "running" in out
    assert cli.main(["cancel", run.id, "--store", root]) == 0


def test_progress_of_any_kind_is_shown(new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = to_running(new_run())
    run.beat({"step": [], "steps": {}, "loss": "x", "images_per_s": [1], "eta_s": 10**400, "data_wait": None}, 1)
    assert cli.main(["status", "--store", root]) == 0
    assert "step []/{}, loss nan" in capsys.readouterr().out


def test_a_record_of_any_kind_is_shown(new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(recipe="name: demo\n")
    for record in (b'{"dotlist": 3, "recipe": [], "commit": {}}', b'{"dotlist": [1, {}]}'):
        run.store.put("record.json", record)
        assert cli.main(["status", run.id, "--store", root]) == 0
    run.store.put("record.json", DEEP)
    assert cli.main(["status", run.id, "--store", root]) == 3
    assert f"error: unreadable: {run.uri}/record.json" in capsys.readouterr().err


@pytest.mark.parametrize("ahead_s", [HEARTBEAT_LIMIT_S + 5, 86400.0 * 365])
def test_a_beat_from_the_future_does_not_hide_that_the_run_has_died(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    run = to_running(new_run())
    now = time.time()
    with monkeypatch.context() as writer:
        writer.setattr(time, "time", lambda: now + ahead_s)
        run.beat({}, 1)
    assert run.view().shown == "running", "by the store's clock it has just come"
    path = Path(run.store.uri.removeprefix("file://")) / "heartbeat.json"
    os.utime(path, (now - 1000, now - 1000))
    monkeypatch.setattr(time, "time", lambda: now + HEARTBEAT_LIMIT_S + 2)
    if ahead_s > 1000:
        assert "no heartbeat for 62 s" in run.view().lost, "since it began to run"


def test_a_run_all_of_whose_times_lie_ahead_is_lost_and_says_why(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = to_running(new_run())
    run.beat({}, 1)
    past = time.time() - 86400
    monkeypatch.setattr(time, "time", lambda: past)
    assert "its last sign of life lies 86400 s ahead of this machine's clock" in run.view().lost


def test_a_beat_a_little_ahead_is_believed(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = to_running(new_run())
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30)
    run.beat({}, 1)
    monkeypatch.setattr(time, "time", lambda: now)
    assert run.view().shown == "running"
