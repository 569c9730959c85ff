import numpy as np
import pytest
import torch
from PIL import Image

from core.data.fast_rand_augment import NAMES, OPERATIONS, draw_steps, fast_rand_augment
from core.data.rand_augment import posterize, rand_augment
from core.data.source import DataError
from tests.core.data.images import pixels
from tests.host_syncs import HostSyncs

POLICY = "rand-m9-mstd0.5-inc1"
SIDE, COUNT = 36, 150
IMAGES = torch.stack([torch.from_numpy(pixels(k, SIDE, SIDE).copy()).permute(2, 0, 1) for k in range(COUNT)])
STEPS = draw_steps(POLICY, SIDE, 1, 2, np.arange(COUNT), 0)


def test_every_operation_of_the_policy_is_drawn() -> None:
    assert STEPS.shape == (COUNT, 2, 3)
    assert set(STEPS[..., 0].unique().tolist()) == {-1, *range(len(NAMES))}


def test_images_are_within_a_level_or_two_of_what_timm_makes_of_them() -> None:
    want = torch.stack([rand_augment(image, POLICY, (1, 2, k, 0)) for k, image in enumerate(IMAGES)])
    differences = (fast_rand_augment(IMAGES, STEPS) - want).abs()
    assert differences.max() <= 2
    assert differences.mean() < 0.05


def test_draws_depend_on_the_sample_alone() -> None:
    assert torch.equal(draw_steps(POLICY, SIDE, 1, 2, np.array([7, 3]), 0), STEPS[[7, 3]])
    assert not torch.equal(draw_steps(POLICY, SIDE, 1, 3, np.arange(COUNT), 0), STEPS)


def test_a_sample_that_nothing_is_done_to_stays_and_no_image_is_changed_in_place() -> None:
    before = IMAGES.clone()
    augmented = fast_rand_augment(IMAGES, STEPS)
    idle = (STEPS[..., 0] < 0).all(1)
    assert idle.any()
    assert torch.equal(augmented[idle], IMAGES[idle].float())
    assert torch.equal(IMAGES, before)


def test_the_host_never_waits_for_the_device() -> None:
    with HostSyncs() as syncs:
        fast_rand_augment(IMAGES, STEPS)
    assert syncs.found == []


@pytest.mark.parametrize("name", ["auto_contrast", "equalize"])
def test_an_image_of_one_colour_has_nothing_to_stretch(name: str) -> None:
    flat = torch.full((1, 3, SIDE, SIDE), 93.0)
    assert torch.equal(OPERATIONS[name](flat.clone(), torch.zeros(1, 2, dtype=torch.float64)), flat)


def test_posterizing_to_no_bits_is_black_in_both_ways() -> None:
    """timm asks for it at the largest magnitude, which Pillow refuses from 13 on."""
    image = Image.fromarray(pixels(0))
    assert not np.asarray(posterize(image, 0)).any()
    assert np.array_equal(np.asarray(posterize(image, 8)), pixels(0))
    assert not OPERATIONS["posterize"](IMAGES[:1].float(), torch.zeros(1, 2, dtype=torch.float64)).any()


def test_a_policy_with_an_operation_that_has_no_fast_form_is_refused() -> None:
    with pytest.raises(DataError, match="desaturate of the policy rand-m9-t3a has no fast form; set data.pixels=exact"):
        draw_steps("rand-m9-t3a", SIDE, 0, 0, np.arange(1), 0)
