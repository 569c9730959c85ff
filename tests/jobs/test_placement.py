"""Ranks, device and threads of a run."""

from __future__ import annotations

import os

import pytest

from core.recipe import Launch, Recipe, Train
from jobs.errors import UserError
from jobs.placement import Placement, allowed_ranks, filled, gathered, place, spread

Stages = dict[str, dict[str, int]]


def recipe(batch: int = 64, micro_batch: int = 8, stages: Stages | None = None, **launch: object) -> Recipe:
    settings = Launch(**launch)  # type: ignore[arg-type]
    return Recipe(train=Train(batch=batch, micro_batch=micro_batch), stages=stages or {}, launch=settings)


def test_ranks_share_the_micro_batches_of_every_stage() -> None:
    assert allowed_ranks(recipe(64, 8)) == [1, 2, 4, 8]
    assert allowed_ranks(recipe(64, 8, {"a": {}, "b": {"batch": 96}})) == [1, 2, 4]


def test_a_number_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match="3 ranks .* allowed: 1, 2, 4, 8"):
        place(recipe(ranks=3), gpus=0)
    assert place(recipe(ranks=4), gpus=0).ranks == 4


@pytest.mark.parametrize(
    ("batch", "asked", "gpus", "proposed"), [(16, 4, 0, 2), (16, 4, 2, 2), (64, 16, 0, 2), (64, 16, 4, 4), (8, 4, 0, 1)]
)
def test_what_to_type_is_said_with_what_is_allowed(
    batch: int, asked: int, gpus: int, proposed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with pytest.raises(UserError, match=rf'allowed: 1.*: SET="launch\.ranks={proposed}" '):
        place(recipe(batch, ranks=asked), gpus)


def test_what_to_type_fits_the_nodes() -> None:
    with pytest.raises(UserError, match=r'allowed: 1, 2, 3, 4, 12: SET="launch\.ranks=4" '):
        spread(recipe(ranks=8, batch=96, micro_batch=8), 4, gpus=4, cpus=1)
    with pytest.raises(UserError, match=r'SET="launch\.ranks=2" '):
        gathered(recipe(ranks=3), [{"CPU": 2}], 1)


@pytest.mark.parametrize(("gpus", "micro_batch", "ranks"), [(0, 8, 2), (0, 64, 1), (8, 8, 8), (6, 8, 4), (3, 64, 1)])
def test_without_a_number_as_many_as_there_are_and_fit(gpus: int, micro_batch: int, ranks: int) -> None:
    assert place(recipe(64, micro_batch), gpus).ranks == ranks


def test_the_device_is_what_is_there_unless_it_is_named() -> None:
    assert place(recipe(), gpus=0).device == "cpu"
    assert place(recipe(), gpus=1).device == "cuda"
    assert place(recipe(device="cpu"), gpus=1).device == "cpu"


def test_threads_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert place(recipe(ranks=1), gpus=0).threads == cores
    assert place(recipe(ranks=8), gpus=0).threads == max(1, cores // 8)
    assert place(recipe(threads=3), gpus=0).threads == 3


@pytest.mark.parametrize(
    ("ranks", "per_node", "nodes"), [(0, 4, 1), (1, 4, 1), (2, 4, 1), (4, 4, 1), (8, 4, 2), (2, 1, 2), (0, 1, 1)]
)
def test_nodes_are_full_but_for_a_single_one(ranks: int, per_node: int, nodes: int) -> None:
    found = spread(recipe(ranks=ranks), per_node, gpus=per_node, cpus=6)
    assert found == Placement(ranks or per_node, "cuda", 6, nodes)


def test_a_number_that_leaves_a_node_half_empty_is_refused_with_those_that_fit() -> None:
    with pytest.raises(UserError, match="4 ranks on nodes of 3 .* allowed: 1, 2"):
        spread(recipe(ranks=4), 3, gpus=3, cpus=1)


GPUS = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "launch", "cpus", "ranks", "over"),
    [(GPUS, {}, 2, 4, 1), (GPUS, {"ranks": 2}, 2, 2, 1), (GPUS, {"ranks": 8}, 2, 8, 3),
     ([{"CPU": 1.0}] * 3, {}, 1, 2, 2), ([{"CPU": 8.0}] * 2, {"ranks": 4}, 2, 4, 1), ([{"CPU": 1.0}], {}, 2, 1, 1)],
)  # fmt: skip
def test_ranks_fill_the_largest_nodes_that_there_are(
    nodes: list[dict[str, float]], launch: dict[str, int], cpus: int, ranks: int, over: int
) -> None:
    found = gathered(recipe(64, 8, **launch), nodes, cpus)
    assert (found.ranks, found.nodes) == (ranks, over)
    assert found.device == ("cuda" if nodes is GPUS else "cpu")


@pytest.mark.parametrize(("count", "room", "nodes"), [(1, 1, 1), (2, 2, 1), (5, 6, 3), (8, 8, 4)])
def test_workers_get_room_on_as_few_nodes_as_hold_them(count: int, room: int, nodes: int) -> None:
    assert filled(Placement(1, "cuda", 3), count, per_node=2) == Placement(room, "cuda", 3, nodes)
