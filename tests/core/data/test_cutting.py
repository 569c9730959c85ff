"""The fast way beside the exact one, from the loader to what networks see."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from core.config import load
from core.data.colour import IMAGENET_STD
from core.data.cutting import enough_pixels
from core.data.loader import train_batches
from core.data.rendering import rendered
from core.data.samples import MicroBatch
from core.data.source import ArraySource, DataError, Source
from core.data.views import View
from core.methods.base import Method
from core.registry import create
from tests.core.data.images import pixels
from tests.host_syncs import HostSyncs
from tests.photographs import Repeated, Size, files, photographs

CPU = torch.device("cpu")
LEVEL = torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
SHAPES = [(48, 64), (40, 57), (60, 50)]
PLAIN = View(8, jitter=0.0, gray=0.0, blur=0.0, solarise=0.0)
SEVERAL = [View(24, "large"), View(16, "small", scale=(0.05, 0.3))]


@pytest.fixture
def arrays() -> Source:
    return ArraySource([pixels(i, *SHAPES[i % 3]) for i in range(24)])


def micros(source: Source, views: Sequence[View], fast: bool, **more: Any) -> list[MicroBatch]:
    settings = {"seed": 3, "batch": 12, "micro_batch": 6, "block": 10, "start_step": 0, "stop_step": 3, "rank": 0,
                "world": 1, "workers": 0, "prefetch": 2}  # fmt: skip
    return [micro for step in train_batches(source, views, fast=fast, **settings | more) for micro in step]


def both(source: Source, views: Sequence[View], **more: Any) -> list[dict[str, torch.Tensor]]:
    """Differences of the two ways in grey levels, by micro-batch and view."""
    exact, fast = (micros(source, views, fast, **more) for fast in (False, True))
    return [
        {name: ((x - rendered(b, views, CPU, 3, True)[name]) * LEVEL).abs()
         for name, x in rendered(a, views, CPU, 3, False).items()}
        for a, b in zip(exact, fast, strict=True)
    ]  # fmt: skip


def test_a_single_crop_is_cut_by_the_worker_and_several_are_left_to_the_device(arrays: Source) -> None:
    single, several = micros(arrays, SEVERAL[:1], True)[0], micros(arrays, SEVERAL, True)[0]
    assert torch.equal(single.views["large"], micros(arrays, SEVERAL[:1], False)[0].views["large"])
    assert single.packed is None
    assert several.views == {}
    assert several.packed is not None
    assert several.packed.sizes.shape == (6, 2)


def test_several_crops_of_both_ways_are_the_same_but_for_their_colours(arrays: Source) -> None:
    for found in both(arrays, SEVERAL):
        assert all(apart.mean() < 0.1 for apart in found.values())
    plain = [View(view.size, view.name, jitter=0.0, gray=0.0, blur=0.0, solarise=0.0) for view in SEVERAL]
    for found in both(arrays, plain):
        assert all(apart.max() < 0.01 for apart in found.values())


@pytest.mark.parametrize("views", [SEVERAL, [View(24, rand_augment="rand-m9-mstd0.5-inc1", erase=0.25)]])
def test_batches_do_not_depend_on_workers_and_waiting_is_for_nothing(arrays: Source, views: list[View]) -> None:
    here, there = micros(arrays, views, True), micros(arrays, views, True, workers=2)
    for a, b in zip(here, there, strict=True):
        with HostSyncs() as syncs:
            seen = rendered(a, views, CPU, 3, True)
        assert syncs.found == []
        assert all(torch.equal(x, rendered(b, views, CPU, 3, True)[name]) for name, x in seen.items())


def test_a_policy_without_a_fast_form_is_refused_at_once(arrays: Source) -> None:
    views = [View(8, rand_augment="rand-m9-t3a")]
    with pytest.raises(DataError, match=r"data\.pixels=exact"):
        train_batches(arrays, views, fast=True, seed=0, batch=4, micro_batch=4, block=4, start_step=0, stop_step=1,
                      rank=0, world=1, workers=0, prefetch=2)  # fmt: skip


@pytest.mark.parametrize(("size", "side"), [((700, 933), 467), ((1200, 1600), 400), ((2400, 3200), 400)])
def test_a_photograph_much_larger_than_its_crops_is_decoded_smaller_and_looks_the_same(size: Size, side: int) -> None:
    source = Repeated(files(photographs(6, size), 90), 24)
    plain = {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarise": 0.0}
    views = [View(64, "large", **plain), View(48, "small", scale=(0.05, 0.3), **plain)]
    packed = micros(source, views, True)[0].packed
    assert packed is not None
    assert packed.sizes.amax().item() == side
    found = both(source, views)
    for name in ("large", "small"):
        assert np.mean([apart[name].mean().item() for apart in found]) < 3
        assert max(apart[name].max().item() for apart in found) < 90


def test_an_image_is_enough_while_its_smallest_crop_is() -> None:
    assert enough_pixels([View(224)], False) == 0
    assert enough_pixels([View(224), View(96, "small")], True) == round(224**2 / 0.08)
    assert enough_pixels([View(224, resize=256)], True) == 512**2


# Largest and mean difference in grey levels, on photographs as ImageNet has them and as shards keep them.
LIMITS = {"unic-b": (10, 0.01), "fd-clip-b": (0.01, 0.01), "proteus-b": (3, 0.05), "udi-s": (12, 0.01),
          "dime-fm-b32": (0.01, 0.01)}  # fmt: skip


@pytest.fixture(scope="module", params=[((375, 500), 95), ((256, 341), 90)], ids=["500x375 q95", "341x256 q90"])
def photos(request: pytest.FixtureRequest) -> Source:
    size, quality = request.param
    return Repeated(files(photographs(12, size), quality), 24)


@pytest.mark.parametrize("recipe", LIMITS)
def test_every_method_s_views_differ_by_a_few_grey_levels_at_most(photos: Source, recipe: str) -> None:
    method = method_of(recipe)
    views = method.views()
    most, mean = LIMITS[recipe]
    (found,) = both(photos, views, crops=method.crops(), batch=12, micro_batch=12, stop_step=1)
    assert max(apart.max().item() for apart in found.values()) <= most
    assert np.mean([apart.mean().item() for apart in found.values()]) <= mean


def method_of(name: str) -> Method:
    recipe = load(name)
    method = create(recipe, recipe.stage(recipe.stage_names()[0]), 1)
    method._patch = 16  # what udi learns from the student
    return method
