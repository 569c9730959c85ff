from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from core import commits
from core.checkpoint import Reader, newest
from core.comm import Comm
from core.config import fingerprint, from_yaml, to_yaml
from core.data.loader import train_batches
from core.data.shards import write_shards
from core.data.source import DataError, open_source
from core.data.views import View
from core.export import export, verify
from core.recipe import Recipe
from core.registry import complete
from core.storage import Store, open_store
from core.train import BadLossError, Outcome, train
from tests import toy
from tests.host_syncs import SYNCS, HostSyncs
from tests.ranks import run_ranks

Rows = list[dict[str, Any]]
EXTRA = str(Path(__file__).parent / "methods" / "extra")


def attempt(wanted: Recipe, root: str, name: str, number: int = 1, stop_at: int = 1000, rank: int = -1) -> Any:
    """(outcome or error, rows) of one attempt on this rank; `rank` (-1: all) wishes to stop at call `stop_at`."""
    rows: Rows = []
    asked = iter(range(1, 10000))

    def should_stop() -> bool:
        return next(asked) >= stop_at and rank in (-1, Comm(torch.device("cpu")).rank)

    try:
        return train(wanted, open_store(f"{root}/runs/{name}"), root, number, rows.append, should_stop), rows
    except (BadLossError, DataError) as error:
        return error, rows


def attempts(tries: list[dict[str, Any]], root: str) -> list[Any]:
    """Several, one after the other, in one process group."""
    return [attempt(root=root, **one) for one in tries]


def losses(rows: Rows) -> dict[int, Any]:
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run_of(root: str, name: str) -> Store:
    return open_store(f"{root}/runs/{name}")


def newest_step(root: str, name: str) -> int:
    found = newest(run_of(root, name))
    return found.position.step if found else 0


# ---- the cost of a step


class Origins(HostSyncs):
    """Who makes the host wait: our code, DeepSpeed's, or torch's optimiser."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in SYNCS:
            frame, who = sys._getframe(1), "other"
            while frame is not None and who == "other":
                path = frame.f_code.co_filename
                who = next((name for part, name in ORIGINS.items() if part in path), "other")
                frame = frame.f_back
            self.found.append(who)
        return func(*args, **(kwargs or {}))


ORIGINS = {"/deepspeed/": "deepspeed", "/torch/optim/": "adam", "/core/": "core"}
PRECISIONS = [
    (stage, precision) for stage in range(4) for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")
]


def syncs_per_step(root: str) -> list[list[dict[str, int]]]:
    """By case, what is found in each of the steps 2 to 5 of 6, none of which logs."""
    return [steps_of(number, *case, root) for number, case in enumerate(PRECISIONS)]


def steps_of(number: int, stage: int, precision: str, root: str) -> list[dict[str, int]]:
    quiet = toy.recipe(zero={"stage": stage}, train={"precision": precision}, log={"every_steps": 100},
                   checkpoint={"every_steps": 100})  # fmt: skip
    marks: list[int] = []
    with Origins() as syncs:

        def should_stop() -> bool:  # asked once a step
            marks.append(len(syncs.found))
            return False

        train(quiet, run_of(root, str(number)), root, 1, lambda row: None, should_stop)
    return [dict(Counter(syncs.found[marks[i - 1] : marks[i]])) for i in range(1, 5)]


def test_no_step_that_does_not_log_makes_the_host_wait(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    for rank in run_ranks(syncs_per_step, 2, root):
        for (stage, precision), steps in zip(PRECISIONS, rank, strict=True):
            for step in steps:
                assert step.get("core", 0) == step.get("other", 0) == 0, (stage, precision)
                # Not ours: stage 3 checks its gradient norm; Adam reads its step counters, which lie on the CPU (on a
                # GPU the fused kernel keeps them on the device).
                assert step.get("deepspeed", 0) == (1 if stage == 3 else 0), (stage, precision)
                assert step["adam"] > 0


# ---- how a run ends


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of six steps on two ranks that end in different ways, by name: [(outcome, rows) of each rank]."""
    root = toy.store(tmp_path_factory.mktemp("ends"))
    # Nothing in the first step, then weights times -1e40 and more, which float32 does not hold.
    explode = {"lr": 1e37, "warmup_steps": 6, "weight_decay": 1e4}
    tries: dict[str, dict[str, Any]] = {
        "whole": {"wanted": toy.recipe()},
        "one rank stops": {"wanted": toy.recipe(), "stop_at": 3, "rank": 1},
        "stop at the end": {"wanted": toy.recipe(), "stop_at": 5},
        "seldom logged": {"wanted": toy.recipe(log={"every_steps": 4}, checkpoint={"every_steps": 3})},
        "explodes": {"wanted": toy.recipe(train=explode, checkpoint={"every_steps": 1})},
        "explodes at stage 3": {"wanted": toy.recipe(train=explode, checkpoint={"every_steps": 1}, zero={"stage": 3})},
        "explodes unseen": {
            "wanted": toy.recipe(train=explode, checkpoint={"every_steps": 2}, log={"every_steps": 100})
        },
        "explodes late": {"wanted": toy.recipe(train={**explode, "steps": 3}, checkpoint={"every_steps": 1})},
    }
    ranks = run_ranks(attempts, 2, [{"name": name, **given} for name, given in tries.items()], root)
    return {"root": root, **{name: [rank[i] for rank in ranks] for i, name in enumerate(tries)}}


