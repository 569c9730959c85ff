"""Runs on this machine through the launcher: a supervisor process that outlives the one that submitted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.config import from_yaml, load
from jobs import cli, launchers, process
from jobs.errors import UserError
from jobs.follow import follow
from jobs.launchers import Order
from jobs.launchers.local import Local
from jobs.placement import Placement
from jobs.record import Run, State
from jobs.spec import REPOSITORY
from tests.jobs.conftest import end_supervisor, fake_worker
from tests.kube_server import KubeServer

MakeRun = Callable[..., Run]
LIMIT_S = 30.0
TWO = Placement(2, "cpu", 1)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def submit(run: Run, recipe: Path, deed: str) -> Local:
    launcher = Local(fake_worker(deed), preload=())
    order = Order(run, load(str(recipe)), run.last().attempt + 1, {"commit": "abc"})
    assert launcher.submit([order], TWO) == [True]
    return launcher


def test_a_submitted_run_is_worked_on_by_another_session(new_run: MakeRun, tiny_recipe: Path) -> None:
    run = new_run()
    launcher = submit(run, tiny_recipe, "wait")
    queued = run.handle(run.last())
    assert queued["launcher"] == "local"
    assert (queued["ranks"], queued["commit"]) == (2, "abc")
    assert os.getsid(queued["pid"]) == queued["pid"] != os.getsid(0)
    wait_until(lambda: run.last().state == State.RUNNING)
    assert launcher.look(run, queued).alive is True
    assert launcher.cancel(run, queued)
    wait_until(lambda: not launcher.look(run, queued).alive)
    assert run.last().state == State.PREEMPTED


def test_following_a_run_shows_progress_and_ends_with_it(
    new_run: MakeRun, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    launcher = submit(run, tiny_recipe, "ok")
    assert follow(run, 1, launcher, poll_s=0.05) == 0
    out = capsys.readouterr().out
    assert f"{run.id} succeeded" in out


def test_following_a_failure_gives_its_reason(
    new_run: MakeRun, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    launcher = submit(run, tiny_recipe, "killed")
    assert follow(run, 1, launcher, poll_s=0.05) == 1
    out = capsys.readouterr().out
    assert "killed by SIGKILL" in out
    assert f"make logs RUN={run.id}" in out


def test_the_recipe_of_the_newest_attempt_is_the_one_in_the_record(new_run: MakeRun, tiny_recipe: Path) -> None:
    run = new_run(recipe="name: old\n")
    submit(run, tiny_recipe, "ok")
    assert from_yaml(run.store.get("recipe.yaml").decode()).name == "tiny"


def test_the_loser_of_two_submissions_starts_and_changes_nothing(new_run: MakeRun, tiny_recipe: Path) -> None:
    run = new_run(recipe="name: old\n")
    run.move(State.QUEUED, 1)
    launcher = Local(fake_worker("ok"), preload=())
    assert launcher.submit([Order(run, load(str(tiny_recipe)), 1, {})], TWO) == [False]
    assert run.store.get("recipe.yaml") == b"name: old\n"
    assert Path(f".retort/logs/{run.id}/supervisor.log").read_text() == ""
    assert not Path(f".retort/logs/{run.id}/attempt-0001").exists()
    assert [t.state for t in run.transitions()] == ["created", "queued"]


def test_a_supervisor_killed_with_its_ranks_leaves_a_lost_run_that_can_be_resumed(
    new_run: MakeRun, tiny_recipe: Path
) -> None:
    run = new_run()
    submit(run, tiny_recipe, "wait")
    wait_until(lambda: run.last().state == State.RUNNING)
    end_supervisor(run)
    wait_until(lambda: run.view().shown == "lost")
    run.move(State.PREEMPTED, reason="lost")
    assert follow(run, 2, submit(run, tiny_recipe, "ok"), poll_s=0.05) == 0


def test_cancel_stops_the_ranks_and_says_so(
    new_run: MakeRun, tiny_recipe: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run()
    submit(run, tiny_recipe, "wait")
    wait_until(lambda: run.last().state == State.RUNNING)
    assert cli.main(["cancel", run.id, "--store", root]) == 0
    assert "ended" in capsys.readouterr().out
    assert run.last().state == State.CANCELLED
    assert process.alive(run.handle(run.last())) is False
    assert cli.main(["cancel", run.id, "--store", root]) == 0
    assert "already cancelled" in capsys.readouterr().out


def test_a_run_cancelled_before_its_ranks_are_up_never_runs(new_run: MakeRun, tiny_recipe: Path, root: str) -> None:
    run = new_run()
    launcher = submit(run, tiny_recipe, "wait")
    assert cli.main(["cancel", run.id, "--store", root]) == 0
    assert not launcher.look(run, run.handle(run.last())).alive
    assert run.last().state == State.CANCELLED


def test_a_finished_run_cannot_be_cancelled(new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    for state in (State.QUEUED, State.RUNNING, State.SUCCEEDED):
        run.move(state, 1)
    assert cli.main(["cancel", run.id, "--store", root]) == 2
    assert "already succeeded" in capsys.readouterr().err


def test_a_signal_to_another_process_of_the_same_number_is_not_sent(new_run: MakeRun) -> None:
    info = process.identity(os.getpid())
    assert not Local().cancel(new_run(), {**info, "born": 1})
    assert not process.send({**info, "host": "elsewhere"}, signal.SIGTERM, "pytest")


@pytest.fixture
def bystander(root: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes of this user that look like supervisors, but for what they run."""
    made: list[subprocess.Popen[bytes]] = []

    def start(module: str, run: str, store: str) -> subprocess.Popen[bytes]:
        words = ["--run", run, "--store", store]
        made.append(subprocess.Popen([sys.executable, "-c", "input()", "-m", module, *words], stdin=subprocess.PIPE))
        return made[-1]

    yield start
    for each in made:
        each.kill()
        each.wait()


