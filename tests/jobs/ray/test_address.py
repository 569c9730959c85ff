"""A Ray cluster by its address: one that does not answer. How runs fare on one that does: tests/system/test_ray.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from core.recipe import Loader, Recipe
from jobs import cli, launchers
from jobs.cluster import Cluster
from jobs.errors import NotReady
from jobs.placement import Placement
from jobs.ray import address as address_module
from jobs.ray.address import OnCluster
from jobs.ray.command import tagged
from jobs.record import Run, State

MakeRun = Callable[..., Run]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of something that takes connections and says nothing."""
    monkeypatch.setattr(address_module, "ANSWER_S", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_says_nothing_is_not_waited_for(silent: str) -> None:
    with pytest.raises(NotReady, match=f"no Ray cluster answers at {silent}: .*timed out"):
        OnCluster(silent, Cluster()).client  # noqa: B018 - asked for what it raises


def test_a_job_of_a_cluster_that_says_nothing_is_not_judged(silent: str, new_run: MakeRun) -> None:
    run = new_run()
    look = OnCluster(silent, Cluster()).look(run, {"job": f"{tagged(run.id, run.root)}-1", "at": silent})
    assert look.alive is None
    assert "timed out" in look.text


def test_folders_of_the_recipe_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    cluster = OnCluster("http://head:8265", Cluster(env={"RETORT_CACHE": "/local", "RETORT_SPOOL": "/local"}))
    monkeypatch.setattr(cluster, "_client", SimpleNamespace(submit_job=lambda **job: given.append(job)))
    recipe = Recipe(name="demo", loader=Loader(cache_dir="/nvme"))
    cluster.workers(["-m", "x"], 2, recipe, Placement(1, "cpu", 1))
    variables = given[0]["runtime_env"]["env_vars"]
    assert (variables["RETORT_CACHE"], variables["RETORT_SPOOL"]) == ("/nvme", "/local")


@pytest.fixture
def thief(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[socket.socket]]]:
    """The address of somebody who wants to be asked, and whoever has come."""
    came: list[socket.socket] = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789" * 4)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def wait() -> None:
            with suppress(OSError):
                while True:
                    came.append(server.accept()[0])

        threading.Thread(target=wait, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", came
        server.shutdown(socket.SHUT_RDWR)
    for each in came:
        each.close()


@pytest.mark.parametrize("own", ["", "http://127.0.0.1:9"])
def test_no_token_goes_to_an_address_from_a_record(
    thief: tuple[str, list[socket.socket]], new_run: MakeRun, root: str, own: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    address, came = thief
    monkeypatch.setenv("RAY_ADDRESS", own)
    run = new_run(recipe="name: demo\n")
    run.move(State.QUEUED, 1, launcher="ray", job=f"{tagged(run.id, run.root)}-1", at=address)
    for words in (["status"], ["status", run.id], ["status", run.id, "--json"], ["logs", run.id], ["cancel", run.id]):
        assert cli.main([*words, "--store", root]) == 0
    here = f"RAY_ADDRESS is {own!r}" if own else "RAY_ADDRESS is not set"
    assert f"by its record the run is on the Ray cluster at {address!r}, {here} here: nobody" in capsys.readouterr().out
    assert came == []


FOREIGN = ["demo-other-1", "../../../logs", "{own}-1/../x", "{own}-1?x=", "{own}", "", None, ["x"]]


@pytest.mark.parametrize("job", FOREIGN)
def test_a_job_that_is_not_the_run_s_own_is_neither_asked_about_nor_stopped(
    thief: tuple[str, list[socket.socket]], new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, job: object
) -> None:
    address, came = thief
    monkeypatch.setenv("RAY_ADDRESS", address)
    run = new_run()
    own = tagged(run.id, run.root)
    info = {"launcher": "ray", "at": address, "job": job.format(own=own) if isinstance(job, str) else job}
    launcher = launchers.of(info)
    assert f"none of run {run.id}'s" in launcher.look(run, info).text
    assert not launcher.cancel(run, info)
    assert launcher.logs(run, info, 1) == {}
    assert came == []


def test_a_record_of_this_very_cluster_leads_to_it(
    thief: tuple[str, list[socket.socket]], new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, came = thief
    monkeypatch.setattr(address_module, "ANSWER_S", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", f"{address}/")
    run = new_run()
    info = {"launcher": "ray", "at": address, "job": f"{tagged(run.id, run.root)}-12"}
    assert "timed out" in launchers.of(info).look(run, info).text
    assert came
