from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from core.data import udi_geometry as geometry
from core.data.box_blur import box_blur, box_taps
from core.data.udi_crops import GLOBALS, LinkedCrops, Linking
from core.data.views import Cropped, View, draw_colour

SAMPLES = np.arange(400)
SIZES = np.tile(np.array([375, 500]), (len(SAMPLES), 1))


def linked(**options: Any) -> LinkedCrops:
    return LinkedCrops(Linking(14, 6), **{"local": 2, "scale": (0.25, 1.0), "local_scale": (0.05, 0.25), "window": 3,
                                          "local_window": 2} | options)  # fmt: skip


@pytest.fixture(scope="module")
def cropped() -> Cropped:
    return linked()(22, 0, SAMPLES, SIZES)


def test_boxes_lie_in_the_image_and_have_the_areas_asked_for(cropped: Cropped) -> None:
    for name, boxes in cropped.boxes.items():
        low, high = (0.25, 1.0) if name in GLOBALS else (0.05, 0.25)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= SIZES).all()
        share = boxes[:, 2] * boxes[:, 3] / SIZES.prod(1)
        assert low - 0.01 < share.min() <= share.max() < high + 0.01
        assert 0.4 < cropped.flips[name].mean() < 0.6


def test_the_second_large_crop_overlaps_the_first_by_a_quarter_of_the_smaller(cropped: Cropped) -> None:
    a, b = (cropped.boxes[name] for name in GLOBALS)
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    overlap = (high - low).clip(min=0).prod(1) / np.minimum(a[:, 2:].prod(1), b[:, 2:].prod(1))
    assert overlap.min() > 0.2
    assert 0.7 < overlap.mean() < 0.95


def test_the_released_slips_change_the_crops(cropped: Cropped) -> None:
    slipped = linked(released_slips=True)(22, 0, SAMPLES, SIZES)
    assert (slipped.boxes["global0"] == cropped.boxes["global0"]).all()
    moved = (slipped.boxes["global1"] != cropped.boxes["global1"]).any(axis=0)
    assert moved.tolist() == [False, True, False, False]  # the slip is one of columns


def test_a_box_on_the_region_s_centre_stays_and_half_a_pixel_beside_it_moves_towards_it() -> None:
    """With the released slip the columns count from the row 0, as if the box reached there."""
    sizes = np.tile(np.array([201, 401]), (3, 1))
    boxes = np.tile(np.array([0, 150, 41, 41]), (3, 1))  # columns 150 to 190
    regions = np.array([[0, 160, 40, 180], [0, 160, 40, 181], [0, 160, 40, 179]]) / np.array([200, 400, 200, 400])
    pulled = geometry.pull(boxes, regions.astype(np.float32), sizes, released_slip=True)
    assert np.sign(pulled[:, 1] - 150).tolist() == [0, 1, -1]
    kept = geometry.pull(boxes, regions.astype(np.float32), sizes, released_slip=False)
    assert (kept[:, 1] == 150).all()


def test_a_box_that_never_fitted_lies_in_the_middle_and_others_where_they_were_drawn() -> None:
    shape, sizes = np.array([[3, 4], [3, 4], [5, 5]]), np.array([[8, 9], [8, 9], [5, 5]])
    unit = np.array([[0.99, 0.0], [0.99, 0.0], [0.5, 0.5]])
    boxes = geometry.placed(shape, np.array([True, False, True]), sizes, unit)
    assert boxes.tolist() == [[5, 0, 3, 4], [2, 2, 3, 4], [0, 0, 5, 5]]


def test_matches_say_where_a_token_lies_in_the_other_crop(cropped: Cropped) -> None:
    """The place of every matched token in pixels of the image, once from each crop."""
    extra, grid = cropped.extra, 14
    for way, (own, other) in enumerate((GLOBALS, GLOBALS[::-1])):
        valid = extra["valid"][:, way] > 0
        row, column = np.divmod(extra["source"][:, way], grid)
        near_row, near_column = np.divmod(extra["target"][:, way], grid)
        weight = extra["weight"][:, way]
        place = [(near * weight).sum(-1) for near in (near_row, near_column)]
        for axis, (mine, theirs) in enumerate(((row, place[0]), (column, place[1]))):
            assert np.abs(pixel(cropped, own, axis, mine) - pixel(cropped, other, axis, theirs))[valid].max() < 0.1
        assert np.allclose(weight.sum(-1), valid)
        assert (np.diff(extra["valid"][:, way], axis=1) <= 0).all()  # matched ones first
    assert 10 < extra["valid"].sum(-1).mean() < 14


