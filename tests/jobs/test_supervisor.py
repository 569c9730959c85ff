"""The supervisor with real processes: how ranks end decides what becomes of the run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.storage import StoreError
from jobs.launchers.supervisor import Policy, Supervisor
from jobs.logkeeper import LogKeeper
from jobs.placement import Placement
from jobs.record import Run, State
from tests.jobs.conftest import fake_worker

MakeRun = Callable[..., Run]
LIMIT_S = 30.0


def supervisor(run: Run, deed: str, tmp_path: Path, ranks: int = 2, **options: Any) -> Supervisor:
    run.move(State.QUEUED, 1)
    placement = Placement(ranks, "cpu", 3)
    chosen = {"grace_s": 0.2, "stop_grace_s": 3600.0, **options}
    return Supervisor(run, placement, fake_worker(deed), tmp_path / "logs", {"launcher": "local"}, **chosen)


def states(run: Run) -> list[str]:
    return [str(t.state) for t in run.transitions()]


def wait_for(run: Run, state: State) -> None:
    limit = time.monotonic() + LIMIT_S
    while run.last().state != state:
        assert time.monotonic() < limit, f"still {run.last()}"
        time.sleep(0.02)


def test_a_run_succeeds_when_its_ranks_say_so(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "ok", tmp_path).work(1) == 0
    assert states(run) == ["created", "queued", "running", "succeeded"]


def test_a_failing_rank_ends_the_others_and_its_words_are_the_reason(
    new_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    run = new_run()
    assert supervisor(run, "fail", tmp_path).work(1) == 1
    last = run.last()
    assert last.state == State.FAILED
    assert last.info["rank"] == 1
    assert "rank 1: exit code 1" in last.info["reason"]
    assert "ValueError: broken" in last.info["reason"]
    assert "very-secret-value" not in last.info["reason"]
    assert (tmp_path / "logs/attempt-0001/rank-0000.log").read_text() == ""


def test_ranks_that_do_not_end_beside_a_failed_one_are_killed(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "stubborn", tmp_path).work(1) == 1
    assert "rank 1: exit code 1" in run.last().info["reason"]
    assert (tmp_path / "logs/attempt-0001/rank-0000.log").read_text() == ""  # it did not live to say anything


def test_a_rank_killed_from_outside_fails_the_run(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "killed", tmp_path).work(1) == 1
    assert run.last().info["reason"].startswith("rank 1: killed by SIGKILL (out of memory?)")


def test_ranks_that_end_without_finishing_fail_the_run(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "vanish", tmp_path, ranks=1).work(1) == 1
    assert "before the run was finished" in run.last().info["reason"]


def test_an_abort_after_success_does_not_undo_it(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "abort_at_exit", tmp_path, ranks=1).work(1) == 0
    assert run.last().state == State.SUCCEEDED


def test_a_preempted_run_is_queued_again_with_the_next_attempt(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "preempted_once", tmp_path, policy=Policy(2)).work(1) == 0
    assert states(run)[2:] == ["running", "preempted", "queued", "running", "succeeded"]
    assert run.last().attempt == 2
    assert run.handle(run.last()) == {"launcher": "local"}


def test_attempts_are_bounded(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "preempted_once", tmp_path, policy=Policy(1)).work(1) == 75
    assert states(run)[-1] == "preempted"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_every_rank(new_run: MakeRun, tmp_path: Path, signum: signal.Signals) -> None:
    run = new_run()
    watch = supervisor(run, "wait", tmp_path)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(watch.work(1)))
    thread.start()
    wait_for(run, State.RUNNING)
    logs = [tmp_path / f"logs/attempt-0001/rank-{rank:04d}.log" for rank in range(2)]
    limit = time.monotonic() + LIMIT_S
    while not all("ready" in log.read_text() for log in logs) and time.monotonic() < limit:
        time.sleep(0.02)
    watch.stop(signum)
    thread.join(LIMIT_S)
    assert codes == [75]
    assert run.last().state == State.PREEMPTED
    assert all(f"asked by {signum.name}" in log.read_text() for log in logs)


def test_sigterm_ends_the_attempts_too(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    watch = supervisor(run, "wait", tmp_path, ranks=1, policy=Policy(3))
    watch.stop(signal.SIGTERM)
    assert watch.work(1) == 75
    assert run.last().attempt == 1


@pytest.mark.parametrize(("deed", "attempts"), [("killed_once", 2), ("hung_once", 2), ("store_down_once", 2)])
def test_what_another_attempt_may_survive_is_tried_again(
    new_run: MakeRun, tmp_path: Path, deed: str, attempts: int
) -> None:
    run = new_run()
    assert supervisor(run, deed, tmp_path, policy=Policy(3)).work(1) == 0
    assert states(run)[2:] == ["running", "failed", "queued", "running", "succeeded"]
    assert run.last().attempt == attempts


def test_a_hung_rank_is_called_so(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    supervisor(run, "hung_once", tmp_path, policy=Policy(1)).work(1)
    assert run.last().info["reason"].startswith("rank 1: hung")


@pytest.mark.parametrize("deed", ["fail", "wrong_input"])
def test_an_error_that_would_come_again_is_not_tried_again(new_run: MakeRun, tmp_path: Path, deed: str) -> None:
    run = new_run()
    assert supervisor(run, deed, tmp_path, policy=Policy(3)).work(1) == 1
    assert run.last().attempt == 1


def test_a_killed_rank_explains_the_errors_that_the_others_die_of(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    supervisor(run, "echo", tmp_path, policy=Policy(1)).work(1)
    assert run.last().info["reason"].startswith("rank 1: killed by SIGKILL")


def test_pauses_between_attempts_double_up_to_an_hour() -> None:
    policy = Policy(9, backoff_s=10.0)
    for made, longest in ((1, 10.0), (2, 20.0), (3, 40.0), (20, 3600.0)):
        assert 0.75 * longest <= policy.pause_s(made) <= longest


def test_no_attempt_begins_behind_the_deadline(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "preempted_once", tmp_path, policy=Policy(3, backoff_s=60.0, deadline_s=5.0)).work(1) == 75
    assert states(run)[-1] == "preempted"


def test_sigterm_during_the_pause_ends_the_attempts(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    watch = supervisor(run, "preempted_once", tmp_path, policy=Policy(3, backoff_s=3600.0))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(watch.work(1)))
    thread.start()
    wait_for(run, State.PREEMPTED)
    time.sleep(0.2)
    watch.stop(signal.SIGTERM)
    thread.join(LIMIT_S)
    assert codes == [75]
    assert run.last().attempt == 1


def test_the_end_of_an_attempt_is_written_down_once_the_store_is_back(
    new_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    watch = supervisor(run, "killed", tmp_path, policy=Policy(1))
    monkeypatch.setattr("jobs.launchers.tries.STORE_PAUSE_S", 1.0)
    last, failures = run.last, iter(range(2))

    def down() -> Any:
        if next(failures, None) is not None:
            raise StoreError("no answer")
        return last()

    monkeypatch.setattr(run, "last", down)
    assert watch.work(1) == 1
    assert last().state == State.FAILED


def test_a_cancelled_run_is_not_taken_up_again(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    watch = supervisor(run, "wait", tmp_path, ranks=1, policy=Policy(3))
    thread = threading.Thread(target=watch.work, args=(1,))
    thread.start()
    wait_for(run, State.RUNNING)
    run.move(State.CANCELLED)
    watch.stop(signal.SIGUSR1)
    thread.join(LIMIT_S)
    assert states(run)[-1] == "cancelled"


def test_ranks_that_do_not_leave_in_time_are_killed(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    watch = supervisor(run, "deaf", tmp_path, ranks=1, stop_grace_s=0.2)
    thread = threading.Thread(target=watch.work, args=(1,))
    thread.start()
    wait_for(run, State.RUNNING)
    watch.stop(signal.SIGTERM)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert run.last().state == State.FAILED
    assert "SIGKILL" in run.last().info["reason"]


def test_logs_lie_in_the_store_when_the_run_has_ended(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    supervisor(run, "fail", tmp_path).work(1)
    assert b"ValueError: broken" in run.store.get("logs/attempt-0001/rank-0001.log")


def test_logs_reach_the_store_while_the_run_goes_on(new_run: MakeRun, tmp_path: Path) -> None:
    run, log = new_run(), tmp_path / "attempt-0001" / "rank-0000.log"
    log.parent.mkdir()
    keeper = LogKeeper(run, log.parent, every_s=0.02)
    log.write_text("first\n")
    limit = time.monotonic() + LIMIT_S
    while run.store.size("logs/attempt-0001/rank-0000.log") is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    keeper.close()


def test_a_log_that_cannot_be_stored_is_tried_again(
    new_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log = new_run(), tmp_path / "attempt-0001" / "rank-0000.log"
    log.parent.mkdir()
    log.write_text("words\n")
    keeper = LogKeeper(run, log.parent, every_s=60)
    put_file = run.store.put_file

    def down(key: str, path: Path) -> None:
        raise StoreError("down")

    monkeypatch.setattr(run.store, "put_file", down)
    keeper.flush()
    monkeypatch.setattr(run.store, "put_file", put_file)
    keeper.close()
    assert run.store.get("logs/attempt-0001/rank-0000.log") == b"words\n"


def test_ranks_find_what_torch_distributed_needs_in_their_environment(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    supervisor(run, "environment", tmp_path).work(1)
    seen = [json.loads((tmp_path / f"logs/attempt-0001/rank-{r:04d}.log").read_text()) for r in range(2)]
    assert [(e["RANK"], e["LOCAL_RANK"]) for e in seen] == [("0", "0"), ("1", "1")]
    for one in seen:
        fixed = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}
        assert fixed.items() <= one.items()
        assert one["DS_ACCELERATOR"] == "cpu"
    assert seen[0]["RETORT_MEETING_FILE"] == seen[1]["RETORT_MEETING_FILE"]
    assert not Path(seen[0]["RETORT_MEETING_FILE"]).parent.exists(), "nothing is left of where they met"
    assert os.environ.get("RANK") is None
