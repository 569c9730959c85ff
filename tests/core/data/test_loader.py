import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.cache import ShardCache
from core.data.decode import decode, to_tensor
from core.data.loader import eval_batches, steps_per_epoch, train_batches
from core.data.samples import MicroBatch
from core.data.shards import write_shards
from core.data.source import ArraySource, DataError, Source, open_source
from core.data.views import View, centre_crop, crop_boxes, random_resized_crop
from core.storage import open_store
from tests.core.data.images import encode, jpeg, pixels

SHAPES = [(24, 32), (40, 17), (9, 9), (64, 30)]
VIEWS = [View(size=8, name="global"), View(size=6, name="local", scale=(0.05, 0.3))]
SETTINGS: dict[str, Any] = {"seed": 3, "batch": 16, "micro_batch": 4, "block": 10, "start_step": 0, "stop_step": 5}
ONE: dict[str, Any] = {"rank": 0, "world": 1, "workers": 0, "prefetch": 2}


@pytest.fixture
def arrays() -> Source:
    return ArraySource([pixels(i, *SHAPES[i % 4]) for i in range(50)])  # 3 steps an epoch, 2 samples left out


def flat(steps: Any) -> dict[tuple[int, int], MicroBatch]:
    return {(micro.step, micro.micro): micro for step in steps for micro in step}


def assert_same(got: dict[tuple[int, int], MicroBatch], want: dict[tuple[int, int], MicroBatch]) -> None:
    assert list(got) == list(want)
    for key, micro in got.items():
        other = want[key]
        assert torch.equal(micro.index, other.index)
        assert (micro.epoch, micro.bad) == (other.epoch, other.bad)
        assert all(torch.equal(micro.views[name], other.views[name]) for name in ("global", "local"))


def test_a_step_is_a_list_of_micro_batches(arrays: Source):
    steps = list(train_batches(arrays, VIEWS, **SETTINGS, **ONE))
    assert [len(step) for step in steps] == [4] * 5
    assert [(m.step, m.micro, m.epoch) for m in steps[4]] == [(4, m, 1) for m in range(4)]
    micro = steps[0][0]
    assert micro.index.dtype == torch.int64
    assert {name: (v.dtype, tuple(v.shape)) for name, v in micro.views.items()} == {
        "global": (torch.uint8, (4, 3, 8, 8)),
        "local": (torch.uint8, (4, 3, 6, 6)),
    }


def test_no_sample_comes_twice_in_an_epoch(arrays: Source):
    steps = list(train_batches(arrays, VIEWS[:1], **SETTINGS | {"stop_step": 3}, **ONE))
    seen = [i for step in steps for micro in step for i in micro.index.tolist()]
    assert len(seen) == len(set(seen)) == 48