OURS, NAME = "jobs.launchers.local", "demo-0123456789"


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [("http.server", NAME, "{root}"), (OURS, "demo-other", "{root}"), (OURS, NAME, "file:///elsewhere")],
)
def test_a_record_that_names_somebody_s_process_has_it_neither_signalled_nor_taken_for_the_run(
    new_run: MakeRun, bystander: Callable[..., subprocess.Popen[bytes]], root: str, module: str, name: str, place: str
) -> None:
    victim, run = bystander(module, name, place.format(root=root)), new_run()
    run.move(State.QUEUED, 1, launcher="local", **process.identity(victim.pid))
    assert run.view().shown == "lost"
    assert not Local().cancel(run, run.handle(run.last()))
    assert cli.main(["cancel", run.id, "--store", root]) == 0
    assert cli.main(["cancel", run.id, "--store", root]) == 0
    assert victim.poll() is None


@pytest.mark.parametrize("pid", ["1; rm", "../1", -1, 0, 10**30, None, [1], 1.5])
def test_what_is_no_process_number_is_none(new_run: MakeRun, root: str, pid: object) -> None:
    run = new_run()
    run.move(State.QUEUED, 1, launcher="local", **{**process.identity(os.getpid()), "pid": pid})
    assert not Local().cancel(run, run.handle(run.last()))
    assert cli.main(["status", "--store", root]) == 0
    assert cli.main(["cancel", run.id, "--store", root]) == 0


def test_logs_are_read_in_the_known_folder_only(
    new_run: MakeRun, tmp_path: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "private" / "attempt-0001"
    secret.mkdir(parents=True)
    (secret / "keys.log").write_text("secret\n")
    run = new_run()
    run.move(State.QUEUED, 1, launcher="local", logs=str(secret.parent))
    assert cli.main(["logs", run.id, "--store", root]) == 0
    run.move(State.FAILED)
    run.move(State.QUEUED, 2, launcher="local", logs=f"{Path.cwd()}/.retort/logs/{run.id}/../../../private")
    (tmp_path / "private" / "attempt-0002").mkdir()
    (tmp_path / "private" / "attempt-0002" / "keys.log").write_text("secret\n")
    assert cli.main(["logs", run.id, "--store", root]) == 0
    assert "secret" not in capsys.readouterr().out


def test_a_record_of_no_known_launcher_is_told_and_does_no_harm(
    new_run: MakeRun, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = new_run(recipe="name: demo\n"), new_run("demo-2")
    run.move(State.QUEUED, 1, launcher="../../evil")
    other.move(State.QUEUED, 1, launcher=["x"])
    assert cli.main(["status", "--store", root]) == 0
    assert cli.main(["status", run.id, "--store", root]) == 0
    assert "names a launcher '../../evil', of which there is none" in capsys.readouterr().out
    assert cli.main(["logs", run.id, "--store", root]) == 0
    assert cli.main(["cancel", run.id, "--store", root]) == 0


@pytest.mark.parametrize(("name", "words"), [("lcal", "mean local"), ("auto", "unknown")])
def test_launchers_that_are_not_there_say_so(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        launchers.find(name)


def test_auto_takes_slurm_then_ray_then_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jobs.slurm.queue.answers", lambda: False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert launchers.automatic()[0] == "local"
    with KubeServer(tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        assert launchers.automatic() == ("ray", "there is a Kubernetes context")
        assert not server.seen  # nobody is asked for that
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert launchers.automatic() == ("ray", "RAY_ADDRESS is set")
    monkeypatch.setattr("jobs.slurm.queue.answers", lambda: True)
    assert launchers.automatic()[0] == "slurm"


TIED = """
import sys, time
from core.config import load
from jobs.launchers import Order
from jobs.launchers.local import Local
from jobs.placement import Placement
from jobs.record import Run
root, recipe, *worker = sys.argv[1:]
run = Run(root, "demo-0123456789")
Local(worker, preload=()).submit([Order(run, load(recipe), 1, {})], Placement(2, "cpu", 1))
print("submitted", flush=True)
time.sleep(60)
"""


def test_a_run_whose_store_ends_with_the_command_does_not_outlive_it(
    new_run: MakeRun, root: str, tiny_recipe: Path
) -> None:
    run = new_run()
    env = {**os.environ, "RETORT_TIED": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", TIED, root, str(tiny_recipe), *fake_worker("wait")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"submitted\n"
        wait_until(lambda: run.last().state == State.RUNNING)
        child.kill()
    wait_until(lambda: not process.alive(run.handle(run.last())))
    assert run.last().state == State.PREEMPTED
