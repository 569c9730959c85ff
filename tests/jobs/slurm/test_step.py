"""What a batch script does around the ranks: whose run it is, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config import load, to_yaml
from core.storage import StoreError
from jobs.errors import NotReady
from jobs.launchers import tries
from jobs.launchers.ending import Exit
from jobs.record import Run, State
from jobs.slurm import step
from jobs.slurm.script import CANCELLED
from tests.core.logs import claim, log
from tests.jobs.slurm.conftest import Says

MakeRun = Callable[..., Run]
OWN = {"launcher": "slurm", "job": "7", "slurm": "", "logs": "/logs"}


@pytest.fixture
def run(new_run: MakeRun, says: Says, tiny_recipe: Path) -> Run:
    says("squeue", "")
    return new_run(recipe=to_yaml(load(str(tiny_recipe), dotlist=["launch.max_attempts=2"])))


def to_running(run: Run, job: str = "7") -> None:
    run.move(State.QUEUED, run.last().attempt + 1, **{**OWN, "job": job})
    run.move(State.RUNNING)


def ended(run: Run, tmp_path: Path, said: str = "", code: int = 0, begun: bool = True) -> int:
    path = tmp_path / "said.log"
    path.write_text(said)
    return step.end(run, "7", tmp_path / "logs", path, code, begun)


def moves(run: Run) -> list[tuple[str, int]]:
    return [(str(t.state), t.attempt) for t in run.transitions()]


def test_a_job_takes_the_run_that_was_queued_for_it(run: Run) -> None:
    run.move(State.QUEUED, 1, **OWN)
    assert step.take(run, "7", OWN) == 1
    assert moves(run) == [("created", 0), ("queued", 1)]


def test_a_script_submitted_by_hand_takes_a_run_that_nobody_has(run: Run) -> None:
    assert step.take(run, "9", {**OWN, "job": "9"}) == 1
    assert run.handle(run.last())["job"] == "9"


def test_a_job_that_slurm_starts_again_takes_up_what_was_cut_short(run: Run, says: Says) -> None:
    to_running(run)
    says("sacct", "NODE_FAIL\nRUNNING\n")
    assert step.take(run, "7", OWN) == 2
    cut = run.transitions()[-2]
    assert (cut.state, cut.attempt) == (State.PREEMPTED, 1)
    assert "SLURM ended the job (NODE_FAIL)" in cut.info["reason"]


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.CANCELLED])
def test_there_is_nothing_to_do_for_a_run_that_is_over(run: Run, state: State) -> None:
    to_running(run)
    run.move(state)
    assert step.take(run, "7", OWN) is None
    assert run.last().state == state


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.PREEMPTED])
def test_a_run_of_another_job_that_lives_is_left_alone(run: Run, says: Says, state: State) -> None:
    run.move(State.QUEUED, 1, **OWN)
    for later in {State.QUEUED: [], State.RUNNING: [state], State.PREEMPTED: [State.RUNNING, state]}[state]:
        run.move(later)
    says("squeue", "RUNNING|None|n1|1:00\n")
    assert step.take(run, "9", {**OWN, "job": "9"}) is None
    assert run.last().state == state


def test_a_run_whose_job_has_gone_is_taken_over(run: Run, says: Says) -> None:
    to_running(run)
    says("sacct", "TIMEOUT|0:0\n")
    assert step.take(run, "9", {**OWN, "job": "9"}) == 2
    assert "lost: SLURM job 7 is TIMEOUT" in run.transitions()[-2].info["reason"]


def test_a_cancelled_run_is_taken_up_when_it_is_submitted_again(run: Run) -> None:
    to_running(run)
    run.move(State.CANCELLED)
    assert step.take(run, "9", {**OWN, "job": "9"}) == 2


def test_ranks_that_saved_are_started_again(run: Run, tmp_path: Path) -> None:
    to_running(run)
    run.move(State.PREEMPTED, reason="asked to stop")
    assert ended(run, tmp_path, "srun: error: n1: task 0: Exited with exit code 75\n", 75) == 75
    assert moves(run)[-2:] == [("preempted", 1), ("queued", 2)]
    assert run.handle(run.last())["job"] == "7"


def test_ranks_that_a_signal_ends_before_they_can_hear_it_are_no_failure(run: Run, tmp_path: Path) -> None:
    to_running(run)
    assert ended(run, tmp_path, "srun: error: n2: task 1: User defined signal 2\n", 140) == 75
    assert run.transitions()[-2].info["reason"] == "asked to stop"


def test_a_killed_rank_explains_the_others_and_the_job_starts_again(run: Run, tmp_path: Path) -> None:
    to_running(run)
    folder = tmp_path / "logs" / "attempt-0001"
    folder.mkdir(parents=True)
    (folder / "rank-0001.log").write_text("last words\n")
    said = "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 1: Killed\n"
    assert ended(run, tmp_path, said, 137) == 75
    failed = run.transitions()[-2]
    assert (failed.state, failed.info["rank"]) == (State.FAILED, 1)
    told = failed.info["reason"].splitlines()
    assert told[:2] == ["rank 1: killed by SIGKILL (out of memory?)", "last words"]
    assert re.match("-> if `dmesg` on its node says so: lower train.micro_batch, .*mem_gb", told[2])
    assert len(told) == 3
    assert run.store.get("logs/attempt-0001/rank-0001.log") == b"last words\n"


def test_failures_are_tried_again_as_often_as_the_recipe_says(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        run.move(State.RUNNING) if run.last().state == State.QUEUED else to_running(run)
        last = ended(run, tmp_path, "srun: error: n1: task 0: Exited with exit code 70\n", 70)
    assert last == 1
    assert moves(run)[-1] == ("failed", 2)


def test_preemptions_do_not_use_up_attempts(run: Run, tmp_path: Path) -> None:
    to_running(run)
    for _ in range(5):
        run.move(State.PREEMPTED, reason="asked to stop")
        assert ended(run, tmp_path, code=75) == 75
        run.move(State.RUNNING)
    assert run.last().attempt == 6


def test_no_attempt_is_begun_after_the_deadline(
    run: Run, tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_recipe(to_yaml(load(str(tiny_recipe), dotlist=["launch.deadline_h=1"])))
    to_running(run)
    run.move(State.PREEMPTED, reason="asked to stop")
    later = run.last().time + 3700
    monkeypatch.setattr(tries.time, "time", lambda: later)
    assert ended(run, tmp_path, code=75) == 1


def test_wrong_input_is_not_tried_again(run: Run, tmp_path: Path) -> None:
    to_running(run)
    assert ended(run, tmp_path, "srun: error: n1: tasks 0-1: Exited with exit code 2\n", 2) == 1
    assert moves(run)[-1] == ("failed", 1)


def test_ranks_that_could_not_be_started_are_told_in_slurm_s_words(run: Run, tmp_path: Path) -> None:
    to_running(run)
    said = "srun: error: Unable to create step for job 7: More processors requested than permitted\n"
    assert ended(run, tmp_path, said, 1) == 75
    assert "More processors requested than permitted" in run.transitions()[-2].info["reason"]


def test_a_finished_run_ends_the_job_whatever_a_rank_does_at_exit(run: Run, tmp_path: Path) -> None:
    to_running(run)
    run.move(State.SUCCEEDED)
    assert ended(run, tmp_path, "srun: error: n1: task 0: Aborted\n", 134) == 0
    assert run.last().state == State.SUCCEEDED


def test_a_cancelled_run_ends_the_job_as_cancelled(run: Run, tmp_path: Path) -> None:
    to_running(run)
    run.move(State.CANCELLED)
    assert ended(run, tmp_path, code=75) == CANCELLED


def test_a_run_that_has_gone_to_another_job_is_left_alone(run: Run, tmp_path: Path) -> None:
    to_running(run, job="9")
    assert ended(run, tmp_path, "srun: error: n1: task 0: Exited with exit code 1\n", 1) == CANCELLED, (
        "or an evaluation that waits for this job would begin"
    )
    assert run.last().state == State.RUNNING
    run.move(State.SUCCEEDED)
    assert ended(run, tmp_path) == 0


def test_a_store_that_is_away_at_the_end_lets_slurm_start_the_job_again_but_not_for_ever(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise StoreError("no answer")

    to_running(run)
    with monkeypatch.context() as patch:
        patch.setattr(run, "last", away)
        patch.setenv("SLURM_RESTART_COUNT", "3")
        assert ended(run, tmp_path, code=75) == 75
        patch.setenv("SLURM_RESTART_COUNT", str(step.MOST_BLIND))
        assert ended(run, tmp_path, code=75) == 3


def test_a_node_without_the_run_says_that_the_folder_is_not_shared(root: str) -> None:
    with pytest.raises(NotReady, match="^node n1: there is no run demo-1 in file://.*one that the nodes share"):
        tries.check(Run(root, "demo-1"), "node n1")


def test_nodes_that_are_not_ready_are_told_in_their_own_words(run: Run, tmp_path: Path) -> None:
    run.move(State.QUEUED, 1, **OWN)
    said = "error: node n2: Python packages: timm\n  -> make setup\nsrun: error: n2: task 1: Exited with exit code 3\n"
    assert ended(run, tmp_path, said, 3, begun=False) == 75
    failed = run.transitions()[-2]
    assert failed.info["reason"].startswith("the ranks could not be started:\nerror: node n2: Python packages: timm")
    assert failed.info["rank"] is None


def test_a_run_cancelled_while_its_end_is_written_down_stays_cancelled(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_running(run)
    run.move(State.PREEMPTED, reason="asked to stop")
    allowed = tries.allowed

    def cancelled_meanwhile(*arguments: Any) -> bool:
        run.move(State.CANCELLED)
        return allowed(*arguments)

    monkeypatch.setattr(tries, "allowed", cancelled_meanwhile)
    assert ended(run, tmp_path, code=75) == CANCELLED
    assert run.last().state == State.CANCELLED


def test_a_run_that_gets_nowhere_is_not_started_for_ever(run: Run, tmp_path: Path) -> None:
    to_running(run)
    for attempt in range(1, tries.STUCK + 1):
        log(run.store, claim(attempt))
    run.move(State.PREEMPTED, reason="asked to stop")
    assert ended(run, tmp_path, code=75) == 1


def test_a_job_that_was_restarted_into_an_outage_is_started_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> Any:
        raise StoreError("no answer")

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with monkeypatch.context() as patch:
        patch.setattr(run, "last", away)
        assert ended(run, tmp_path, code=3, begun=False) == 75


def test_tasks_of_an_array_have_the_names_that_squeue_gives_them() -> None:
    assert step.job_id({"SLURM_JOB_ID": "12"}) == "12"
    assert step.job_id({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"


@pytest.mark.parametrize(
    ("said", "ends"),
    [("srun: error: n1: task 0: Exited with exit code 75\n", [Exit(0, 75)]),
     ("srun: error: n[1-2]: tasks 0,2-3: Killed\n", [Exit(0, -9), Exit(2, -9), Exit(3, -9)]),
     ("srun: error: n1: task 5: Segmentation fault (core dumped)\n", [Exit(5, -11)]),
     ("srun: error: n1: task 1: Terminated\n", [Exit(1, -15)]),
     ("srun: error: n1: task 1: Out Of Memory\n", [Exit(1, -9)]),
     ("srun: error: n2: task 1: Exited with exit code 2\nsrun: First task exited 20s ago\n"
      "srun: launch/slurm: _step_signal: Terminating StepId=7.0\nsrun: error: n1: task 0: Killed\n", [Exit(1, 2)]),
     ("srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\nsrun: forcing job termination\n"
      "srun: error: n2: task 1: Exited with exit code 75\n", [Exit(1, 75)]),
     ("srun: Job step aborted: Waiting up to 32 seconds\nslurmstepd: error: *** STEP 1.0 ON n1 CANCELLED\n", [])],
)  # fmt: skip
def test_srun_s_messages_are_read(said: str, ends: list[Exit]) -> None:
    assert step.exits(said) == ends
