from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core import commits, stage
from core.comm import Comm
from core.folder import FileStore
from core.metrics import read_metrics
from core.recipe import Recipe
from core.spool import Spool
from core.storage import StoreError, open_store
from core.train import BadLossError, Outcome, train
from tests import toy
from tests.core.logs import Troubled, claim, log, on_course
from tests.ranks import run_ranks

SOON_S = 30.0
Losses = dict[int, float]


def until(happened: Callable[[], object]) -> None:
    limit = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.005)


def attempt(
    wanted: Recipe, run: FileStore, root: str, number: int = 1, before: Callable[[int], object] = lambda step: False
) -> tuple[Outcome, Losses]:
    """One attempt on this rank; `before` is called after each step with its number, and may wish to stop."""
    losses: Losses = {}
    asked = iter(range(1, 1000))
    outcome = train(
        wanted, run, root, number, lambda row: losses.update({row["step"]: row["loss"]} if "loss" in row else {}),
        lambda: bool(before(next(asked))),
    )  # fmt: skip
    return outcome, losses


def saved(run: FileStore) -> list[int]:
    return [m.position.step for m in commits.checkpoints(run)]


def folder_of(root: str, name: str) -> Path:
    return Path(root[7:]) / "runs" / name


# ---- why an attempt ends


def ended(root: str, spool: str) -> dict[str, Any]:
    """Attempts that end in different ways on this rank: (outcome, losses) of each, by name."""
    comm = Comm(torch.device("cpu"))

    def recipe(**checkpoint: Any) -> Recipe:
        return toy.recipe(checkpoint={"spool": spool, **checkpoint})

    def run(name: str) -> FileStore:
        return FileStore(folder_of(root, name))

    def out_of_reach(name: str) -> tuple[FileStore, Callable[[int], object]]:
        """A run whose store takes nothing after the start of the attempt; waits in step 3 for that to be known."""
        seen = list[str]()

        def refuse(verb: str, key: str, done: bool) -> None:
            if not key.startswith("commits/000001"):
                seen.append(key)
                raise StoreError(f"{key}: no connection")

        def wait(step: int) -> None:
            if step == 3:
                until(lambda: seen)
                time.sleep(0.1)

        return Troubled(folder_of(root, name), refuse), wait

    def overtake(step: int) -> None:
        if step == 3 and comm.rank == 0:
            until(lambda: on_course(run("overtaken")))
            log(run("overtaken"), claim(2, resumed=2))

    found: dict[str, Any] = {"whole": attempt(recipe(), run("whole"), root)}
    late = toy.recipe(launch={"time_limit_min": 1e-9}, checkpoint={"spool": spool})
    found["late"] = attempt(late, run("late"), root)
    store, wait = out_of_reach("outage")
    hasty = recipe(pending=1, patience_s=0.0)
    hasty.launch.grace_s = 0.3
    found["outage"] = attempt(hasty, store, root, 1, wait)
    store, wait = out_of_reach("asked in an outage")
    hasty.checkpoint.pending = 4
    began = time.monotonic()
    found["asked in an outage"] = attempt(hasty, store, root, 1, lambda step: (wait(step), step >= 3)[1])
    found["took_s"] = time.monotonic() - began
    comm.barrier()
    found["waiting"] = {n: Spool(spool, run(n)).keys() for n in ("outage", "asked in an outage")}
    comm.barrier()
    for name in ("late", "outage", "asked in an outage"):
        found[f"{name}, again"] = attempt(recipe(), run(name), root, 2)
    found["overtaken"] = attempt(recipe(), run("overtaken"), root, 1, overtake)
    found["too old"] = attempt(recipe(), run("overtaken"), root, 1)
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = toy.store(tmp_path_factory.mktemp("ends"))
    first, second = run_ranks(ended, 2, root, str(tmp_path_factory.mktemp("spool")))
    for name, got in first.items():
        if isinstance(got, tuple):
            assert got[0] is second[name][0], f"{name}: ranks must agree"
    return {"root": root, **first}


def test_an_attempt_whose_time_is_over_saves_leaves_and_is_gone_on_from(ends: dict[str, Any]) -> None:
    (outcome, before), (end, after) = ends["late"], ends["late, again"]
    assert (outcome, end) == (Outcome.TIME_LIMIT, Outcome.FINISHED)
    assert (list(before), list(after)) == ([1, 2], [3, 4, 5, 6])
    assert before | after == ends["whole"][1]


