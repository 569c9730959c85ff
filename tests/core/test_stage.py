from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from core import commits
from core.checkpoint import Reader, newest
from core.comm import Comm
from core.config import ConfigError, from_yaml, to_yaml
from core.data.source import open_source
from core.inputs import schedule, shard_cache
from core.manifest import CheckpointError
from core.methods.base import Batch
from core.models.vit import resize_pos_embed
from core.recipe import Loader, Recipe, Train
from core.registry import complete
from core.stage import Stage, build, check_world
from core.storage import open_store
from core.train import train
from tests import toy
from tests.ranks import run_ranks

CPU = torch.device("cpu")

# ---- arithmetic


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [
        ({"epochs": 3}, 36, 0),  # 103 images: 4 streams of 25, each 12 micro-batches of 2
        ({"epochs": 3, "steps": 7}, 7, 0),
        ({"epochs": 3, "warmup_epochs": 0.5}, 36, 6),
        ({"epochs": 3, "warmup_epochs": 0.5, "warmup_steps": 4}, 36, 4),
        ({"epochs": 3, "warmup_epochs": 0.5, "warmup_steps": 0}, 36, 0),
        ({"steps": 5, "warmup_epochs": 2}, 5, 5),
    ],
)
def test_epochs_become_steps(settings: dict[str, Any], steps: int, warmup: int) -> None:
    resolved, count = schedule(Train(batch=8, micro_batch=2, **settings), 103)
    assert (count, resolved.warmup_steps) == (steps, warmup)


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.batch: 8 is more than the 7 images of data.source"):
        schedule(Train(batch=8, micro_batch=2), 7)


def test_ranks_that_cannot_share_the_micro_batches_are_refused_with_numbers_that_can() -> None:
    settings = Train(batch=24, micro_batch=4)
    for world in (1, 2, 3, 6):
        check_world(settings, world)
    with pytest.raises(ConfigError, match=r"launch.ranks: 6 micro-batches .* by 4 ranks; allowed: 1, 2, 3, 6"):
        check_world(settings, 4)


def test_the_shard_cache_is_the_user_s_own_unless_the_recipe_names_a_folder(tmp_path: Path) -> None:
    assert shard_cache(Loader()).folder.name.endswith(str(os.getuid()))
    cache = shard_cache(Loader(cache_dir=str(tmp_path), cache_gb=2.5))
    assert (cache.folder, cache.limit_bytes) == (tmp_path, 2_500_000_000)


# ---- batches


def made(root: str, wanted: Recipe, name: str = "main") -> Stage:
    stage, start = build(wanted, name, 0, root, Comm(CPU), None)
    assert (start, stage.first_step) == (0, 0)
    return stage


def one_step(root: str) -> dict[int, Any]:
    """By canonical micro-batch of step 3: samples, pixels on the device and the network's own draws."""
    stage, found = made(root, toy.recipe()), {}
    for micro in next(stage.batches(3)):
        batch = stage.batch(micro)
        stage.seed_network(3, micro)
        found[batch.micro] = batch.index.tolist(), batch.views["image"].double().sum().item(), torch.rand(2).tolist()
    return found


