"""What ends an attempt before its time: signals, limits, a store in trouble, bad losses, a rank that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from core import commits
from core.folder import FileStore
from core.storage import Store, StoreError, open_store
from core.watchdog import HUNG
from tests.faults import FaultyProxy, cut_body, lose_answer, lose_request, refusal
from tests.ranks import Ranks, run_ranks
from tests.system.attempts import Attempt, losses, metrics, prepared, recipe_of, run

pytestmark = pytest.mark.system
WHOLE = "whole"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the toy data and an uninterrupted run of ten steps."""
    root = prepared(f"file://{tmp_path_factory.mktemp('ends')}", "toy")
    run_ranks(run, 2, Attempt(toy("/nowhere"), root, WHOLE))
    return root


def toy(spool: object, *overrides: str) -> Any:
    return recipe_of("toy", 1, 10, f"checkpoint.spool={spool}", "loader.workers=0", *overrides)


def claims(root: str, name: str) -> list[commits.Claim]:
    return commits.claims(open_store(f"{root}/runs/{name}"))


def ends(ranks: list[Any]) -> set[str]:
    return {end for end, _, _ in ranks}


def goes_on_as_if_nothing_had_been(root: str, name: str, recipe: Any, number: int = 2) -> None:
    assert ends(run_ranks(run, 2, Attempt(recipe, root, name, number))) == {"FINISHED"}
    assert metrics(root, name) == metrics(root, WHOLE)


# ---- signals and limits


def signalled(attempt: Attempt, signals: dict[int, list[signal.Signals]]) -> Any:
    """A rank with the worker's handlers that sends itself signals at its fourth step, by rank."""
    from core.stage import Stage
    from jobs.worker import Stop

    stop, backward = Stop(), Stage.backward
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, stop.on_signal)

    def at_the_fourth(stage: Stage, step: int, micros: Any) -> Any:
        for signum in signals.get(int(os.environ["RANK"]), []) if step == 3 else ():
            os.kill(os.getpid(), signum)
        return backward(stage, step, micros)

    Stage.backward = at_the_fourth  # type: ignore[method-assign]
    from core.train import train

    rows: list[dict[str, Any]] = []
    store = open_store(f"{attempt.root}/runs/{attempt.name}")
    outcome = train(attempt.recipe, store, attempt.root, attempt.number, rows.append, stop)
    Stage.backward = backward  # type: ignore[method-assign]
    return outcome.name, rows, None


TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


@pytest.mark.parametrize("sent", [{0: [TERM]}, {1: [USR1]}, {1: [USR2, USR2, TERM]}, {0: [USR2], 1: [TERM]}], ids=str)
def test_a_signal_to_any_rank_saves_at_the_same_step_on_all_and_a_second_one_changes_nothing(
    sent: dict[int, list[signal.Signals]], root: str, tmp_path: Path
) -> None:
    name, recipe = f"signal-{len(str(sent))}-{min(sent)}-{sum(map(len, sent.values()))}", toy(tmp_path)
    ranks = run_ranks(signalled, 2, Attempt(recipe, root, name), sent)
    assert ends(ranks) == {"PREEMPTED"}
    assert ranks[0][1][-1]["step"] == 5, "the wish of step 4 is known one step later"
    store = open_store(f"{root}/runs/{name}")
    assert next(commits.checkpoints(store)).position.step == 5
    goes_on_as_if_nothing_had_been(root, name, recipe)
    assert [(c.step, c.lost) for c in claims(root, name)] == [(0, 0), (5, 0)]


def slow_steps(attempt: Attempt) -> Any:
    from core.stage import Stage

    backward = Stage.backward

    def slow(stage: Stage, step: int, micros: Any) -> Any:
        time.sleep(0.3)
        return backward(stage, step, micros)

    Stage.backward = slow  # type: ignore[method-assign]
    try:
        return run(attempt)
    finally:
        Stage.backward = backward  # type: ignore[method-assign]


def test_an_attempt_leaves_at_the_recipe_s_wall_clock_limit(root: str, tmp_path: Path) -> None:
    limited = toy(tmp_path, "launch.time_limit_min=0.01")  # 0.6 s
    ranks = run_ranks(slow_steps, 2, Attempt(limited, root, "limit"))
    assert ends(ranks) == {"TIME_LIMIT"}
    assert 2 <= ranks[0][1][-1]["step"] <= 5
    goes_on_as_if_nothing_had_been(root, "limit", toy(tmp_path))


# ---- a store that is too slow, or away


