"""The supervisor with real processes: how ranks end decides what becomes of the run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.storage import StoreError
from jobs.launchers.supervisor import LogKeeper, Supervisor
from jobs.placement import Placement
from jobs.record import Run, State
from tests.jobs.conftest import fake_worker

MakeRun = Callable[..., Run]
LIMIT_S = 30.0


def supervisor(run: Run, deed: str, tmp_path: Path, ranks: int = 2, **options: float) -> Supervisor:
    run.move(State.QUEUED, 1)
    placement = Placement(ranks, "cpu", 3)
    chosen = {"grace_s": 0.2, "stop_grace_s": 3600.0, **options}
    return Supervisor(run, placement, fake_worker(deed), tmp_path / "logs", {"launcher": "local"}, **chosen)  # type: ignore[arg-type]


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
    assert supervisor(run, "preempted_once", tmp_path, max_attempts=2).work(1) == 0
    assert states(run)[2:] == ["running", "preempted", "queued", "running", "succeeded"]
    assert run.last().attempt == 2
    assert run.handle(run.last()) == {"launcher": "local"}


def test_attempts_are_bounded(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    assert supervisor(run, "preempted_once", tmp_path, max_attempts=1).work(1) == 75
    assert states(run)[-1] == "preempted"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_every_rank(new_run: MakeRun, tmp_path: Path, signum: signal.Signals) -> None:
    run = new_run()
    watch = supervisor(run, "wait", tmp_path)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(watch.work(1)))
    thread.start()
    wait_for(run, State.RUNNING)
    watch.stop(signum)
    thread.join(LIMIT_S)
    assert codes == [75]
    assert run.last().state == State.PREEMPTED
    if signum != signal.SIGTERM:  # which also ends a rank that has no handler yet
        for rank in range(2):
            assert f"asked by {signum.name}" in (tmp_path / f"logs/attempt-0001/rank-{rank:04d}.log").read_text()


def test_sigterm_ends_the_attempts_too(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    watch = supervisor(run, "wait", tmp_path, ranks=1, max_attempts=3)
    watch.stop(signal.SIGTERM)
    assert watch.work(1) == 75
    assert run.last().attempt == 1


def test_a_cancelled_run_is_not_taken_up_again(new_run: MakeRun, tmp_path: Path) -> None:
    run = new_run()
    watch = supervisor(run, "wait", tmp_path, ranks=1, max_attempts=3)
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
        fixed = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "3"}
        assert fixed.items() <= one.items()
        assert one["DS_ACCELERATOR"] == "cpu"
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]
    assert int(seen[0]["MASTER_PORT"]) > 0
    assert os.environ.get("RANK") is None