def test_what_a_micro_batch_holds_does_not_depend_on_the_rank_that_gets_it(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    alone = run_ranks(one_step, 1, root)[0]
    first, second = run_ranks(one_step, 2, root)
    assert sorted(alone) == [0, 1, 2, 3]
    assert (sorted(first), sorted(second)) == ([0, 1], [2, 3])
    assert first | second == alone
    assert len({tuple(draws) for _, _, draws in alone.values()}) == 4


def both_ways(root: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Samples and views of the first micro-batch with exact and with fast pixels."""
    found = []
    for way in ("exact", "fast"):
        stage = made(root, toy.recipe(data={"pixels": way}))
        batch = stage.batch(next(stage.batches(0))[0])
        found.append((batch.index, batch.views))
    return found


def test_the_recipe_chooses_how_pixels_are_made_and_nothing_else_changes(tmp_path: Path) -> None:
    ((exact_index, exact), (fast_index, fast)) = run_ranks(both_ways, 1, toy.store(tmp_path))[0]
    assert torch.equal(exact_index, fast_index)
    apart = (exact["image"] - fast["image"]).abs()
    assert apart.max() > 0  # in normalised units: a grey level is 0.017
    assert apart.mean() < 0.005


# ---- the held-out loss


def held_out(root: str, recipes: list[Recipe]) -> list[tuple[float | None, bool]]:
    """The loss, and whether looking at it left method and mode alone."""
    found = []
    for wanted in recipes:
        stage = made(root, wanted)
        stage.engine.train(True)
        before = {k: v.clone() for k, v in stage.method.state().items()}
        loss = stage.heldout()
        same = loss == stage.heldout() and all(before[k].equal(v) for k, v in stage.method.state().items())
        found.append((loss, same and stage.engine.module.training))
    return found


def pictures(root: str, good: int, bad: tuple[int, ...] = ()) -> str:
    """A folder of `good` images and broken ones at places in key order; its address."""
    source, name = open_source(f"{root}/data"), f"held-{good}-{len(bad)}"
    store = open_store(f"{root}/{name}")
    names = [f"{i:02d}.png" for i in range(good + len(bad))]
    left = iter(range(good))
    for place, key in enumerate(names):
        store.put(key, b"no image" if place in bad else bytes(source.read(next(left)).data))
    return f"store:{name}"


def with_held(address: str, stage: int = 1, micro_batch: int = 2) -> Recipe:
    return toy.recipe(data={"heldout": address}, zero={"stage": stage}, train={"micro_batch": micro_batch})


def test_the_held_out_loss_is_the_mean_over_all_images_whatever_ranks_and_batches(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    # Thirteen images: unequal parts, unequal batches. Broken ones fill a rank's last batch, so it has one less.
    whole, broken, few = pictures(root, 13), pictures(root, 13, (0, 1)), pictures(root, 1)
    none = pictures(root, 0, (0, 1, 2))
    recipes = [with_held(whole), with_held(whole, 3, 4), with_held(broken, 3), with_held(few, 3), with_held(none, 3),
               with_held("")]  # fmt: skip
    by_image = run_ranks(held_out, 1, root, recipes)[0]
    (first, ok), (second, _), (third, _), (single, _), (nothing, _), (absent, _) = by_image
    assert ok
    assert first is not None
    assert single is not None
    assert (second, third) == (pytest.approx(first, rel=1e-5), pytest.approx(first, rel=1e-5))
    assert single != pytest.approx(first, rel=1e-3)
    assert nothing is absent is None
    for rank in run_ranks(held_out, 2, root, recipes):
        assert [loss for loss, _ in rank[:4]] == pytest.approx([loss for loss, _ in by_image[:4]], rel=1e-5)
        assert [loss for loss, _ in rank[4:]] == [None, None]
        assert all(ok for _, ok in rank)


def rows_asked_for(root: str, wanted: Recipe) -> list[int]:
    """Of what is read beside held-out images."""
    stage, asked = made(root, wanted), list[int]()
    stage.held_companions.append(lambda epoch, micro, position, index: asked.extend(index.tolist()) or {})
    stage.heldout()
    return asked


def test_nothing_is_read_beside_held_out_images_that_cannot_be_read(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    for address in (pictures(root, 13, (0, 1)), pictures(root, 1, (0, 1))):
        for asked in run_ranks(rows_asked_for, 2, root, with_held(address)):
            assert asked
            assert not {0, 1} & set(asked), "nor by a rank that has no images left, or never had any"


def without_dropping(root: str, wanted: Recipe) -> tuple[float, float]:
    """The held-out loss, and the mean of single images' losses in evaluation mode."""
    stage = made(root, wanted)
    assert stage.held is not None
    total, got = 0.0, stage.heldout()
    assert got is not None
    stage.engine.train(False)
    from core.data.loader import eval_batches
    from core.data.views import normalize

    with torch.no_grad():
        for images, _, index in eval_batches(stage.held, 16, 1, 0):
            batch = Batch({"image": normalize(images)}, index, 22, 0, 0, training=False)
            total += float(stage.loss(batch)[0])
    return got, total / len(stage.held)


def test_the_held_out_loss_is_taken_without_augmentation_and_without_dropping(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    got, want = run_ranks(without_dropping, 1, root, with_held(pictures(root, 5)))[0]
    assert got == pytest.approx(want, rel=1e-5)


# ---- from stage to stage


def staged() -> Recipe:
    wanted = toy.recipe()
    wanted.stages = {"small": {"img_size": 16, "steps": 2}, "large": {"img_size": 40, "steps": 2}}
    return complete(from_yaml(to_yaml(wanted)))


def taken_over(root: str) -> dict[str, Any]:
    """The next stage as built from the last checkpoint of the one before."""
    wanted, run = staged(), open_store(f"{root}/runs/staged")
    train(wanted, run, root, 1, lambda row: None, lambda: False)
    last = list(commits.checkpoints(run))[-1]
    assert (last.position.stage, last.position.finished) == ("small", True)
    reader = Reader(run, last)
    wanted.zero.stage = 0
    stage, start = build(wanted, "large", 2, root, Comm(CPU), reader)
    before, now = reader.model(), stage.engine.module.state_dict()
    before["encoder.pos_embed"] = resize_pos_embed(before["encoder.pos_embed"], (2, 2), (5, 5), 1)
    statistics = reader.whole("method")
    return {
        "position": (start, stage.first_step, stage.run_steps, stage.engine.adam_step),
        "weights": sorted(name for name in before.keys() & now.keys() if before[name].equal(now[name])),
        "names": (sorted(before), sorted(now)),
        "statistics": {k: v.equal(stage.method.state()[k]) for k, v in statistics.items()},
    }


def test_the_next_stage_begins_with_the_weights_and_statistics_of_the_one_before(tmp_path: Path) -> None:
    got = run_ranks(taken_over, 1, toy.store(tmp_path))[0]
    assert got["position"] == (0, 2, 4, 0)
    before, now = got["names"]
    assert got["weights"] == before == now
    assert len(got["statistics"]) == 8
    assert all(got["statistics"].values())


def misfit(root: str) -> list[str]:
    """What is said of a checkpoint of another recipe, from another stage and from this one."""
    run, wanted, said = open_store(f"{root}/runs/toy"), toy.recipe(train={"steps": 1}), []
    train(wanted, run, root, 1, lambda row: None, lambda: False)
    last = newest(run)
    assert last is not None
    other = toy.recipe(student={"args": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}})
    for position in (dataclasses.replace(last.position, stage="before"), last.position):
        with pytest.raises(CheckpointError) as error:
            build(other, "main", 0, root, Comm(CPU), Reader(run, dataclasses.replace(last, position=position)))
        said.append(str(error.value))
    return said


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_names(tmp_path: Path) -> None:
    before, here = run_ranks(misfit, 1, toy.store(tmp_path))[0]
    assert "does not fit this recipe's module: " in before
    assert "other names or shapes of parameters: " in here
    for message in (before, here):
        assert "encoder.blocks.2.norm1.weight" in message