def test_a_whole_run_tells_every_step_to_the_first_rank_alone(ends: dict[str, Any]) -> None:
    (first, rows), (second, nothing) = ends["whole"]
    assert first is second is Outcome.FINISHED
    assert nothing == []
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[0] == {"stage": "main", "step": 0}
    for row in rows[1:]:
        assert {"loss", "lr", "epoch", "images_per_s", "data_wait", "eta_s", "bad_samples"} <= row.keys()
        assert row["steps"] == 6
        assert None not in row.values()
    assert rows[-1]["eta_s"] == 0
    assert newest_step(ends["root"], "whole") == 6


def test_rows_are_written_when_asked_for_and_with_every_checkpoint(ends: dict[str, Any]) -> None:
    _, rows = ends["seldom logged"][0]
    assert [row["step"] for row in rows] == [0, 1, 3, 4, 6]
    whole = losses(ends["whole"][0][1])
    assert losses(rows)[3] == pytest.approx((whole[2] + whole[3]) / 2, rel=1e-6), "a row is the mean since the last"


def test_one_rank_s_wish_stops_all_ranks_after_the_same_step_with_a_checkpoint(ends: dict[str, Any]) -> None:
    (first, rows), (second, _) = ends["one rank stops"]
    assert first is second is Outcome.PREEMPTED
    assert rows[-1]["step"] == 4, "the wish of step 3 is known one step later"
    assert newest_step(ends["root"], "one rank stops") == 4
    assert losses(rows) == {step: loss for step, loss in losses(ends["whole"][0][1]).items() if step <= 4}


def test_a_wish_to_stop_in_the_last_step_changes_nothing(ends: dict[str, Any]) -> None:
    assert [outcome for outcome, _ in ends["stop at the end"]] == [Outcome.FINISHED] * 2


@pytest.mark.parametrize(
    ("name", "kept", "told"),
    [("explodes", 1, 5), ("explodes at stage 3", 1, 5), ("explodes unseen", 0, 6), ("explodes late", 1, 3)],
)
def test_a_loss_that_is_no_number_ends_the_run_with_the_last_good_checkpoint(
    ends: dict[str, Any], name: str, kept: int, told: int
) -> None:
    root, said = ends["root"], [str(error) for error, _ in ends[name]]
    assert all(isinstance(error, BadLossError) for error, _ in ends[name])
    assert said[0] == said[1], "all ranks say the same"
    first_bad = 3
    assert said[0].startswith(f"step {first_bad}: ")
    assert "Try a lower train.lr, train.clip, train.precision=fp32, or train.rewinds=1" in said[0]
    assert f"{root}/runs/{name}/bad-loss/000001" in said[0]
    _, rows = ends[name][0]
    assert rows[-1]["step"] == told
    assert newest_step(root, name) == kept
    for rank in range(2):
        written = json.loads(run_of(root, name).get(f"bad-loss/000001/rank-{rank:04d}.json"))
        last = min(first_bad + 2, told)
        assert written == {str(step): samples_of(root, step, rank) for step in range(first_bad - 1, last + 1)}
    assert {error.window for error, _ in ends[name]} == {(first_bad - 1, last)}