class Slow(FileStore):
    """Takes no part of a checkpoint behind the first one while the file `slow` lies beside the run."""

    def put_file(self, key: str, path: Path) -> None:
        while key.startswith("checkpoints/") and not key.startswith("checkpoints/00000002-"):
            time.sleep(0.05)
        super().put_file(key, path)


class Away(FileStore):
    """Refuses everything once the first checkpoint is committed."""

    def _fail(self) -> None:
        if commits.numbers(FileStore(self.root))[1:]:
            raise StoreError("planted: no answer")

    def put(self, key: str, data: bytes) -> None:
        self._fail()
        super().put(key, data)

    def put_file(self, key: str, path: Path) -> None:
        self._fail()
        super().put_file(key, path)


def slow(store: Store) -> Store:
    assert isinstance(store, FileStore)
    return Slow(store.root)


def away(store: Store) -> Store:
    assert isinstance(store, FileStore)
    return Away(store.root)


@pytest.mark.parametrize("same_node", [True, False])
def test_a_grace_that_a_slow_store_outlasts_leaves_a_local_copy_for_the_next_attempt(
    same_node: bool, root: str, tmp_path: Path
) -> None:
    name, recipe = f"grace-{same_node}", toy(tmp_path / "node", "launch.grace_s=1")
    began = time.monotonic()
    ranks = run_ranks(run, 2, Attempt(recipe, root, name, stop_at=5, store=slow))
    assert ends(ranks) == {"PREEMPTED"}
    assert time.monotonic() - began < 60
    store = open_store(f"{root}/runs/{name}")
    assert next(commits.checkpoints(store)).position.step == 2, "the store took no more"
    kept = {path.name for path in (tmp_path / "node").rglob("rank-*")}
    assert kept == {f"rank-000{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")}
    goes_on_as_if_nothing_had_been(root, name, recipe if same_node else toy(tmp_path / "another"))
    second = claims(root, name)[-1]
    assert second.step == (6 if same_node else 2)
    if not same_node:
        assert second.lost == 2, "the log had reached step 4; what was not flushed is not known"


def test_a_store_away_for_longer_than_the_spool_ends_in_a_save_on_the_node_and_nothing_is_lost(
    root: str, tmp_path: Path
) -> None:
    patient = toy(tmp_path / "node", "checkpoint.pending=2", "checkpoint.patience_s=0.5")
    ranks = run_ranks(slow_steps, 2, Attempt(patient, root, "away", store=away))
    assert ends(ranks) == {"OUTAGE"}
    reached = ranks[0][1][-1]["step"]
    assert 4 <= reached < 10, "training went on while the store was away"
    goes_on_as_if_nothing_had_been(root, "away", toy(tmp_path / "node"))
    second = claims(root, "away")[-1]
    assert (second.step, second.lost) == (reached, 0)


def test_a_full_disk_leads_to_uploads_from_memory_and_is_told(root: str, tmp_path: Path) -> None:
    small = tmp_path / "disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        (small := tmp_path / "no-folder").write_text("stands where the spool's folder should be")
    try:
        ranks = run_ranks(run, 2, Attempt(toy(small), root, "full"))
    finally:
        subprocess.run(["umount", str(small)], capture_output=True, check=False)
    assert ends(ranks) == {"FINISHED"}
    assert metrics(root, "full") == metrics(root, WHOLE)


# ---- bad networks and busy servers


