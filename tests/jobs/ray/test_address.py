"""A Ray cluster by its address: one that does not answer. How runs fare on one that does: tests/system/test_ray.py."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from core.recipe import Loader, Recipe
from jobs.cluster import Cluster
from jobs.errors import NotReady, UserError
from jobs.launchers.ray import Ray
from jobs.placement import Placement
from jobs.ray import address
from jobs.ray.address import OnCluster


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of something that takes connections and says nothing."""
    monkeypatch.setattr(address, "ANSWER_S", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_says_nothing_is_not_waited_for(silent: str) -> None:
    with pytest.raises(NotReady, match=f"no Ray cluster answers at {silent}: .*timed out"):
        OnCluster(silent, Cluster()).client  # noqa: B018 - asked for what it raises


def test_a_job_of_a_cluster_that_says_nothing_is_not_judged(silent: str) -> None:
    look = OnCluster(silent, Cluster()).look({"job": "demo-1", "at": silent})
    assert look.alive is None
    assert "timed out" in look.text


@pytest.mark.parametrize(
    ("given", "url"),
    [("http://head:8265", "http://head:8265"), ("https://ray.example/", "https://ray.example"),
     ("127.0.0.1:8265", "http://127.0.0.1:8265"), ("head:8266/", "http://head:8266"), ("[::1]:8265", "http://[::1]:8265")],
)  # fmt: skip
def test_the_address_of_a_dashboard_may_lack_its_scheme(given: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    way = Ray()._here()
    assert isinstance(way, OnCluster)
    assert way.address == url


@pytest.mark.parametrize(
    ("given", "meant"),
    [("ray://head:10001", "http://head:8265"), ("ray://[::1]:10001", "http://[::1]:8265"),
     ("head:6379", "http://head:8265"), ("head", "http://head:8265"), ("auto", "http://HOST:8265"),
     ("local", "http://HOST:8265"), ("ssh://head:8265", "http://head:8265"), ("head:no", "http://HOST:8265")],
)  # fmt: skip
def test_another_address_is_refused_at_once_with_the_right_spelling(
    given: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS: .* set RAY_ADDRESS={re.escape(meant)} "):
        Ray()._here()


def test_folders_of_the_recipe_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    cluster = OnCluster("http://head:8265", Cluster(env={"RETORT_CACHE": "/local", "RETORT_SPOOL": "/local"}))
    monkeypatch.setattr(cluster, "_client", SimpleNamespace(submit_job=lambda **job: given.append(job)))
    recipe = Recipe(name="demo", loader=Loader(cache_dir="/nvme"))
    cluster.workers(["-m", "x"], 2, recipe, Placement(1, "cpu", 1))
    variables = given[0]["runtime_env"]["env_vars"]
    assert (variables["RETORT_CACHE"], variables["RETORT_SPOOL"]) == ("/nvme", "/local")