def test_a_view_is_the_crop_drawn_for_its_sample_and_epoch(arrays: Source):
    micro = list(train_batches(arrays, VIEWS, **SETTINGS, **ONE))[4][2]
    for number, view in enumerate(VIEWS):
        for row, i in enumerate(micro.index.tolist()):
            image = to_tensor(arrays.read(i).data)
            boxes, flips = crop_boxes(view, 3, 1, np.array([i]), number, np.array([image.shape[1:]]))
            want = random_resized_crop(image, boxes[0], bool(flips[0]), view.size)
            assert torch.equal(micro.views[view.name][row], want)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_batches_are_the_same_for_any_ranks_and_workers(arrays: Source, world: int, workers: int):
    want = flat(train_batches(arrays, VIEWS, **SETTINGS, **ONE))
    got: dict[tuple[int, int], MicroBatch] = {}
    for rank in range(world):
        own = ONE | {"rank": rank, "world": world, "workers": workers}
        mine = flat(train_batches(arrays, VIEWS, **SETTINGS, **own))
        assert {key[1] for key in mine} == set(range(rank * 4 // world, (rank + 1) * 4 // world))
        got |= mine
    assert_same(dict(sorted(got.items())), want)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_in_the_middle_goes_on_alike(arrays: Source, workers: int):
    want = flat(train_batches(arrays, VIEWS, **SETTINGS, **ONE))
    late = flat(train_batches(arrays, VIEWS, **SETTINGS | {"start_step": 2}, **ONE | {"workers": workers}))
    assert_same(late, {key: micro for key, micro in want.items() if key[0] >= 2})


def test_the_models_random_numbers_are_left_alone(arrays: Source):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(train_batches(arrays, VIEWS, **SETTINGS, **ONE | {"workers": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def bad_folder(tmp_path: Path) -> str:
    """30 files, six of them unreadable: 4, 5 (in a row), 11, 17, 28 and 29 (at the end)."""
    folder = tmp_path / "photos"
    folder.mkdir()
    good = [
        jpeg(1),
        encode(pixels(2)[..., 0], "PNG"),
        encode(Image.fromarray(pixels(3)).convert("CMYK")),
        encode(Image.fromarray(pixels(4)).quantize(8), "PNG"),
        encode(pixels(5)[..., 0].astype(np.uint16) * 257, "PNG"),
        encode(Image.fromarray(pixels(6)).convert("RGBA"), "PNG"),
        jpeg(7, 300, 500),
    ]
    bad = {4: b"", 5: jpeg(1)[:300], 11: b"not an image", 17: jpeg(2)[:-100], 28: b"", 29: b"\xff\xd8\xff\xe0"}
    for i in range(30):
        (folder / f"{i:02d}.jpg").write_bytes(bad.get(i, good[i % len(good)]))
    return f"file://{folder}"


def test_unreadable_samples_are_replaced_by_the_next_readable_one(tmp_path: Path):
    source = open_source(bad_folder(tmp_path))
    settings = SETTINGS | {"batch": 10, "micro_batch": 10, "stop_step": 3}
    batches = flat(train_batches(source, VIEWS, **settings, **ONE))
    index = torch.cat([micro.index for micro in batches.values()]).tolist()
    keys = [key for micro in batches.values() for key in micro.bad]
    assert sorted(index) == sorted([i for i in range(30) if i not in (4, 5, 11, 17, 28, 29)] + [6, 6, 12, 18, 0, 0])
    assert sorted(keys) == sorted(f"{i:02d}.jpg" for i in (4, 5, 5, 11, 17, 28, 29, 29))
    own = ONE | {"workers": 2}
    assert_same(flat(train_batches(source, VIEWS, **settings, **own)), batches)


def test_a_source_without_one_readable_image_stops_with_its_keys(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        (tmp_path / f"photos/{i}.jpg").write_bytes(b"x")
    source = open_source(f"file://{tmp_path}/photos")
    batches = train_batches(source, VIEWS, **SETTINGS | {"batch": 4, "stop_step": 1}, **ONE)
    with pytest.raises(DataError, match=r"none of 8 samples in a row, from \d.jpg to \d.jpg, can be decoded"):
        next(batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 18}, "must be a multiple of micro_batch"),
        ({"world": 3}, "number of ranks"),
        ({"batch": 64}, "50 samples do not fill one batch of 64"),
    ],
)
def test_impossible_sizes_are_refused_at_once(arrays: Source, change: dict[str, int], message: str):
    with pytest.raises(DataError, match=message):
        train_batches(arrays, VIEWS, **SETTINGS | ONE | change)


def test_views_of_one_name_are_refused(arrays: Source):
    with pytest.raises(DataError, match="different names"):
        train_batches(arrays, [View(size=8), View(size=9)], **SETTINGS, **ONE)


def test_steps_per_epoch_counts_whole_batches():
    assert steps_per_epoch(50, 16, 4) == 3
    assert steps_per_epoch(1_281_167, 512, 128) == 2502
    assert steps_per_epoch(15, 16, 4) == 0


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.system)])
def test_workers_read_shards_from_a_bucket(bucket: str, tmp_path: Path, context: str):
    samples = [(f"{i}", jpeg(i), "jpg", i % 3) for i in range(50)]
    write_shards(samples, open_store(bucket), "set", 8000, ["a", "b", "c"])
    source = open_source(f"{bucket}/set", ShardCache(tmp_path / "cache", 1 << 20))
    source.read(0)  # a client and a file that the workers must not share
    settings = SETTINGS | {"stop_step": 2}
    want = flat(train_batches(source, VIEWS, **settings, **ONE))
    assert_same(flat(train_batches(source, VIEWS, **settings, **ONE | {"workers": 1}, context=context)), want)


class Signalled(ArraySource):
    """Sends its own process the signals that a scheduler sends to a whole job."""

    def read(self, i: int) -> Any:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        return super().read(i)


def test_workers_outlive_the_signals_that_their_rank_acts_on():
    source = Signalled([pixels(i) for i in range(16)])
    steps = list(train_batches(source, VIEWS, **SETTINGS | {"stop_step": 1}, **ONE | {"workers": 1}))
    assert len(steps) == 1


def test_leaving_early_ends_the_workers(arrays: Source):
    batches = train_batches(arrays, VIEWS, **SETTINGS | {"stop_step": 10_000}, **ONE | {"workers": 2})
    next(batches)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    during = set(children.read_text().split())
    batches.close()
    assert len(during) >= 2
    assert len(set(children.read_text().split()) & during) <= len(during) - 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_image_once_in_order(arrays: Source, workers: int, world: int):
    labelled = ArraySource(arrays.images, list(range(50)))
    batches = [list(eval_batches(labelled, 8, 4, workers, rank, world)) for rank in range(world)]
    index = torch.cat([item[2] for part in batches for item in part])
    labels = torch.cat([item[1] for part in batches for item in part])
    images = torch.cat([item[0] for part in batches for item in part])
    assert index.tolist() == labels.tolist() == list(range(50))
    assert max(len(part) for part in batches) - min(len(part) for part in batches) <= 1
    for i, image in enumerate(images):
        assert torch.equal(image, centre_crop(to_tensor(labelled.read(i).data), 8))


def test_evaluation_leaves_unreadable_images_out(tmp_path: Path):
    source = open_source(bad_folder(tmp_path))
    batches = list(eval_batches(source, 8, 2, 0))
    assert torch.cat([index for _, _, index in batches]).tolist() == [
        i for i in range(30) if i not in (4, 5, 11, 17, 28, 29)
    ]
    assert all(len(images) for images, _, _ in batches)
    data = source.read(6).data
    assert isinstance(data, bytes)
    assert torch.equal(batches[2][0][0], centre_crop(decode(data), 8))
