import numpy as np
import pytest
import torch

from core.data.packed import _canvases, _on_canvas, cut_views, pack
from core.data.resample import weights
from core.data.views import RandomCrops, View, random_resized_crop
from tests.core.data.images import pixels
from tests.host_syncs import HostSyncs

SIZES = np.array([[60, 80], [75, 50], [40, 40], [33, 90], [21, 20]])
IMAGES = [torch.from_numpy(pixels(k, *size).copy()).permute(2, 0, 1) for k, size in enumerate(SIZES.tolist())]
VIEWS = [View(32, "large"), View(12, "small", scale=(0.05, 0.25)), View(30, "plain", interpolation="bilinear")]


CROPPED = RandomCrops(VIEWS)(0, 0, np.arange(5), SIZES)
PACKED = pack(IMAGES, CROPPED)


def test_packed_images_take_their_own_bytes_and_come_out_as_they_were() -> None:
    assert PACKED.pixels.shape == (3 * int(SIZES.prod(1).sum()),)
    assert all(torch.equal(a, b) for a, b in zip(PACKED.images(), IMAGES, strict=True))


def test_views_cut_on_a_cpu_are_those_that_a_worker_cuts() -> None:
    views = cut_views(PACKED, VIEWS)
    assert any(CROPPED.flips["large"])
    for view in VIEWS:
        boxes, flips = CROPPED.boxes[view.name], CROPPED.flips[view.name]
        for row, image in enumerate(IMAGES):
            want = random_resized_crop(image, boxes[row], bool(flips[row]), view.size, view.interpolation)
            assert torch.equal(views[view.name][row], want)


def test_views_cut_by_matrix_products_are_within_two_levels_of_those() -> None:
    with HostSyncs() as syncs:
        views = _on_canvas(PACKED, PACKED.images(), slice(0, 5), VIEWS)
    assert syncs.found == []
    for name, want in cut_views(PACKED, VIEWS).items():
        differences = (views[name].float() - want).abs()
        assert differences.max() <= 2
        assert differences.mean() < 0.1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_weights_sum_to_one_and_see_nothing_from_outside_the_box(interpolation: str) -> None:
    start, extent = torch.tensor([3.0, 0.0, 11.0]), torch.tensor([7.0, 20.0, 1.0])
    found = weights(start, extent, torch.tensor([0.0, 1.0, 0.0]), 9, 20, interpolation)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 9))
    assert not found[0, :, :3].any()
    assert not found[0, :, 10:].any()
    straight = weights(start, extent, torch.zeros(3), 9, 20, interpolation)
    assert torch.equal(found[1], straight[1].flip(0))


def test_canvases_cover_all_rows_and_hold_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(_canvases(SIZES)) == [slice(0, 5)]
    monkeypatch.setattr("core.data.packed.CANVAS_BYTES", 6 * 2 * 80 * 75)
    rows = list(_canvases(SIZES))
    assert [row for part in rows for row in range(part.start, part.stop)] == list(range(5))
    assert len(rows) > 1
    assert all(
        6 * (p.stop - p.start) * SIZES[p].max(0).prod() <= 6 * 2 * 80 * 75 or p.stop - p.start == 1 for p in rows
    )
