import numpy as np
import pytest
import torch

from core.data.colour import IMAGENET_STD, apply_colour
from core.data.fast_colour import fast_colour
from core.data.views import View, draw_colour
from tests.host_syncs import HostSyncs

LEVEL = torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
UDI = View(40, box_passes=3, blur=0.5, blur_sigma=(0.1, 2.0))
PARTS = {
    "nothing": View(40, jitter=0.0, gray=0.0, blur=0.0, solarise=0.0),
    "brightness": View(40, jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0, gray=0.0, blur=0.0, solarise=0.0),
    "contrast": View(40, jitter=1.0, brightness=0.0, saturation=0.0, hue=0.0, gray=0.0, blur=0.0, solarise=0.0),
    "saturation": View(40, jitter=1.0, brightness=0.0, contrast=0.0, hue=0.0, gray=0.0, blur=0.0, solarise=0.0),
    "hue": View(40, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, gray=0.0, blur=0.0, solarise=0.0),
    "grey": View(40, jitter=0.0, gray=1.0, blur=0.0, solarise=0.0),
    "blur": View(40, jitter=0.0, gray=0.0, blur=1.0, solarise=0.0),
    "box blur": View(40, jitter=0.0, gray=0.0, blur=1.0, solarise=0.0, box_passes=3, blur_sigma=(0.1, 2.0)),
    "solarise": View(40, jitter=0.0, gray=0.0, blur=0.0, solarise=1.0),
}


def noise(count: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)
    images[0] = images[0, :1]  # grey: no hue, and sums that are whole
    images[1] = 200
    return images


def apart(images: torch.Tensor, view: View) -> torch.Tensor:
    """Difference of the exact and the fast chain in grey levels."""
    colour = draw_colour(view, 3, 0, np.arange(len(images)), 0)
    return ((apply_colour(images, colour) - fast_colour(images, colour)) * LEVEL).abs()


@pytest.mark.parametrize("part", PARTS)
def test_every_operation_is_within_a_level_of_the_exact_one(part: str) -> None:
    differences = apart(noise(), PARTS[part])
    assert differences.max() < 1.01
    assert differences.mean() < 0.02


@pytest.mark.parametrize("view", [View(40), UDI])
def test_a_whole_chain_is_within_a_few_levels(view: View) -> None:
    differences = apart(noise(64), view)
    assert differences.mean() < 0.05
    assert (differences > 2.01).float().mean() < 1e-3


def test_images_are_left_as_they_were_and_the_host_never_waits() -> None:
    images = noise()
    before = images.clone()
    colour = draw_colour(View(40), 3, 0, np.arange(len(images)), 0)
    with HostSyncs() as syncs:
        fast_colour(images, colour)
    assert syncs.found == []
    assert torch.equal(images, before)
    assert torch.equal(fast_colour(images, colour), fast_colour(images.float(), colour))
