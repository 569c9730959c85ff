"""What a Ray job makes of its run: attempts, their ends, and what a retry of the whole job goes on with."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config import load, to_yaml
from jobs.errors import NotReady
from jobs.launchers import Look, tries
from jobs.placement import Placement
from jobs.ray import command, entry
from jobs.ray.entry import Entry
from jobs.record import Run, State

MakeRun = Callable[..., Run]
FAKE = str(Path(__file__).with_name("fake_attempt.py"))
OWN = {"launcher": "ray", "job": "demo-1", "at": "http://127.0.0.1:1"}


@pytest.fixture
def run(new_run: MakeRun, tiny_recipe: Path) -> Run:
    policy = ["launch.max_attempts=2", "launch.backoff_s=0.01", "launch.grace_s=1"]
    return new_run(recipe=to_yaml(load(str(tiny_recipe), dotlist=policy)))


def job(run: Run, deed: str, at: str = "http://127.0.0.1:1") -> Entry:
    words = command.line("python", run.id, run.root, "demo-1", at, Placement(2, "cpu", 1), 1)
    options = command.parser("jobs.ray.entry", "job", "at", "after").parse_args(words.split()[3:])
    return Entry(run, options, (sys.executable, FAKE, deed))


def moves(run: Run) -> list[tuple[str, int]]:
    return [(str(t.state), t.attempt) for t in run.transitions()]


def test_a_job_takes_the_run_that_was_queued_for_it_to_its_end(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    assert job(run, "ok").work() == 0
    assert moves(run) == [("created", 0), ("queued", 1), ("running", 1), ("succeeded", 1)]


def test_a_manifest_applied_by_hand_takes_a_run_that_nobody_has(run: Run) -> None:
    assert job(run, "ok").work() == 0
    assert run.handle(run.last()) == {**OWN, "ranks": 2}


@pytest.mark.parametrize(
    ("deed", "state", "why"),
    [("preempted-once", State.PREEMPTED, "SIGTERM received"), ("rank-lost-once", State.FAILED, "rank 1: rank-lost"),
     ("killed-once", State.FAILED, "the process that drives the attempt: killed by SIGKILL")],
)  # fmt: skip
def test_another_attempt_follows_what_may_pass(run: Run, deed: str, state: State, why: str) -> None:
    run.move(State.QUEUED, 1, **OWN)
    assert job(run, deed).work() == 0
    assert moves(run)[3:] == [(str(state), 1), ("queued", 2), ("running", 2), ("succeeded", 2)]
    assert run.transitions()[3].info["reason"] == why


def test_wrong_input_is_not_tried_again(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    assert job(run, "wrong-input").work() == 1
    assert moves(run)[-1] == ("failed", 1)


def test_failures_are_counted_and_preemptions_are_not(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    run.move(State.RUNNING)
    run.move(State.PREEMPTED)
    run.move(State.QUEUED, 2, **OWN)
    assert job(run, "killed").work() == 1
    assert moves(run)[-1] == ("failed", 3)  # launch.max_attempts=2 of them


def test_a_job_that_is_stopped_lets_its_ranks_save(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    made = job(run, "working")
    threading.Thread(target=_once_running, args=(run, made), daemon=True).start()
    assert made.work() == 75
    assert moves(run)[-2:] == [("running", 1), ("preempted", 1)]
    assert "asked to stop" in run.last().info["reason"]


def test_a_job_that_waits_for_nodes_can_be_stopped_at_once(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    made = job(run, "pending")
    threading.Timer(0.5, made.stop, (signal.SIGTERM,)).start()
    assert made.work() == 75
    assert moves(run)[-2:] == [("queued", 1), ("preempted", 1)]  # its ranks never began


def test_a_run_that_was_cancelled_is_left_cancelled(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    made = job(run, "working")
    threading.Thread(target=_once_running, args=(run, made, State.CANCELLED), daemon=True).start()
    assert made.work() == 0
    assert moves(run)[-1] == ("cancelled", 1)


def test_a_retry_on_a_new_cluster_goes_on_with_what_was_cut_short(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    run.move(State.RUNNING)
    assert job(run, "ok").work() == 0
    assert moves(run)[3:] == [("preempted", 1), ("queued", 2), ("running", 2), ("succeeded", 2)]
    assert "cluster or its head was lost" in run.transitions()[3].info["reason"]


def test_a_manifest_applied_by_hand_goes_on_with_what_another_launcher_has_left(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.move(State.QUEUED, 1, launcher="slurm", job="7")
    run.move(State.RUNNING)
    run.move(State.PREEMPTED, reason="asked to stop", again=True)
    monkeypatch.setattr(Run, "look", lambda self, last: Look(False, "SLURM job 7 is COMPLETED"))
    assert job(run, "ok").work() == 0
    assert run.handle(run.last())["launcher"] == "ray"


def test_a_retry_does_not_repeat_what_can_only_fail_again(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    job(run, "wrong-input").work()
    before = moves(run)
    assert job(run, "ok").work() == 1
    assert moves(run) == before


def test_on_kubernetes_what_can_only_fail_again_gets_no_further_cluster(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    assert job(run, "killed", "kubernetes:/ml").work() == 0
    assert moves(run)[-1] == ("failed", 2)  # launch.max_attempts=2
    assert job(run, "ok", "kubernetes:/ml").work() == 0  # as KubeRay's retry would
    assert moves(run)[-1] == ("failed", 2)


@pytest.mark.parametrize(
    ("at", "eval_", "code"),
    [("http://127.0.0.1:1", 2, 2), ("kubernetes:/ml", 2, 0), ("kubernetes:/ml", 3, 3), ("kubernetes:/ml", -9, 9)],
)
def test_a_verb_that_failed_after_the_run_gets_a_further_cluster_where_that_may_help(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str, eval_: int, code: int
) -> None:
    monkeypatch.setattr(Entry, "_verbs", lambda self, verbs: {"export": 0, "eval": eval_})
    made = job(run, "ok", at)
    made.options.after = "export,eval"
    assert made.work() == code
    assert moves(run)[-1] == ("succeeded", 1)
    assert f"eval of {run.id} failed with exit code {eval_}: make eval RUN={run.id}" in capsys.readouterr().out


def test_a_job_leaves_the_attempt_of_another_alone(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    made = job(run, "working")
    threading.Thread(target=_taken_over, args=(run, made), daemon=True).start()
    assert made.work() == 1
    assert moves(run)[-2:] == [("queued", 2), ("running", 2)]


def test_a_run_that_is_cancelled_while_it_waits_for_nodes_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "LOOK_S", 0.1)
    run.move(State.QUEUED, 1, **OWN)
    threading.Timer(1.0, run.move, (State.CANCELLED,)).start()
    assert job(run, "pending").work() == 0
    assert moves(run)[-1] == ("cancelled", 1)


def test_an_attempt_that_does_not_end_with_its_run_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "SPARE_S", 0.5)
    monkeypatch.setattr(entry, "LOOK_S", 0.1)
    run.move(State.QUEUED, 1, **OWN)
    assert job(run, "stuck").work() == 0
    assert moves(run)[-1] == ("succeeded", 1)


def test_a_retry_of_a_job_that_has_done_its_work_is_done(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    job(run, "ok").work()
    assert job(run, "ok").work() == 0


def test_a_job_whose_run_is_another_s_leaves_it_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.move(State.QUEUED, 1, **{**OWN, "job": "demo-2", "at": ""})
    monkeypatch.setattr(Run, "look", lambda self, last: Look(True, "it works"))
    assert job(run, "ok").work() == 1
    assert moves(run)[-1] == ("queued", 1)


def test_a_head_that_does_not_see_the_run_says_what_is_missing(root: str) -> None:
    with pytest.raises(NotReady, match="^the head: there is no run demo-1 in file:.*one that the nodes share"):
        tries.check(Run(root, "demo-1"), "the head")


def _once_running(run: Run, made: Entry, state: State | None = None) -> None:
    while run.last().state != State.RUNNING:
        time.sleep(0.05)
    if state:
        run.move(state)
    else:
        made.stop(signal.SIGTERM)


def _taken_over(run: Run, made: Entry) -> None:
    """Cancelled, and resumed as another job before the ranks of the first have left."""
    while run.last().state != State.RUNNING:
        time.sleep(0.05)
    run.move(State.CANCELLED)
    run.move(State.QUEUED, 2, **{**OWN, "job": "demo-2"})
    run.move(State.RUNNING)