@pytest.fixture
def bucket_root(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> str:
    """The toy data in a bucket behind the proxy."""
    source = open_store(prepared(f"file://{tmp_path}/data", "toy"))
    for entry in source.list():
        open_store(bucket).put(entry.key, source.get(entry.key))
    return bucket


def test_a_run_rides_out_bursts_of_errors_and_broken_connections(
    bucket_root: str, proxy: FaultyProxy, root: str, tmp_path: Path
) -> None:
    """Busy answers, lost requests and answers, bodies cut and damaged, objects that are not there yet: nothing is lost
    or doubled, and what is tried again is tried a bounded number of times."""
    for fault, method, times, after, having in (
        (refusal(503, "SlowDown"), "PUT", 6, 2, "/checkpoints/"),
        (refusal(429, "TooManyRequests"), "PUT", 3, 0, "/commits/"),
        (refusal(503, "SlowDown"), "GET", 4, 3, "list-type=2"),
        (lose_request, "PUT", 2, 12, "/checkpoints/"),
        (lose_answer, "PUT", 1, 4, "/commits/"),
        (lose_answer, "PUT", 2, 16, "/checkpoints/"),
        (cut_body, "GET", 3, 2, "/checkpoints/"),
        (refusal(404, "NoSuchKey"), "GET", 1, 4, "rank-0000.json"),
    ):
        proxy.plan(fault, method, times, after, having)
    recipe = toy(tmp_path / "node", f"loader.cache_dir={tmp_path}/cache")
    ranks = run_ranks(run, 2, Attempt(recipe, bucket_root, "faults", stop_at=6), timeout_s=240)
    assert ends(ranks) == {"PREEMPTED"}
    assert ends(run_ranks(run, 2, Attempt(recipe, bucket_root, "faults", 2), timeout_s=240)) == {"FINISHED"}
    assert metrics(bucket_root, "faults") == metrics(root, WHOLE)
    assert claims(bucket_root, "faults")[-1].lost == 0
    assert len(proxy.seen) < 900


# ---- bad training


def poisoned(attempt: Attempt, sample: int, factor: float) -> Any:
    """The loss of a micro-batch that holds this sample is spoilt."""
    from core.guard import BadLossError
    from core.stage import Stage

    loss = Stage.loss

    def spoilt(stage: Stage, batch: Any) -> Any:
        value, report = loss(stage, batch)
        return (value * factor if sample in batch.index.tolist() else value), report

    Stage.loss = spoilt  # type: ignore[method-assign]
    try:
        return run(attempt)
    except BadLossError as error:
        return str(error), [], None
    finally:
        Stage.loss = loss  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def victim(root: str) -> int:
    """A sample that comes in the last micro-batch of step 5 and never else in ten steps."""
    seen = run_ranks(run, 1, Attempt(toy("/nowhere"), root, "look", watch=True))[0][2]
    times: dict[int, list[int]] = {}
    for (step, micro), (samples, _) in seen.items():
        for sample in samples if micro == 3 else ():
            times.setdefault(sample, []).append(step)
    everywhere = [s for (_, _), (samples, _) in seen.items() for s in samples]
    return next(s for s, steps in times.items() if steps == [5] and everywhere.count(s) == 1)


@pytest.mark.parametrize("factor", [float("nan"), 1e6])
def test_a_bad_loss_stops_the_run_or_rewinds_it_past_the_samples(
    factor: float, victim: int, root: str, tmp_path: Path
) -> None:
    kind = "nan" if factor != factor else "explodes"
    strict = ("train.max_bad_losses=1", "train.explode=20")
    said = run_ranks(poisoned, 2, Attempt(toy(tmp_path, *strict), root, f"stop-{kind}"), victim, factor)[0][0]
    assert said.startswith("step 5: ")
    store = open_store(f"{root}/runs/stop-{kind}")
    assert next(commits.checkpoints(store)).position.step == 4, "the last good one"
    told = [json.loads(store.get(e.key)) for e in store.list("bad-loss/")]
    assert any(victim in samples for rank in told for samples in rank.values())

    again = toy(tmp_path, *strict, "train.rewinds=1")
    ranks = run_ranks(poisoned, 2, Attempt(again, root, f"rewind-{kind}"), victim, factor)
    assert ends(ranks) == {"FINISHED"}
    first, second = claims(root, f"rewind-{kind}")
    assert (second.rewound, second.step, second.attempt) == (True, 4, first.attempt)
    assert second.skipped == ((4, 5),)
    steps = [step for _, step in losses(root, f"rewind-{kind}")]
    assert steps == [1, 2, 3, 4, 6, 7, 8, 9, 10]


# ---- a rank that hangs


def hanging(attempt: Attempt) -> Any:
    """Rank 1 makes no step behind the third."""
    from core.stage import Stage

    backward = Stage.backward

    def stuck(stage: Stage, step: int, micros: Any) -> Any:
        while step == 3 and os.environ["RANK"] == "1":
            time.sleep(1)
        return backward(stage, step, micros)

    Stage.backward = stuck  # type: ignore[method-assign]
    return run(attempt)


def test_a_rank_that_makes_no_steps_is_found_and_all_say_where_they_stand(root: str, tmp_path: Path) -> None:
    ranks = Ranks(hanging, 2, Attempt(toy(tmp_path, "launch.hang_s=8"), root, "hangs"))
    for process in ranks.processes:
        process.join(120)
    assert [process.exitcode for process in ranks.processes] == [HUNG, HUNG]
    store = open_store(f"{root}/runs/hangs")
    traces = {e.key: store.get(e.key).decode() for e in store.list("hangs/")}
    assert sorted(traces) == [f"hangs/attempt-0001-rank-000{rank}.txt" for rank in range(2)]
    assert "in stuck" in traces["hangs/attempt-0001-rank-0001.txt"]
    goes_on_as_if_nothing_had_been(root, "hangs", toy(tmp_path))