@pytest.mark.parametrize(("name", "outcome"), [("outage", Outcome.OUTAGE), ("asked in an outage", Outcome.PREEMPTED)])
def test_what_the_store_did_not_take_waits_on_the_disk_and_loses_no_step(
    ends: dict[str, Any], name: str, outcome: Outcome
) -> None:
    (how, before), (end, after) = ends[name], ends[f"{name}, again"]
    assert (how, end) == (outcome, Outcome.FINISHED)
    assert (list(before), list(after)) == ([1, 2, 3, 4], [5, 6])
    assert before | after == ends["whole"][1]
    assert [key for key in ends["waiting"][name] if "00000004" in key and key.endswith(".json")] == [
        f"checkpoints/00000004-000001/rank-000{rank}.json" for rank in range(2)
    ]
    run = FileStore(folder_of(ends["root"], name))
    assert [(c.attempt, c.step, c.lost) for c in commits.claims(run)] == [(1, 0, 0), (2, 4, 0)]
    assert [row["step"] for row in read_metrics(run)] == list(range(7))


def test_an_attempt_that_is_asked_to_leave_in_an_outage_does_not_wait_for_its_end(ends: dict[str, Any]) -> None:
    assert ends["took_s"] < 15


def test_an_overtaken_attempt_leaves_without_another_checkpoint(ends: dict[str, Any]) -> None:
    assert ends["overtaken"][0] is Outcome.SUPERSEDED
    run = FileStore(folder_of(ends["root"], "overtaken"))
    assert saved(run) == [2]
    assert [c.attempt for c in commits.claims(run)] == [1, 2]


def test_an_attempt_older_than_the_last_does_not_start(ends: dict[str, Any]) -> None:
    assert ends["too old"] == (Outcome.SUPERSEDED, {})


# ---- what is passed over while the store is slow


def busy(root: str, spool: str) -> tuple[Outcome, list[int], list[int]]:
    wanted = toy.recipe(checkpoint={"spool": spool, "pending": 1, "every_steps": 1}, log={"flush_s": 1000.0})
    gate = []

    def slow(verb: str, key: str, done: bool) -> None:
        if not key.startswith("commits/000001"):
            until(lambda: gate)

    run = Troubled(folder_of(root, "busy"), slow)

    def before(step: int) -> None:
        if step == 3:
            gate.append(True)
            until(lambda: not Spool(spool, run).folder.exists())
            time.sleep(0.1)

    outcome, losses = attempt(wanted, run, root, 1, before)
    return outcome, list(losses), saved(run)


def test_checkpoints_too_many_are_passed_over_and_training_goes_on(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    outcome, steps, kept = run_ranks(busy, 1, root, str(tmp_path / "spool"))[0]
    assert (outcome, steps) == (Outcome.FINISHED, [1, 2, 3, 4, 5, 6])
    assert (kept[0], kept[-2:]) == (6, [4, 1]), "and the last one never is"
    assert [row["step"] for row in read_metrics(open_store(f"{root}/runs/busy"))] == list(range(7))


# ---- going back


def with_bad_steps(root: str, spool: str, rewinds: list[int]) -> list[Any]:
    """Attempts in which the second rank's loss is no number in steps 3 to 5, by `train.rewinds`."""
    sound, rank = stage.Stage.backward, Comm(torch.device("cpu")).rank

    def backward(self: stage.Stage, step: int, micros: Any) -> Iterator[Any]:
        for loss, report in sound(self, step, micros):
            yield (loss * torch.nan if rank == 1 and step + 1 in (3, 4, 5) else loss), report

    stage.Stage.backward = backward  # type: ignore[method-assign, assignment]
    found: list[Any] = []
    for number in rewinds:
        wanted = toy.recipe(train={"rewinds": number}, checkpoint={"spool": spool, "every_steps": 1})
        try:
            found.append(attempt(wanted, FileStore(folder_of(root, f"rewinds {number}")), root))
        except BadLossError as error:
            found.append(str(error))
    return found


def test_a_run_goes_back_to_its_last_good_checkpoint_and_leaves_bad_samples_out(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    (once, never), (_, same) = run_ranks(with_bad_steps, 2, root, str(tmp_path / "spool"), [1, 0])
    assert never == same
    assert never.startswith("step 3: ")
    outcome, losses = once
    assert outcome is Outcome.FINISHED
    run = FileStore(folder_of(root, "rewinds 1"))
    first, second = commits.claims(run)
    assert (first.attempt, first.rewound, first.skipped) == (1, False, ())
    assert (second.attempt, second.rewound, second.skipped, second.step, second.lost) == (1, True, ((2, 5),), 2, 3)
    assert saved(run) == [6, 2, 1]
    assert [m.skipped for m in commits.checkpoints(run)] == [[(2, 5)], [], []]
    assert [row["step"] for row in read_metrics(run)] == [0, 1, 2, 6]
    assert len(list(run.list("bad-loss/000001/"))) == 2
    assert losses[6] == losses[6]