def pixel(cropped: Cropped, name: str, axis: int, token: np.ndarray) -> np.ndarray:
    start, side = cropped.boxes[name][:, axis, None], cropped.boxes[name][:, axis + 2, None]
    share = token / 13
    if axis == 1:
        share = np.where(cropped.flips[name][:, None], 1 - share, share)
    out: np.ndarray = start + share * (side - 1)
    return out


def test_a_small_crop_s_tokens_are_found_in_the_second_crop_then_in_the_first(cropped: Cropped) -> None:
    link, sizes = Linking(14, 6), SIZES

    def edges(name: str) -> np.ndarray:
        flips = np.stack([np.zeros_like(cropped.flips[name]), cropped.flips[name]], axis=1)
        return geometry.corners(cropped.boxes[name], sizes, flips)

    tokens = linked()._sampled(22, 0, SAMPLES)[1]
    want = link.small(edges("local1"), edges("global0"), edges("global1"), tokens)
    for way in (0, 1):
        assert np.array_equal(cropped.extra["local_target"][:, 1, way], want[way].target)
        assert np.array_equal(cropped.extra["local_weight"][:, 1, way], want[way].weight)
    assert np.array_equal(want[0].target, geometry.match(edges("local1"), edges("global1"), tokens, 6, 14).target)


def test_crops_depend_on_the_sample_alone_and_survive_a_trip_to_a_worker(cropped: Cropped) -> None:
    crops = pickle.loads(pickle.dumps(linked()))
    some = crops(22, 0, SAMPLES[[7, 3]], SIZES[:2])
    for name in some.boxes:
        assert np.array_equal(some.boxes[name], cropped.boxes[name][[7, 3]])
    for name in some.extra:
        assert np.array_equal(some.extra[name], cropped.extra[name][[7, 3]])
    assert not np.array_equal(crops(22, 1, SAMPLES, SIZES).boxes["global0"], cropped.boxes["global0"])


def test_of_the_whole_image_every_token_inside_matches_itself() -> None:
    whole = linked().whole(3, 1)
    assert whole["valid"].all()
    found = np.take_along_axis(whole["target"], whole["weight"].argmax(-1)[..., None], -1)[..., 0]
    assert np.array_equal(found, whole["source"])
    assert whole["local_weight"].shape == (3, 1, 2, 9, 4)


def test_an_image_that_no_box_fits_gets_the_centre() -> None:
    boxes = linked(scale=(0.9, 1.0))(22, 0, np.arange(50), np.tile([100, 1000], (50, 1))).boxes["global0"]
    assert (boxes[:, 2:] == [100, 133]).all()
    assert (boxes[:, :2] == [0, 433]).all()


def test_pillow_s_blur_is_reproduced_for_any_radius() -> None:
    from PIL import Image, ImageFilter

    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    radii = np.array([0.1, 0.45, 1.3, 2.0, 5.0])
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(len(radii), 3, 20, 30) / 255
    got = (box_blur(batch, torch.from_numpy(box_taps(radii, 3)), 3) * 255).round().permute(0, 2, 3, 1).numpy()
    for blurred, radius in zip(got, radii, strict=True):
        want = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(radius)))).astype(int)
        assert np.abs(blurred - want).max() <= 1
        assert (blurred != want).mean() < 0.1


def test_calm_samples_are_blurred_by_their_own_probability_and_never_solarised() -> None:
    view = View(32, blur=0.1, solarise=1.0, calm=(0.5, 1.0))
    colour = draw_colour(view, 22, 0, np.arange(4000), 0)
    calm = ~colour.solarise
    assert abs(calm.mean() - 0.5) < 0.03
    assert not np.isnan(colour.sigma[calm]).any()
    assert abs((~np.isnan(colour.sigma[~calm])).mean() - 0.1) < 0.03