def samples_of(root: str, step: int, rank: int) -> list[int]:
    wanted = toy.recipe()
    batches = train_batches(
        open_source(f"{root}/data"), [View(size=16)], seed=wanted.seed, batch=8, micro_batch=2, block=16,
        start_step=step - 1, stop_step=step, rank=rank, world=2, workers=0, prefetch=1,
    )  # fmt: skip
    return [int(i) for micro in next(iter(batches)) for i in micro.index]


def test_a_curve_that_ends_in_no_number_is_kept(ends: dict[str, Any]) -> None:
    text = b"".join(
        run_of(ends["root"], "explodes").get(e.key) for e in run_of(ends["root"], "explodes").list("metrics/")
    )
    stored = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [row["step"] for row in stored] == [0, 1, 2, 3, 4, 5]
    assert stored[-1]["loss"] == "nan"


# ---- stages


TWO = {"first": {"img_size": 16, "steps": 3}, "second": {"img_size": 24, "steps": 4, "lr": 0.002}}


def staged(precision: str = "fp32") -> Recipe:
    made = toy.recipe(train={"precision": precision})
    made.stages = TWO
    return complete(from_yaml(to_yaml(made)))


def test_stages_follow_each_other_and_a_run_resumes_within_and_between_them(tmp_path: Path) -> None:
    root, wanted = toy.store(tmp_path), staged()
    tries = [("whole", 1, 1000), ("within", 1, 3), ("within", 2, 1000), ("between", 1, 2), ("between", 2, 1000)]
    first, _ = run_ranks(attempts, 2, [{"wanted": wanted, "name": n, "number": k, "stop_at": at} for n, k, at in tries],
                         root)  # fmt: skip
    (done, rows), within, again, between, later = first
    assert done is Outcome.FINISHED
    told = [(row["stage"], row["step"]) for row in rows]
    assert told == [("first", s) for s in range(4)] + [("second", s) for s in range(3, 8)]
    assert {row["steps"] for row in rows if row["stage"] == "second" and "steps" in row} == {7}
    assert [row["lr"] for row in rows if row["step"] == 5] == [0.002]
    assert (within[0], within[1][-1]["stage"], within[1][-1]["step"]) == (Outcome.PREEMPTED, "second", 5)
    assert losses(within[1]) | losses(again[1]) == losses(rows)
    # The wish of step 2 comes with the last step of its stage, so it is granted in the next one.
    assert (between[0], between[1][-1]["step"]) == (Outcome.PREEMPTED, 4)
    assert losses(between[1]) | losses(later[1]) == losses(rows)
    assert [m.key.split("/")[1] for m in commits.checkpoints(run_of(root, "whole"))] == [
        f"0000000{step}-000001" for step in (7, 5, 3, 2)
    ]


# ---- data


def folder(path: Path, good: int, bad: int) -> str:
    """A folder of images of which some are broken, at even distances."""
    (path / "images").mkdir(parents=True)
    toy.store(path / "source", good)
    source = open_source(f"file://{path}/source/data")
    for i in range(good):
        (path / "images" / f"{i:03d}.png").write_bytes(source.read(i).data)
    for i in range(bad):
        (path / "images" / f"{i * good // max(bad, 1):03d}-broken.png").write_bytes(b"\x89PNG no more")
    return f"file://{path}"


def quarantined(good: int, bad: int, share: float, path: Path, **more: Any) -> Any:
    root = folder(path, good, bad)
    wanted = toy.recipe(data={"source": "store:images", "max_bad_share": share}, **more)
    return run_ranks(attempts, 2, [{"wanted": wanted, "name": "run"}], root), root, wanted


def test_broken_samples_are_counted_once_over_ranks_and_epochs_and_the_run_goes_on(tmp_path: Path) -> None:
    # 30 samples, batch 8: 12 steps are four epochs, in which ranks meet each other's samples again.
    ranks, root, wanted = quarantined(24, 6, 0.5, tmp_path, train={"steps": 12})
    outcome, rows = ranks[0][0]
    assert outcome is Outcome.FINISHED
    counts = [row["bad_samples"] for row in rows[1:]]
    assert counts == sorted(counts)
    assert 2 < counts[-1] <= 6
    listed = json.loads(run_of(root, "run").get("bad_samples.json"))
    assert len(listed) == counts[-1]
    assert all(key.endswith("-broken.png") for key in listed)


