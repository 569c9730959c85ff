import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from core.data.decode import to_tensor
from core.data.pillow import eval_pil
from core.data.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Colour,
    View,
    apply_colour,
    center_pad,
    crop_boxes,
    draw_colour,
    eval_tensor,
    normalize,
    random_resized_crop,
)
from tests.core.data.images import pixels

BICUBIC = InterpolationMode.BICUBIC
JITTER = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
BUSY = View(size=16, gray=0.3, blur=0.6, solarise=0.4)
OFF = View(size=16, jitter=0, gray=0, blur=0, solarise=0)


def batch(count: int) -> torch.Tensor:
    """Random pixels (b, 3, 16, 16); among them images with every grey, dark ones, black and white."""
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=random, dtype=torch.uint8)
    images[1::6] = torch.arange(256).view(16, 16)
    images[2::6] //= 16
    images[3::6] = 0
    images[4::6] = 255
    return images


def reference(image: torch.Tensor, colour: Colour, k: int) -> torch.Tensor:
    """Sample k through torchvision's own functions."""
    if colour.jit[k]:
        for op in colour.order[k]:
            image = JITTER[op](image, float(colour.factors[k, op]))
    if colour.gray[k]:
        image = functional.rgb_to_grayscale(image, 3)
    image = functional.to_dtype(image, torch.float32, scale=True)
    if not np.isnan(colour.sigma[k]):
        image = functional.gaussian_blur(image, [colour.kernel] * 2, [float(colour.sigma[k])])
    if colour.solarise[k]:
        image = functional.solarize(image, 0.5)
    return functional.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))


def test_colours_equal_torchvision_sample_by_sample():
    images, colour = batch(96), draw_colour(BUSY, 3, 1, np.arange(96), 0)
    want = torch.stack([reference(image, colour, k) for k, image in enumerate(images)])
    torch.testing.assert_close(apply_colour(images, colour), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("op", range(4))
def test_each_jitter_equals_torchvision_bit_for_bit(op: int):
    images = batch(300)
    colour = draw_colour(dataclasses.replace(OFF, jitter=1), 0, 0, np.arange(300), 0)
    colour.order = np.where(colour.order == op, op, -1)
    want = torch.stack([JITTER[op](x, float(f)) for x, f in zip(images, colour.factors[:, op], strict=True)])
    assert torch.equal(apply_colour(images, colour), normalize(want))


def test_a_sample_does_not_depend_on_its_batch():
    images, colour = batch(24), draw_colour(BUSY, 3, 1, np.arange(24), 0)
    whole = apply_colour(images, colour)
    for k in range(24):
        alone = draw_colour(BUSY, 3, 1, np.array([k]), 0)
        assert torch.equal(apply_colour(images[k : k + 1], alone)[0], whole[k])


def test_the_batch_is_not_changed():
    images = batch(24)
    before = images.clone()
    apply_colour(images, draw_colour(BUSY, 3, 1, np.arange(24), 0))
    assert torch.equal(images, before)


@pytest.mark.parametrize("solarise", [0.0, 1.0])
def test_without_jitter_only_normalisation_is_left(solarise: float):
    images = batch(6)
    got = apply_colour(images, draw_colour(dataclasses.replace(OFF, solarise=solarise), 0, 0, np.arange(6), 0))
    scaled = images / 255
    want = torch.where(scaled >= 0.5, 1 - scaled, scaled) if solarise else scaled
    torch.testing.assert_close(got, functional.normalize(want, list(IMAGENET_MEAN), list(IMAGENET_STD)))


READING = ("_local_scalar_dense", "nonzero", "masked_select", "index.")


class Reads(TorchDispatchMode):
    """Operations whose result decides on the host, which on a GPU would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        if any(name in str(func) for name in READING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_colours_never_wait_for_the_device():
    with Reads() as reads:
        apply_colour(batch(24), draw_colour(BUSY, 3, 1, np.arange(24), 0))
        assert not reads.seen
        torch.ones(3)[torch.ones(3) > 0].sum().item()
        assert reads.seen


def test_colour_draws_have_the_published_rates_and_ranges():
    view, n = View(size=16), 20_000
    colour = draw_colour(view, 22, 0, np.arange(n), 0)
    rates = {"jit": 0.8, "gray": 0.2, "solarise": 0.2}
    for name, rate in rates.items():
        assert getattr(colour, name).mean() == pytest.approx(rate, abs=0.015)
    assert (~np.isnan(colour.sigma)).mean() == pytest.approx(0.2, abs=0.015)
    np.testing.assert_allclose(np.nanquantile(colour.sigma, [0, 0.5, 1]), [0.1, 2.55, 5.0], atol=0.1)
    np.testing.assert_allclose(colour.factors.min(axis=0), [0.6, 0.6, 0.8, -0.1], atol=1e-3)
    np.testing.assert_allclose(colour.factors.max(axis=0), [1.4, 1.4, 1.2, 0.1], atol=1e-3)
    assert sorted(colour.order[0]) == [0, 1, 2, 3]
    assert len({tuple(order) for order in colour.order}) == 24
    apart = np.corrcoef(colour.factors.T) - np.eye(4)
    assert np.abs(apart).max() < 0.03


def test_an_operation_of_no_reach_is_left_out():
    colour = draw_colour(View(size=16, hue=0, contrast=0), 0, 0, np.arange(50), 0)
    assert set(colour.order.ravel()) == {-1, 0, 2}


def test_views_epochs_and_samples_draw_independently():
    base = draw_colour(BUSY, 1, 0, np.arange(8), 0).factors
    samples = np.arange(8)
    for other in [(1, 0, samples, 1), (1, 1, samples, 0), (2, 0, samples, 0), (1, 0, samples + 1, 0)]:
        assert not np.isclose(draw_colour(BUSY, *other).factors, base).any()


SIZES = np.array([[375, 500], [20, 30], [1, 1], [3, 900], [900, 3], [1, 50], [50, 1]])


def test_boxes_lie_inside_images_of_any_size():
    sizes = np.tile(SIZES, (300, 1))
    boxes, flips = crop_boxes(View(size=16), 0, 0, np.arange(len(sizes)), 0, sizes)
    top, left, height, width = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    assert flips.mean() == pytest.approx(0.5, abs=0.05)


def test_every_place_is_equally_likely():
    view = View(size=4, scale=(0.64, 0.64), ratio=(1, 1))
    boxes, _ = crop_boxes(view, 0, 0, np.arange(4000), 0, np.tile([5, 5], (4000, 1)))
    places, counts = np.unique(boxes, axis=0, return_counts=True)
    assert places.tolist() == [[0, 0, 4, 4], [0, 1, 4, 4], [1, 0, 4, 4], [1, 1, 4, 4]]
    np.testing.assert_allclose(counts, 1000, atol=120)


def test_colours_do_not_follow_from_the_crop():
    samples = np.arange(5000)
    boxes, flips = crop_boxes(View(size=16), 0, 0, samples, 0, np.tile([300, 300], (5000, 1)))
    colour = draw_colour(View(size=16), 0, 0, samples, 0)
    crop = np.column_stack([boxes, flips])
    drawn = np.column_stack([colour.jit, colour.gray, colour.solarise, colour.factors, ~np.isnan(colour.sigma)])
    assert np.abs(np.corrcoef(crop.T, drawn.T)[:5, 5:]).max() < 0.06  # 4 standard deviations


def test_a_shape_without_fitting_box_gets_the_largest_allowed_centre_crop():
    view = View(size=16, scale=(0.9, 1.0))
    boxes, _ = crop_boxes(view, 0, 0, np.arange(3), 0, np.array([[30, 900], [900, 30], [60, 61]]))
    assert boxes[0].tolist() == [0, 430, 30, 40]
    assert boxes[1].tolist() == [430, 0, 40, 30]
    assert boxes[2, 2:].min() > 48  # here a drawn box fits


@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 300)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int):
    n, view = 4000, View(size=16)
    boxes, _ = crop_boxes(view, 0, 0, np.arange(n), 0, np.tile([height, width], (n, 1)))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    params = [v2.RandomResizedCrop(16).make_params([image]) for _ in range(n)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
    got, want = (np.quantile(b / [height, width, height, width], quantiles, axis=0) for b in (boxes, theirs))
    np.testing.assert_allclose(got, want, atol=0.035)


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_torchvisions_resized_crop(flip: bool):
    image = to_tensor(pixels(0, 40, 60))
    want = functional.resized_crop(image, 3, 5, 30, 41, [16, 16], interpolation=BICUBIC, antialias=True)
    want = functional.horizontal_flip(want) if flip else want
    assert torch.equal(random_resized_crop(image, np.array([3, 5, 30, 41]), flip, 16), want)


@pytest.mark.parametrize("shape", [(40, 60), (61, 37), (10, 12), (32, 32)])
def test_evaluation_transforms_equal_torchvisions(shape: tuple[int, int]):
    picture = Image.fromarray(pixels(0, *shape))
    tail = [v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps = [*tail, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    resize = v2.Resize(32, interpolation=BICUBIC, antialias=True)
    image = functional.pil_to_tensor(picture)
    torch.testing.assert_close(eval_tensor(image, 32), v2.Compose([v2.ToImage(), resize, *steps])(picture))
    torch.testing.assert_close(eval_pil(image, 32, 32), v2.Compose([resize, *steps])(picture))


def test_normalize_takes_bytes_and_unit_floats():
    images = batch(4)
    torch.testing.assert_close(normalize(images), normalize(images / 255))
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1).expand(3, 2, 2)
    assert normalize(mean).abs().max() == 0
    assert mean[0, 0, 0] == torch.tensor(0.485)  # the argument stays as it was


def test_padding_puts_the_odd_pixel_at_the_end():
    assert center_pad(500, 333, 14) == (504, 336, 2, 2, 1, 2)
    assert center_pad(28, 14, 14) == (28, 14, 0, 0, 0, 0)