@pytest.mark.parametrize(
    ("good", "bad", "share", "goes_on"),
    [(30, 12, 0.1, False), (30, 12, 0.9, True), (30, 3, 0.01, True), (30, 3, 0.0, False)],
)
def test_a_run_stops_above_the_share_of_broken_samples_but_never_for_a_few(
    good: int, bad: int, share: float, goes_on: bool, tmp_path: Path
) -> None:
    ranks, root, _ = quarantined(good, bad, share, tmp_path, train={"steps": 10})
    ends = [rank[0][0] for rank in ranks]
    if goes_on:
        assert ends == [Outcome.FINISHED] * 2
        return
    assert all(isinstance(error, DataError) for error in ends)
    message = str(ends[0])
    assert f"of {good + bad} samples cannot be decoded, more than data.max_bad_share={share:g} allows" in message
    assert "-broken.png" in message
    assert "Repair or remove them, or raise data.max_bad_share" in message
    assert newest_step(root, "run") >= 0


def in_one_shard(root: str, name: str, labelled: bool) -> Recipe:
    """The toy images written again as `name`; a recipe that trains on them and names nothing real to evaluate with."""
    source = open_source(f"{root}/data")
    images = [source.read(i) for i in range(len(source))]
    samples = ((raw.key, raw.data, "png", raw.label if labelled else -1) for raw in images)
    write_shards(samples, open_store(root), name, 10**9, source.classes if labelled else [])
    nowhere = {"train": "store:nowhere", "test": "s3://no-such-bucket/at-all"}
    return toy.recipe(data={"source": f"store:{name}"}, evaluate=nowhere)


def test_neither_labels_nor_the_images_of_the_evaluation_are_touched(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    with_labels, bare = in_one_shard(root, "labelled", True), in_one_shard(root, "bare", False)
    tries = [{"wanted": with_labels, "name": "a"}, {"wanted": bare, "name": "b"}]
    (first, rows), (second, same) = run_ranks(attempts, 1, tries, root)[0]
    assert first is second is Outcome.FINISHED
    assert losses(rows) == losses(same)
    assert len(losses(rows)) == 6


# ---- what a method may do


SHIFTED = """
name: shifted
method: {name: shifted, options: {shift: 2}}
student: {name: convnext_atto, args: {depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}, drop_path: 0.1}
teachers:
  one: {name: vit_tiny_patch16_224, args: &tiny {img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2},
        weights: random}
data: {source: "store:data", block: 16}
train: {img_size: 32, steps: 4, batch: 8, micro_batch: 2, lr: 0.01, lr_batch: 0, precision: fp32, clip: 0.5}
launch: {device: cpu}
loader: {workers: 0}
checkpoint: {every_steps: 2, keep: 5}
log: {every_steps: 1, tensorboard: false}
"""


def test_a_method_unlike_the_shipped_one_needs_no_other_line_of_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_METHODS", EXTRA)
    root, at = toy.store(tmp_path), partial(_with_stage, complete(from_yaml(SHIFTED)))
    tries = [(at(1), "whole", 1, 1000), (at(3), "cut", 1, 1), (at(3), "cut", 2, 1000), (at(0), "other", 1, 1000)]
    first, _ = run_ranks(attempts, 2, [{"wanted": r, "name": n, "number": k, "stop_at": s} for r, n, k, s in tries],
                         root)  # fmt: skip
    (_, rows), (cut, before), (_, after), (_, other) = first
    assert cut is Outcome.PREEMPTED
    assert losses(before) | losses(after) == pytest.approx(losses(rows), rel=1e-5)
    assert losses(other) == pytest.approx(losses(rows), rel=1e-5)
    assert [row["weight_decay"] for row in rows[1:]] == pytest.approx([0.03 * i / 4 for i in range(4)])
    assert [row["mean"] for row in after] == pytest.approx([row["mean"] for row in rows[-len(after) :]], rel=1e-5)
    run = run_of(root, "cut")
    run.put("recipe.yaml", to_yaml(at(3)).encode())
    export(run, root, ["timm"])
    assert verify(run) == 0.0
    found = newest(run, [fingerprint(at(3))])
    assert found is not None
    assert Reader(run, found).whole("method").keys() == {"mean"}


def _with_stage(made: Recipe, stage: int) -> Recipe:
    copy = from_yaml(to_yaml(made))
    copy.zero.stage = stage
    return copy
